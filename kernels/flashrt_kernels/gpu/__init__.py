"""The sparse FFN of a GPU, in Triton: choose rows, find them in slots, fetch those that are missing, multiply.

Importing this package imports torch and triton. With TRITON_INTERPRET=1 in the environment, set before triton is
imported, the kernels run through Triton's interpreter on CPU tensors. No operation waits for the device or asks it
anything: numbers of rows that only the device knows stay there, as int32 [1], and grids have the size of what could be.
Values on the device (slots, row numbers) are therefore not checked; shapes, types and places are.
"""

from flashrt_kernels.gpu.gather import gather_rows
from flashrt_kernels.gpu.glu import glu_rows, workspace
from flashrt_kernels.gpu.layer_rows import LayerRows
from flashrt_kernels.gpu.row_list import RowList
from flashrt_kernels.gpu.select import select_rows
from flashrt_kernels.gpu.slot_map import SlotMap
from flashrt_kernels.gpu.step import SparseStep

__all__ = ["LayerRows", "RowList", "SlotMap", "SparseStep", "gather_rows", "glu_rows", "select_rows", "workspace"]
