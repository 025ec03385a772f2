"""Kernels of a GPU, in Triton: the sparse FFN, and sparse attention of decode steps.

The FFN's choose rows, find them in slots, fetch those that are missing, and multiply. Attention's write keys and values
with labels, choose blocks of tokens by these, and attend to the tokens of lists.

Importing this package imports torch and triton. With TRITON_INTERPRET=1 in the environment, set before triton is
imported, the kernels run through Triton's interpreter on CPU tensors. No operation waits for the device or asks it
anything: numbers of rows that only the device knows stay there, as int32, and grids have the size of what could be.
Values on the device (slots, row numbers) are therefore not checked; shapes, types and places are.
"""

from flashrt_kernels.gpu.attention import attention_list
from flashrt_kernels.gpu.blocks import select_blocks
from flashrt_kernels.gpu.gather import gather_rows
from flashrt_kernels.gpu.glu import glu_rows, workspace
from flashrt_kernels.gpu.key_labels import KeyLabels, kv_append
from flashrt_kernels.gpu.layer_rows import LayerRows
from flashrt_kernels.gpu.row_list import RowList
from flashrt_kernels.gpu.select import select_rows
from flashrt_kernels.gpu.slot_map import SlotMap
from flashrt_kernels.gpu.step import SparseStep

__all__ = [
    "KeyLabels",
    "LayerRows",
    "RowList",
    "SlotMap",
    "SparseStep",
    "attention_list",
    "gather_rows",
    "glu_rows",
    "kv_append",
    "select_blocks",
    "select_rows",
    "workspace",
]
