"""Packs that keep the codecs of their file: the file's results, and the same bits however they are computed."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.config import Sampling
from flashrt.errors import UnsupportedModelError
from flashrt_kernels import cpu
from flashrt_kernels.rows import Codec
from tests.engine.support import TorchRuntime, logits_of, make_pack, relative_rms, tiny_engine
from tests.engine.test_tree import PARENTS, along_paths
from tests.families import VOCAB
from tests.kept import CASES, keep
from tests.kernels.helpers import HALF_GEMM

STEPS = 20


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(pack that keeps a file, pack of its weights in float32, prompt, tokens)."""
    root = tmp_path_factory.mktemp(request.param)
    path = CASES[request.param].write(root / "model.gguf")
    random = np.random.default_rng(5)
    prompt, tokens = random.integers(3, VOCAB, 29).tolist(), random.integers(3, VOCAB, STEPS).tolist()
    return keep(path, root / "kept"), make_pack(path, root / "float", Codec.F32), prompt, tokens


@pytest.mark.parametrize("prompt_tokens", [29, 9])  # a wide prefill and a narrow one
def test_logits_are_those_of_the_files_weights(case, prompt_tokens):
    """Nearly: keys and values of a float32 pack have float32 too, those of others bfloat16."""
    kept, exact, prompt, tokens = case
    prompt = prompt[:prompt_tokens]
    found = []
    for packed, runtime in ((exact, None), (kept, None), (kept, TorchRuntime())):
        with tiny_engine(packed, 1.0, runtime, chunk=16) as engine:
            found.append(logits_of(engine, prompt, tokens))
    assert relative_rms(found[1], found[0]) < 3e-2
    assert relative_rms(found[1], found[2]) < (2e-2 if cpu.isa() in HALF_GEMM else 1e-2)  # which rounds wide passes


@pytest.mark.parametrize("prompt_tokens", [29, 9])
def test_streamed_is_resident(case, prompt_tokens):
    kept, _, prompt, tokens = case
    results = []
    for share, chunk in ((0.1, 16), (0.5, 16), (1.0, 16), (1.0, 32)):
        with tiny_engine(kept, share, chunk=chunk) as engine:
            assert engine.plan.resident == (share == 1.0)
            results.append(logits_of(engine, prompt[:prompt_tokens], tokens))
    assert all(np.array_equal(result, results[-1]) for result in results)


def test_a_tree_has_the_bits_of_its_paths(case):
    kept, _, prompt, tokens = case
    tree = tokens[: len(PARENTS)]
    with tiny_engine(kept, 1.0, chunk=16, logit_rows=16) as engine:
        expected = along_paths(engine, prompt, tree, PARENTS)
    with tiny_engine(kept, 0.4, chunk=16, logit_rows=16) as engine:
        engine.runner.prefill(engine.sequence, prompt)
        for count in (1, 7, 16):
            found = engine.runner.step_tree(engine.sequence, tree[:count], PARENTS[:count])
            assert np.array_equal(found, expected[:count])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)], ids=["greedy", "drawn"])
def test_drafts_change_nothing(case, sampling):
    """Groups of neurons change places, and drafts are computed with those that are resident."""
    kept, _, prompt, _ = case

    def written(engine):
        generation = engine.generate(prompt, 24, sampling, ignore_eos=True)
        list(generation)
        return generation.report.token_ids

    with tiny_engine(kept, 1.0, chunk=16) as engine:
        expected = written(engine)
    drafted = False
    for share, positions in ((0.4, 12), (0.7, 5)):
        with tiny_engine(kept, share, chunk=16, max_draft_tokens=positions) as engine:
            drafted = drafted or engine.plan.drafts
            assert written(engine) == expected
    assert drafted or kept.spec.layers[0].ffn.experts or kept.layout.tensors["0.ffn"].group == 1


def test_a_pack_that_keeps_formats_is_not_calibrated(case):
    from flashrt.calibration.methods import method_for
    from flashrt_kernels import ops

    with pytest.raises(UnsupportedModelError, match="pack the checkpoint with --dtype int4"):
        method_for(case[0], ops.load("cpu"))
