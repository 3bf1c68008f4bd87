"""Judges in the precision that is timed: is a competitor as near to float64 as the naive model?"""

from __future__ import annotations

import torch

from benchmarks.cases import NAIVE, Case, Competitor, Subject
from benchmarks.instruments import check, coarse, relative_error

FACTOR = 2.0
"""How much further from the truth than the naive model a competitor may be, on one draw."""
SLACK = 8
"""What is allowed besides, in units of the type's epsilon."""


class PrecisionJudge:
    """Compares with float64 on a small batch, and the timed step with that of who was right first.

    With ``e`` the naive model's own error against float64, a competitor's may be ``FACTOR * e``
    plus slack; two timed steps, each that near to the truth, may differ by twice as much.
    """

    def __init__(self, case: Case, batch: int) -> None:
        self._case, self._batch = case, batch
        self._truth = coarse(case.small_subject(NAIVE, batch))
        naive = coarse(case.small_subject(NAIVE, batch, None))
        slack = SLACK * torch.finfo(case.precision).eps
        self.errors = {name: relative_error(naive[name], self._truth[name]) for name in naive}
        self._allowed = {name: FACTOR * error + slack for name, error in self.errors.items()}
        self._first: dict[str, torch.Tensor] | None = None

    def before(self, competitor: Competitor) -> str | None:
        found = coarse(self._case.small_subject(competitor, self._batch, None))
        return check(found, self._truth, self._allowed)

    def after(self, subject: Subject) -> str | None:
        found = coarse(subject)
        self._first = self._first or found
        return check(found, self._first, {name: 2 * error for name, error in self._allowed.items()})
