"""Parametrisations that many tests share."""

import pytest

from efficient_densenet.kernels import whole
from support.compare import KINDS, MODES, SPATIAL

ALL_MODES = ("none", *MODES)

either_mode = pytest.mark.parametrize("recompute", MODES)
both_kinds = pytest.mark.parametrize("bn_size", KINDS.values(), ids=KINDS)
slabs_and_whole = pytest.mark.parametrize(
    "most_bytes", [0, whole.MOST_BYTES], indirect=True, ids=["slabs", "whole"]
)
all_dims = pytest.mark.parametrize("dims", SPATIAL)

# A test marked with a clause is a row of the matrix in docs/interop.md, in three modes, of which
# "none" is the naive path.
clause = pytest.mark.clause
every_mode = pytest.mark.parametrize("mode", ALL_MODES)
recomputing = pytest.mark.parametrize("mode", MODES)
