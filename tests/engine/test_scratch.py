"""The scratch of a pass is enough for every shorter pass: the last chunk of a prompt has any length."""

from __future__ import annotations

import pytest

from flashrt.model.workspace import scratch_bytes
from flashrt.storage.layout import pack_layout
from flashrt_kernels import ops
from flashrt_kernels.rows import Codec
from tools.make_synthetic_pack import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_shorter_pass_never_needs_more(preset: str) -> None:
    kernels, spec = ops.load("cpu"), PRESETS[preset].spec()
    attention = next(iter(spec.attentions.values()))
    longest = [scratch_bytes(spec, pack_layout(spec, Codec.INT4), kernels, tokens) for tokens in (1, 16, 32, 64, 128)]
    assert longest == sorted(longest)
    for count in range(1, 129):
        needed = kernels.attention_scratch_bytes(count, attention.heads, attention.kv_heads, attention.head_dim)
        assert needed <= longest[-1]
