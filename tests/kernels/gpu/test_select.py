from __future__ import annotations

import pytest
import torch

from .helpers import gpu, listed, normal


@pytest.mark.parametrize("n", [1, 63, 1024, 1025, 3000])
@pytest.mark.parametrize("threshold", [-100.0, 0.5, 100.0])
def test_rows_above_the_threshold(device, n, threshold):
    scores = normal(1, n).to(device)
    selected = gpu.select_rows(scores, threshold)
    assert selected.items.dtype == selected.count.dtype == torch.int32
    assert listed(selected) == (scores > threshold).nonzero()[:, 0].tolist()


def test_a_row_at_the_threshold_is_not_above_it(device):
    scores = torch.tensor([0.25, 0.5, 0.75, -torch.inf, torch.inf], device=device)
    assert listed(gpu.select_rows(scores, 0.5)) == [2, 4]
    assert listed(gpu.select_rows(scores, -torch.inf)) == [0, 1, 2, 4]


def test_a_score_that_is_no_number_drops_nothing(device):
    scores = normal(1, 70).to(device) - 100
    scores[33] = torch.nan
    assert listed(gpu.select_rows(scores, 0.0)) == [33]
    assert listed(gpu.select_rows(scores, torch.nan)) == list(range(70))


def test_it_writes_where_it_is_told(device):
    scores, out = normal(1, 1500).to(device), gpu.RowList.empty(1500, device)
    assert gpu.select_rows(scores, 0.5, out) is out
    first = listed(out)
    gpu.select_rows(scores, 2.0, out)
    assert 0 < len(listed(out)) < len(first)


def test_wrong_arguments_are_named(device):
    scores = normal(1, 50).to(device)
    for wrong in (scores[None], scores.double(), scores[::2], scores[:0]):
        with pytest.raises(ValueError, match=r"^scores"):
            gpu.select_rows(wrong, 0.0)
    with pytest.raises(ValueError, match=r"^out"):
        gpu.select_rows(scores, 0.0, gpu.RowList.empty(49, device))


@pytest.mark.gpu
def test_real_sizes(cuda):
    scores = normal(1, 28672).to(cuda)
    for threshold in (-20.0, 1.5, 2.0, 20.0):
        assert listed(gpu.select_rows(scores, threshold)) == (scores > threshold).nonzero()[:, 0].tolist()
