"""Routers: each field beside a plain reading of what it says, and ties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flashrt.model.ffn.router import route, sigmoid
from flashrt.spec import Ffn

FFN = Ffn(24, "silu", experts=12, experts_per_token=3)


def plain(logits: np.ndarray, ffn: Ffn, correction: np.ndarray | None) -> list[dict[int, float]]:
    """Expert → weight of each token, one token and one group after the other."""
    result = []
    for row in torch.from_numpy(logits).double():
        scores = row.sigmoid() if ffn.router_scores == "sigmoid" else row.softmax(0)
        worth = scores if correction is None else scores + torch.from_numpy(correction).double()
        groups = [group.tolist() for group in worth.chunk(ffn.router_groups)]
        order = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[: ffn.router_groups_used]
        each = ffn.experts // ffn.router_groups
        allowed = [e for e in range(ffn.experts) if e // each in order]
        chosen = sorted(allowed, key=lambda e: -float(worth[e]))[: ffn.experts_per_token]
        total = float(sum(scores[e] for e in chosen)) if ffn.normalize_router else 1.0
        result.append({e: float(scores[e]) / total * ffn.router_scale for e in chosen})
    return result


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (3, 1), (4, 4)])
def test_routers_do_what_their_fields_say(
    scores: str, normalize: bool, corrected: bool, groups: tuple[int, int]
) -> None:
    random = np.random.default_rng(3)
    logits = random.normal(size=(29, 12)).astype(np.float32) * 2
    correction = random.normal(size=12).astype(np.float32) * 0.3 if corrected else None
    ffn = replace(FFN, router_scores=scores, normalize_router=normalize, router_scale=1.7)
    ffn = replace(ffn, router_groups=groups[0], router_groups_used=groups[1])
    assert ffn.unsupported() is None
    chosen, weights = route(logits, ffn, correction)
    assert weights.dtype == np.float32
    for experts, own, expected in zip(chosen.tolist(), weights.tolist(), plain(logits, ffn, correction), strict=True):
        assert dict(zip(experts, own, strict=True)) == pytest.approx(expected, rel=1e-5)


def test_softmax_over_the_chosen_is_rescaled_softmax_over_all() -> None:
    logits = np.random.default_rng(4).normal(size=(17, 12)).astype(np.float32) * 3
    chosen, weights = route(logits, replace(FFN, normalize_router=True))
    expected = torch.from_numpy(np.take_along_axis(logits, chosen, 1)).softmax(1).numpy()
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_weights_are_multiplied_by_the_scales_of_their_experts() -> None:
    random = np.random.default_rng(5)
    logits, scales = random.normal(size=(17, 12)).astype(np.float32), random.normal(size=12).astype(np.float32)
    ffn = replace(FFN, normalize_router=True, expert_scales=True)
    chosen, plainly = route(logits, ffn)
    again, weights = route(logits, ffn, None, scales)
    assert np.array_equal(chosen, again)
    np.testing.assert_allclose(weights, plainly * scales[chosen], rtol=1e-6)


def test_ties_go_to_the_lower_index() -> None:
    chosen, _ = route(np.zeros((2, 12), np.float32), replace(FFN, router_groups=4, router_groups_used=2))
    assert chosen.tolist() == [[0, 1, 2]] * 2


def test_the_sigmoid_does_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(np.array([-200.0, -1.0, 0.0, 200.0], np.float32))
    np.testing.assert_allclose(found, [0, 0.26894143, 0.5, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"router_scores": "tanh"}, "scores by 'tanh'"),
        ({"router_groups": 5, "router_groups_used": 2}, "2 of 5 groups of 12"),
        ({"router_groups": 12, "router_groups_used": 4}, "4 of 12 groups"),
        ({"router_groups": 6, "router_groups_used": 1}, "3 experts of 1 groups of 2"),
        ({"shared_gate": True}, "a gate of a shared expert without one"),
        ({"experts": 0, "experts_per_token": 0, "shared": 8}, "what belongs to a router without one"),
    ],
)
def test_what_no_router_can_do_is_refused(change: dict[str, object], reason: str) -> None:
    assert reason in str(replace(FFN, **change).unsupported())  # type: ignore[arg-type]
