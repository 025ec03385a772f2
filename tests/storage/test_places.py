"""Where a file has weights, as an outline's manifest says it: read, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt.arch import Part
from flashrt.checkpoints.pack_job import cached_outline
from flashrt.errors import PackError
from flashrt.storage.layout import Turned
from flashrt.storage.manifest import MANIFEST_FILE, _checksum
from flashrt.storage.pack import Pack
from flashrt.storage.sources.checkpoint import _unpermute
from tests.kept import CASES


@pytest.fixture(scope="module")
def outline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("places")
    return cached_outline(str(CASES["plain"].write(root / "m.gguf")), root / "cache", lambda *_: None)


@pytest.mark.parametrize(
    ("heads", "each", "rotary", "fixed"), [(3, 10, 10, 0), (2, 12, 8, 0), (1, 6, 2, 0), (3, 10, 4, 6), (2, 9, 4, 3)]
)
def test_permuted_rows_stand_where_a_checkpoint_reads_them(heads: int, each: int, rotary: int, fixed: int) -> None:
    count = heads * each
    places = Turned(heads, rotary, fixed).places(count)
    part = Part("x", heads=heads, rotary=rotary, fixed=fixed)
    expected = _unpermute(np.arange(count, dtype=np.uint8)[:, None], heads, part)[:, 0]
    found = np.empty(count, np.uint8)
    found[places] = np.arange(count)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.update(files=0), "weights in 0 files"),
        (lambda p: p.update(files="1"), "weights in '1' files"),
        (lambda p: p["tensors"].update({"9.ffn": [[0, 0, 1, 1, 0, 0]]}), "9.ffn is no tensor"),
        (lambda p: p["tensors"].update({"0.ffn": []}), "0.ffn lies in rows of other sizes"),
        (lambda p: p["tensors"]["0.ffn"][0].__setitem__(0, 1), "0.ffn has a place that cannot be"),
        (lambda p: p["tensors"]["0.ffn"][0].__setitem__(1, -1), "0.ffn has a place that is no whole number"),
        (lambda p: p["tensors"]["0.ffn"][0].__setitem__(2, 7), "0.ffn lies in rows of other sizes"),
        (lambda p: p["tensors"]["0.ffn"][0].__setitem__(4, 7), "0.ffn lies in more places than are read"),
        (lambda p: p["tensors"]["embed"][0].__setitem__(5, 2), "embed has a place that cannot be"),
        (lambda p: p["tensors"]["0.ffn"][0].append(1), "is damaged"),
        (lambda p: p["tensors"]["embed"][0].__setitem__(1, 1 << 40), "does not fit the files"),
    ],
)
def test_places_that_cannot_be_are_refused(
    outline: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    for file in outline.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    body = json.loads((outline / MANIFEST_FILE).read_bytes())
    body.pop("checksum")
    change(body["places"])
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(body | {"checksum": _checksum(body)}))
    with pytest.raises(PackError, match=says):
        Pack(tmp_path)
