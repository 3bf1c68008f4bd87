"""Sizes of memory such as ``8GiB``, read and written."""

from __future__ import annotations

import re

UNITS = {
    prefix.lower() + suffix: base**power
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    for suffix, base in (("b", 1000), ("ib", 1024))
    if prefix or suffix == "b"
}
"""Bytes in each unit: B, KB, KiB, MB, MiB, ..."""

LARGEST_SIZE = 2**50


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``8GiB``, ``512 MiB``, ``6.5GB`` or ``1000000``.

    Raises:
        ValueError: if it is not a size, or less than a byte; the message quotes it.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    unit = UNITS.get(match[2] or "b") if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if not 0 < count <= LARGEST_SIZE:
        raise ValueError(
            "must be a size above 0 and up to 1024TiB, such as 8GiB, 512MiB or 6.5GB, "
            f"got {str(size)!r}"
        )
    return count


def format_size(size: int) -> str:
    """``size`` bytes in GiB or MiB."""
    return f"{size / 2**30:,.3f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
