"""--rope-scaling raises the context that is supported, and says what it replaces."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Cli, check_failure
from tests.families import tiny_checkpoint

RUN = ("-p", "the", "-n", "3", "--threads", "1")


def test_a_context_beyond_the_trained_one_needs_scaling(cli: Cli, pack: Path) -> None:
    check_failure(cli("run", pack, *RUN, "--context", "1000"), 2, "at most 256", "--rope-scaling")
    assert cli("run", pack, *RUN, "--context", "1000", "--rope-scaling", "yarn:4").returncode == 0
    check_failure(cli("run", pack, *RUN, "--context", "1025", "--rope-scaling", "yarn:4"), 2, "at most 1024")


def test_a_yarn_config_is_its_own_scaling_and_is_replaced_with_a_note(cli: Cli, tmp_path: Path) -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    checkpoint = tiny_checkpoint("llama", tmp_path / "yarn", rope_parameters=parameters)[1]
    kept = cli("run", checkpoint, *RUN, "--context", "1024")
    assert (kept.returncode, "note:" in kept.stderr) == (0, False)
    replaced = cli("run", checkpoint, *RUN, "--context", "2000", "--rope-scaling", "linear:8")
    assert replaced.returncode == 0
    assert "note: --rope-scaling linear:8 replaces the model's own scaling (yarn, up to 1024" in replaced.stderr
