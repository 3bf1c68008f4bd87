"""Parametrisations that many tests share."""

import pytest

from support.compare import KINDS, MODES, SPATIAL

ALL_MODES = ("none", *MODES)

either_mode = pytest.mark.parametrize("recompute", MODES)
both_kinds = pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
all_dims = pytest.mark.parametrize("dims", SPATIAL)

# A test marked with a clause is a row of the matrix in docs/interop.md, in three modes, of which
# "none" is the naive path.
clause = pytest.mark.clause
every_mode = pytest.mark.parametrize("mode", ALL_MODES)
recomputing = pytest.mark.parametrize("mode", MODES)
