"""Training at toy size: it learns, is sparse, and its checkpoint packs and scores alike."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.research.train_relu_lm import Penalty, WatchedReLU, main, rate_share

ROOT = Path(__file__).parents[3]
TOY = "--hidden 32 --layers 2 --heads 2 --ffn 100 --vocab 400 --context 64 --batch 8 --rate 1e-2 --device cpu"


def flashrt(*arguments: object) -> str:
    command = [sys.executable, "-m", "flashrt", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_a_toy_model_learns_and_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pack = tmp_path / "model", tmp_path / "pack"
    text = ["--text-dir", str(ROOT / "flashrt"), "--megabytes", "0.2"]
    main([str(out), *TOY.split(), *text, "--minutes", "0.04", "--threads", "1", "--zeros", "0.8"])
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["samples"]
    assert 1 < result["bigram_perplexity"] < result["unigram_perplexity"]
    assert 1 < result["perplexity"] < result["unigram_perplexity"]
    size = len((out / "held-out.txt").read_bytes())
    bits = result["held_out_tokens"] * math.log2(result["perplexity"]) / size
    assert result["bits_per_byte"] == pytest.approx(bits)
    assert result["bits_per_byte"] < result["unigram_bits_per_byte"]
    assert len(result["zero_share"]) == 2
    assert all(0.4 < share < 1 for share in result["zero_share"])
    held_out, calibration = (out / f"{name}.txt" for name in ("held-out", "calibration"))
    assert min(held_out.stat().st_size, calibration.stat().st_size) > 10000

    flashrt("pack", out, pack, "--dtype", "f32")
    report = json.loads(flashrt("eval", "ppl", pack, "--text-file", held_out, "--json").splitlines()[-1])
    assert report["tokens"] == result["held_out_tokens"]
    assert report["ppl"] == pytest.approx(result["perplexity"], rel=1e-4)


def test_the_penalty_follows_what_is_lacking() -> None:
    penalty, weights = Penalty(0.9), []
    for progress, zeros in [(0.1, 0.6), (1.0, 0.6), (1.0, 0.6), (1.0, 0.97)]:
        penalty.follow(progress, zeros)
        weights.append(penalty.weight)
    assert 0 < weights[0] < weights[1] < weights[2] > weights[3]
    none = Penalty(0.0)
    none.follow(1.0, 0.0)
    assert none.weight == 0


def test_the_pull_is_the_slope_of_a_penalty_on_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(7, 33, generator=generator), torch.randn(7, 33, generator=generator)
    watched, slopes = WatchedReLU(), []
    watched.pull = 0.7
    for penalised in (True, False):
        given = x.clone().requires_grad_()
        result = watched(given) if penalised else torch.relu(given)
        ((result * weights).sum() + (0 if penalised else 0.7 * result.mean())).backward()
        slopes.append(given.grad)
    torch.testing.assert_close(*slopes)
    assert float(watched.zeros) == pytest.approx(float((x <= 0).float().mean()))


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [rate_share(i / 1000) for i in range(1001)]
    top = shares.index(max(shares))
    assert shares[: top + 1] == sorted(shares[: top + 1])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert (shares[0], shares[top]) == (0, 1)
    assert 0 < shares[-1] < 0.1
