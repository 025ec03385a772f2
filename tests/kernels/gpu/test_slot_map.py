from __future__ import annotations

import random

import pytest
import torch

from .helpers import gpu, listed, row_list


def bring(slot_map: gpu.SlotMap, rows: list[int], device: str) -> tuple[list[int], list[int], list[int]]:
    """Split and place `rows`: the slots that were hit, the rows that missed, and the slots that these got."""
    room = len(slot_map.row_of)
    wanted, hits, misses = (
        row_list(rows, device, room),
        gpu.RowList.empty(room, device),
        gpu.RowList.empty(room, device),
    )
    out = torch.full((room,), -7, dtype=torch.int32, device=device)
    slot_map.split(wanted, hits, misses)
    slot_map.place(misses, out)
    missed = listed(misses)
    assert (out[len(missed) :] == -7).all()
    return listed(hits), missed, out[: len(missed)].tolist()


def test_hits_and_misses_keep_the_order_of_rows(device):
    slot_map = gpu.SlotMap.empty(20, 6, device)
    assert bring(slot_map, [3, 8, 11], device) == ([], [3, 8, 11], [0, 1, 2])
    assert bring(slot_map, [2, 8, 9, 11], device) == ([1, 2], [2, 9], [3, 4])
    assert bring(slot_map, [], device) == ([], [], [])
    assert slot_map.row_of.tolist() == [3, 8, 11, 2, 9, -1]


def test_the_hand_passes_over_what_is_needed(device):
    slot_map = gpu.SlotMap.empty(20, 4, device)
    bring(slot_map, [0, 1, 2, 3], device)
    assert bring(slot_map, [0, 2, 10], device) == ([0, 2], [10], [1])
    assert bring(slot_map, [0, 2, 11], device) == ([0, 2], [11], [3])
    assert bring(slot_map, [5, 6, 7, 11], device) == ([3], [5, 6, 7], [0, 1, 2])
    assert slot_map.slot_of.tolist() == [-1] * 5 + [0, 1, 2] + [-1] * 3 + [3] + [-1] * 8


@pytest.mark.parametrize(("rows", "slots"), [(50, 1), (50, 17), (50, 50), (3000, 1100)])
def test_random_traces(device, rows, slots):
    """Whatever is asked for: each row has one slot, each slot one row, and what was hit stays where it was."""
    chance, slot_map = random.Random(1), gpu.SlotMap.empty(rows, slots, device)
    for _ in range(8):
        wanted = sorted(chance.sample(range(rows), chance.randint(0, slots)))
        before = slot_map.slot_of.tolist()
        hits, missed, placed = bring(slot_map, wanted, device)
        assert hits == [before[row] for row in wanted if before[row] >= 0]
        assert missed == [row for row in wanted if before[row] < 0]
        slot_of, row_of = slot_map.slot_of.tolist(), slot_map.row_of.tolist()
        assert [slot_of[row] for row in missed] == placed
        assert [slot_of[row] for row in wanted if before[row] >= 0] == hits
        assert {slot: row for row, slot in enumerate(slot_of) if slot >= 0} == {
            slot: row for slot, row in enumerate(row_of) if row >= 0
        }
        found = torch.full((slots,), -7, dtype=torch.int32, device=device)
        slot_map.find(row_list(wanted, device, slots), found)
        assert found.tolist() == [slot_of[row] for row in wanted] + [-7] * (slots - len(wanted))


def test_more_rows_than_slots_are_refused(device):
    slot_map = gpu.SlotMap.empty(20, 6, device)
    with pytest.raises(ValueError, match=r"^rows: expected room for 1 to 6 items, found 7"):
        slot_map.split(gpu.RowList.empty(7, device), gpu.RowList.empty(7, device), gpu.RowList.empty(7, device))
    with pytest.raises(ValueError, match=r"^misses"):
        slot_map.split(gpu.RowList.empty(6, device), gpu.RowList.empty(6, device), gpu.RowList.empty(5, device))
    with pytest.raises(ValueError, match=r"^slots"):
        gpu.SlotMap.empty(20, 21, device)


@pytest.mark.gpu
def test_real_sizes(cuda):
    test_random_traces(cuda, 28672, 11264)
