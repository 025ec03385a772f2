"""The claims of all kinds of FFN: a new kind that wants memory of its own is added here."""

from __future__ import annotations

from collections.abc import Callable

from flashrt.budget.claims.adaptive import AdaptiveClaim
from flashrt.budget.claims.base import Case, Claim
from flashrt.budget.claims.experts import ExpertClaim
from flashrt.budget.claims.rows import RowClaim

CLAIMS: tuple[Callable[[Case], Claim], ...] = (RowClaim, AdaptiveClaim, ExpertClaim)
