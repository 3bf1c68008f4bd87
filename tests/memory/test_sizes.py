"""Sizes are read as people write them, and what is none is refused."""

from __future__ import annotations

import re

import pytest

from efficient_densenet.memory.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("512 mib", 512 * 2**20),
        ("6.5GB", 6_500_000_000),
        ("1000", 1000),
        ("3b", 3),
        ("1024TiB", 2**50),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["8GBB", "0", "0.0001B", "-1GiB", "GiB", "", "1e9", "nan", "1,5GB", "1025TiB", "8G"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^must be a size .*8GiB.*{re.escape(repr(text))}$"):
        parse_size(text)


def test_size_is_written_in_unit_that_suits_it() -> None:
    assert [format_size(size) for size in (3 << 19, 3 << 29)] == ["1.5 MiB", "1.500 GiB"]
