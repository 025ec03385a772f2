"""The ledger: nobody gets more than the plan says; what it hands out is zeroed, page-aligned and not yet resident."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrt.budget.ledger import Ledger, populate
from flashrt.errors import BudgetError
from flashrt.machine.process import resident_bytes

MIB = 1 << 20


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.uint16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (63, 123), (0,), (4, 0)])
def test_memory_is_zeroed_and_aligned(shape: tuple[int, ...], dtype: type) -> None:
    array = Ledger({"weights": 1 << 20}).allocate("weights", shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert array.flags.writeable
    assert not array.any()
    if array.size:
        assert array.ctypes.data % mmap.PAGESIZE == 0


def test_a_grant_can_be_used_up_exactly() -> None:
    ledger = Ledger({"KV": 4096, "weights": 10})
    ledger.allocate("KV", (1024,), np.uint16)
    ledger.allocate("KV", (512,), np.float32)
    with pytest.raises(BudgetError, match=r"KV asks for 1 bytes and its plan has 0 left"):
        ledger.charge("KV", 1)
    ledger.charge("weights", 10)  # another owner's grant is its own


def test_an_owner_that_is_not_planned_gets_nothing() -> None:
    ledger = Ledger({"KV": 4096})
    with pytest.raises(BudgetError, match="cache asks for 8"):
        ledger.allocate("cache", (2,), np.float32)


def test_memory_that_the_system_refuses_is_a_budget_error() -> None:
    ledger = Ledger({"KV": 1 << 48})  # more than a process can address
    with pytest.raises(BudgetError, match=r"refuses 262144\.000 GiB of memory for KV \(Cannot allocate memory\)"):
        ledger.allocate("KV", (1 << 48,), np.uint8)


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 100)),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60))),
)
def test_against_a_dictionary(grants: dict[str, int], charges: list[tuple[str, int]]) -> None:
    ledger, left = Ledger(grants), dict(grants)
    for owner, nbytes in charges:
        if nbytes <= left.get(owner, 0):
            ledger.charge(owner, nbytes)
            left[owner] = left.get(owner, 0) - nbytes
        else:
            with pytest.raises(BudgetError, match=owner):
                ledger.charge(owner, nbytes)


def test_memory_becomes_resident_when_populated_and_goes_when_dropped() -> None:
    ledger = Ledger({"weights": 64 * MIB})
    before = resident_bytes()
    array = ledger.allocate("weights", (64 * MIB,), np.uint8)
    assert resident_bytes() - before < 8 * MIB
    populate(array)
    assert resident_bytes() - before > 56 * MIB
    del array
    assert resident_bytes() - before < 8 * MIB
