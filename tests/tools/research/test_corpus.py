"""Text for training: nothing twice, nothing of the held-out text in the rest, the same wherever the files lie."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from tools.research.corpus import Corpus, collect

LICENCE = "Permission is hereby granted, free of charge, to any person who obtains a copy of this text."


def write_files(root: Path, count: int = 60) -> Path:
    """Files of ten paragraphs of random words each; all end with the same one."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for i in range(count):
        words = rng.integers(0, 1 << 30, (10, 15))
        text = "\n\n".join([*(" ".join(f"{word:x}" for word in line) for line in words), LICENCE])
        (root / f"file{i}.py").write_text(text)
    return root


def everything(corpus: Corpus) -> list[str]:
    return [*corpus.held_out, *corpus.calibration, *corpus.train]


def test_files_are_split(tmp_path: Path) -> None:
    root = write_files(tmp_path / "a")
    corpus = collect([root], 1 << 20)
    assert len(everything(corpus)) == 60
    assert 5 <= len(corpus.held_out) <= 8
    assert 5 <= len(corpus.calibration) <= 8
    assert sum(text.count(LICENCE) for text in everything(corpus)) == 1
    assert LICENCE in corpus.held_out[0]
    assert corpus == collect([write_files(tmp_path / "elsewhere" / "b")], 1 << 20)


def test_a_limit_takes_fewer(tmp_path: Path) -> None:
    root = write_files(tmp_path / "a")
    whole, part = everything(collect([root], 1 << 20)), everything(collect([root], 20000))
    assert 20000 <= sum(map(len, part)) < 22000
    assert part == whole[: len(part)]


def test_what_is_no_text_is_left_out(tmp_path: Path) -> None:
    root = write_files(tmp_path / "a")
    expected = everything(collect([root], 1 << 20))
    (root / "binary.txt").write_bytes(np.random.default_rng(1).bytes(5000))
    (root / "broken.txt.gz").write_bytes(np.random.default_rng(1).bytes(5000))
    (root / "numbers.csv").write_text("1,2,3\n" * 1000)
    (root / "short.txt").write_text("Too short.")
    (root / "table.txt").write_text("0123456789\n" * (1 << 17))
    assert everything(collect([root], 1 << 20)) == expected


def test_compressed_documentation_is_read(tmp_path: Path) -> None:
    root = write_files(tmp_path / "a")
    text = " ".join(f"sentence {i} of a story." for i in range(50))
    (root / "README.gz").write_bytes(gzip.compress(text.encode()))
    assert text in everything(collect([root], 1 << 20))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="0 bytes of text are too few"):
        collect([tmp_path], 1 << 20)
