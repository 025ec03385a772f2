"""The FFN rows of one layer: all in host memory, some in slots on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashrt_kernels.gpu.arguments import check
from flashrt_kernels.gpu.gather import check_source
from flashrt_kernels.gpu.row_list import BLOCK
from flashrt_kernels.gpu.slot_map import SlotMap


@triton.jit(do_not_specialize=["slots"])
def _copy_bias_kernel(up_bias_ptr, slot_bias_ptr, row_of_ptr, slots, BLOCK: tl.constexpr):
    """slot_bias[slot] = up_bias[row_of[slot]] where a row is. Grid (blocks)."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of_ptr + slot, mask=slot < slots, other=-1)
    tl.store(slot_bias_ptr + slot, tl.load(up_bias_ptr + row, mask=row >= 0), mask=row >= 0)


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Bundles of one layer. A bundle in a slot is a copy of the one in `host`."""

    host: Tensor  # uint8 [neurons, stride], pinned, or on the device
    slots: Tensor  # uint8 [slots, stride] on the device
    slot_map: SlotMap
    up_bias: Tensor | None  # float32 [neurons] on the device
    slot_bias: Tensor | None  # float32 [slots]: up_bias of the rows in the slots

    @classmethod
    def create(cls, host: Tensor, slots: int, device: torch.device | str, up_bias: Tensor | None = None) -> LayerRows:
        """The bundles in `host`, with `slots` slots on `device`, all of them empty.

        Raises ValueError unless the device can read `host`, and for more slots than rows.
        """
        slot_map = SlotMap.empty(len(host), slots, device)
        place = slot_map.slot_of.device
        check_source("host", host, place)
        if up_bias is not None:
            check("up_bias", up_bias, torch.float32, (len(host),), place)
        return cls(
            host,
            torch.empty((slots, host.shape[1]), dtype=torch.uint8, device=place),
            slot_map,
            up_bias,
            None if up_bias is None else torch.empty(slots, dtype=torch.float32, device=place),
        )

    def refresh_bias(self) -> None:
        """slot_bias, after rows were placed."""
        if self.up_bias is not None:
            slots = len(self.slots)
            grid = (triton.cdiv(slots, BLOCK),)
            _copy_bias_kernel[grid](self.up_bias, self.slot_bias, self.slot_map.row_of, slots, BLOCK=BLOCK)
