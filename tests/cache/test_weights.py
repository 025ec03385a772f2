"""What is loaded before the first token is checked like everything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flashrt.errors import PackError
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import tiny_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    _, checkpoint = tiny_checkpoint("qwen2", root / "checkpoint")
    return make_pack(checkpoint, root / "pack", Codec.INT8).path


@pytest.mark.parametrize("name", ["norm.final", "0.norm.attention", "1.norm.ffn", "0.qkv.bias"])
@pytest.mark.parametrize("end", [0, -1], ids=["first byte", "last byte"])
def test_a_flipped_bit_in_a_vector_is_found_when_it_is_loaded(whole: Path, tmp_path: Path, name: str, end: int) -> None:
    damaged = shutil.copytree(whole, tmp_path / "damaged")
    vector = Pack(damaged).layout.vectors[name]
    at = vector.offset + (end % (4 * vector.length))
    raw = bytearray((damaged / vector.file).read_bytes())
    raw[at] ^= 1
    (damaged / vector.file).write_bytes(bytes(raw))
    with pytest.raises(PackError, match=rf"{vector.file} is damaged: its vectors"):
        tiny_engine(Pack(damaged), 0.3)


def test_whole_vectors_are_loaded(whole: Path) -> None:
    tiny_engine(Pack(whole), 0.3).close()
