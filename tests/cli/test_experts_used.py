"""--experts-used: a mixture with fewer experts a token computes what a config that says so does, and is told apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashrt.engine.options import LoadOptions
from flashrt.errors import SessionError, UsageError
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tests.cli.conftest import Cli, check_failure
from tests.engine.support import logits_of, make_pack, relative_rms, tiny_engine
from tests.families import VOCAB, tiny_checkpoint, tiny_model

RUN = ("-p", "the", "-n", "3", "--threads", "1")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    return make_pack(tiny_checkpoint("glm4_moe", root / "checkpoint", seed=3)[1], root / "pack", Codec.F32).path


@pytest.mark.parametrize("experts", [1, 2])
def test_logits_are_those_of_a_config_that_says_so(mixture: Path, experts: int) -> None:
    random = np.random.default_rng(5)
    prompt, tokens = random.integers(3, VOCAB, 21).tolist(), random.integers(3, VOCAB, 8).tolist()
    with torch.no_grad():
        model = tiny_model("glm4_moe", seed=3, num_experts_per_tok=experts)
        expected = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :].numpy()
    found = []
    for share in (0.35, 1.0):
        with tiny_engine(Pack(mixture, experts=experts), share, chunk=16) as engine:
            found.append(logits_of(engine, prompt, tokens))
    assert relative_rms(found[0], expected) < 1e-4
    assert np.array_equal(*found)


def test_less_is_read(mixture: Path) -> None:
    with tiny_engine(Pack(mixture), 0.35) as all_of_them, tiny_engine(Pack(mixture, experts=1), 0.35) as one:
        assert one.plan.streamed_bytes_per_token < all_of_them.plan.streamed_bytes_per_token


def test_a_session_is_bound_to_it(mixture: Path, tmp_path: Path) -> None:
    file, ids = tmp_path / "session", list(range(3, 30))
    with tiny_engine(Pack(mixture, experts=1), 1.0) as one:
        list(one.generate(ids, 3, ignore_eos=True))
        one.save(file)
        assert one.resume(file) is None
    for experts in (None, 2):
        with (
            tiny_engine(Pack(mixture, experts=experts), 1.0) as other,
            pytest.raises(SessionError, match="use the --experts-used that it was saved with"),
        ):
            other.resume(file)


def test_as_many_as_the_model_names_change_nothing(mixture: Path) -> None:
    pack = Pack(mixture, experts=3)
    assert pack.fewer_experts is None
    assert pack.spec == pack.manifest.spec


def test_it_says_that_results_change(cli: Cli, mixture: Path, tmp_path: Path) -> None:
    result = cli("run", mixture, *RUN, "--experts-used", "2")
    assert result.returncode == 0
    assert "note: 2 experts a token, of the 3 that the model was trained with" in result.stderr
    assert "note:" not in cli("run", mixture, *RUN, "--experts-used", "3").stderr
    text = tmp_path / "text"
    text.write_text("the and then the other " * 20)
    costs = [
        json.loads(cli("eval", "ppl", mixture, "--text-file", text, "--ctx", 32, *more, "--json").stdout)["ppl"]
        for more in ((), ("--experts-used", "1"))
    ]
    assert costs[0] != costs[1]


def test_what_cannot_be_used_is_refused(cli: Cli, pack: Path, mixture: Path) -> None:
    check_failure(cli("run", mixture, *RUN, "--experts-used", "4"), 2, "--experts-used 4", "names 3 experts")
    check_failure(cli("run", pack, *RUN, "--experts-used", "1"), 2, "--experts-used 1", "no mixture of experts")
    for value in (0, -1, 1.5, True, "2"):
        with pytest.raises(UsageError, match="--experts-used"):
            LoadOptions(experts_used=value)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--max-loss cannot be promised with --experts-used"):
        LoadOptions(experts_used=2, kv="sparse", max_loss=0.1)


def test_inspect_tells_of_mixtures_behind_dense_layers(cli: Cli, mixture: Path) -> None:
    shown = cli("inspect", mixture).stdout
    assert "3 of 24 neurons, 12 experts (3 per token, and one of 48 for all) in 2 layers" in shown
