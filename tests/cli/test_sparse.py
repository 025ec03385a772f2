"""Sparse mode from the command line: calibrated, run, planned, compared; and refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli, check_failure
from tests.cli.test_commands import parsed
from tests.families import tiny_checkpoint

TEXT = "the thing and the ring are in the inn, and another thing is in the ring. " * 40


@pytest.fixture(scope="module")
def int4_pack(cli: Cli, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "tiny-int4"
    result = cli("pack", checkpoint, out, "--dtype", "int4")
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def calibrated(cli: Cli, int4_pack: Path, text: Path) -> Path:
    arguments = ("calibrate", int4_pack, "--text-file", text, "--max-loss", 0.5)
    result = parsed(cli(*arguments, "--json"))
    assert result["held_out_loss"] <= result["max_loss"] == 0.5
    assert len(result["layers"]) == len(result["figures"]["layers"]) == 3
    return int4_pack


def test_without_calibration_it_says_what_to_run(cli: Cli, pack: Path) -> None:
    result = cli("run", pack, "--mode", "sparse", "--prompt", "hello")
    check_failure(result, 2, "is not calibrated", f"flashrt calibrate {pack}")


def test_an_int8_pack_says_what_to_do(cli: Cli, pack: Path) -> None:
    check_failure(cli("calibrate", pack), 1, "--dtype int4")


def test_calibrate_ends_with_a_table(cli: Cli, calibrated: Path) -> None:
    result = cli("calibrate", calibrated, "--max-loss", 0.5, "--tokens", 768)
    assert result.returncode == 0, result.stderr
    for word in ("layer", "rows kept", "bytes", "predicted loss", "--mode sparse"):
        assert word in result.stdout


def test_run_reports_what_was_traded(cli: Cli, calibrated: Path) -> None:
    arguments = ("run", calibrated, "--prompt", "hello", "--max-new-tokens", 12, "--ignore-eos")
    report = parsed(cli(*arguments, "--mode", "sparse", "--json"))
    assert report["mode"] == "sparse"
    assert report["loss"] == 0.5
    assert 0 < report["ffn_rows_share"] < 1
    assert report["ffn_bytes_share"] > 0
    assert "sparse: loss below 50.0%" in cli(*arguments, "--mode", "sparse").stderr
    exact = parsed(cli(*arguments, "--json"))
    assert exact["mode"] == "exact"
    assert exact["loss"] is exact["ffn_bytes_share"] is exact["heads_share"] is report["heads_share"] is None


def test_a_smaller_loss_than_calibrated_is_refused(cli: Cli, calibrated: Path) -> None:
    arguments = ("run", calibrated, "--mode", "sparse", "--prompt", "hello", "--max-loss")
    check_failure(cli(*arguments, 0.01), 2, "calibrated for a loss of 50.00%", "--max-loss 0.01")
    assert cli(*arguments, 0.5, "-n", 2).returncode == 0
    check_failure(cli("run", calibrated, "--prompt", "hello", "--max-loss", 0.5), 2, "--max-loss needs --mode sparse")


def test_plan_says_whether_it_pays(cli: Cli, calibrated: Path) -> None:
    plan = parsed(cli("plan", calibrated, "--mode", "sparse", "--json"))
    assert plan["mode"] == "sparse"
    assert plan["pays"] is True


def test_eval_quality_compares(cli: Cli, calibrated: Path, text: Path) -> None:
    arguments = ("eval", "quality", calibrated, "--text-file", text, "--max-tokens", 200, "--ctx", 64)
    result = parsed(cli(*arguments, "--json"))
    keys = {"ppl_exact", "ppl_sparse", "kl_mean", "kl_max", "top1_agreement", "rows_share", "ffn_bytes_share"}
    assert set(result) >= keys | {"predictor_bytes_share", "recall", "precision", "layers"}
    assert result["kl_max"] >= result["kl_mean"] > 0
    assert 0 < result["recall"] <= 1
    assert result["ppl_sparse"] / result["ppl_exact"] - 1 == pytest.approx(result["loss"])
    for word in ("recall", "perplexity", "divergence", "touched"):
        assert word in cli(*arguments).stdout


def test_eval_quality_draws(cli: Cli, calibrated: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("eval", "quality", calibrated, "--text-file", text, "--max-tokens", 100, "--ctx", 64, "--plot")
    assert cli(*arguments, tmp_path / "plot.png").returncode == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    check_failure(cli(*arguments, tmp_path / "plot.doc"), 2, "plot.doc cannot be drawn")


def test_relu_models_are_read_row_by_row(cli: Cli, text: Path, tmp_path: Path) -> None:
    _, checkpoint = tiny_checkpoint("opt", tmp_path / "opt", ffn_dim=700)
    pack = tmp_path / "pack"
    assert cli("pack", checkpoint, pack, "--dtype", "int8").returncode == 0
    result = cli("calibrate", pack, "--text-file", text, "--max-loss", 0.9)
    assert result.returncode == 0, result.stderr
    for word in ("rows kept", "heads kept", "recall", "predictor", "predicted loss"):
        assert word in result.stdout
    report = parsed(cli("run", pack, "--mode", "sparse", "--prompt", "hello", "-n", 6, "--ignore-eos", "--json"))
    assert 0 < report["ffn_rows_share"] < report["ffn_bytes_share"]
    assert report["heads_share"] == report["row_hit_rate"] == 1
    assert report["plan"]["owners"]["predictors"] > 0
    arguments = ("eval", "quality", pack, "--text-file", text, "--max-tokens", 200, "--ctx", 64)
    quality = parsed(cli(*arguments, "--json"))
    assert quality["method"] == "rows"
    assert quality["heads_share"] == 1
    assert 0 < quality["predictor_bytes_share"] < quality["ffn_bytes_share"]
    for word in ("recall", "predictor", "of the neurons"):
        assert word in cli(*arguments).stdout


def test_eval_quality_without_calibration_is_refused_at_once(cli: Cli, pack: Path, text: Path) -> None:
    check_failure(cli("eval", "quality", pack, "--text-file", text), 2, "flashrt calibrate")


def test_perplexity_of_either_mode(cli: Cli, calibrated: Path, text: Path) -> None:
    arguments = ("eval", "ppl", calibrated, "--text-file", text, "--max-tokens", 200, "--ctx", 64, "--as-decoded")
    exact = parsed(cli(*arguments, "--json"))
    sparse = parsed(cli(*arguments, "--mode", "sparse", "--json"))
    assert sparse["ppl"] != exact["ppl"]


def test_a_damaged_calibration_is_named(cli: Cli, calibrated: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "pack"
    shutil.copytree(calibrated, copy)
    target = copy / "sparse" / "layer-001.safetensors"
    data = bytearray(target.read_bytes())
    data[len(data) // 3] ^= 0x40
    target.write_bytes(bytes(data))
    result = cli("run", copy, "--mode", "sparse", "--prompt", "hello")
    check_failure(result, 1, "layer-001.safetensors is damaged")
