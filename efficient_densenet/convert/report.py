"""What was converted and what was not, module by module, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One module that was recognised.

    Attributes:
        path: the module's name in the model, as in ``named_modules``.
        kind: ``"dense block"``, ``"transition"``, ``"stem"``, ``"norm of a stem"`` or
            ``"sequence"``.
        class_name: the name of the module's class.
        converted: whether it was converted, or is a module of this package.
        reason: why it does not recompute, or would not; ``None`` if it does or would.
        run_again: for each layer with parts that the backward pass runs again by autograd, why.
        naive_bytes: bytes that a call of the naive module keeps for the backward pass, its result
            included but neither its input nor parameters; ``None`` if no input was given.
        kept_bytes: the same for the module as it is, or as it would be after a conversion.
    """

    path: str
    kind: str
    class_name: str
    converted: bool
    reason: str | None = None
    run_again: tuple[str, ...] = ()
    naive_bytes: int | None = None
    kept_bytes: int | None = None

    @property
    def state(self) -> str:
        """What the module does, or could do, in words; with the reason if it is naive."""
        if self.reason:
            return f"{'naive' if self.converted else 'not converted'}: {self.reason}"
        if not self.converted:
            return "naive, can be converted"
        if self.run_again:
            return f"recomputes; {len(self.run_again)} layers are run again: {self.run_again[0]}"
        return "recomputes"

    def row(self) -> tuple[str, ...]:
        """Its cells in the table."""
        sizes = [_mebibytes(size) for size in (self.naive_bytes, self.kept_bytes)]
        return (self.path or "(the model)", self.kind, self.class_name, *sizes, self.state)


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"


@dataclass(frozen=True)
class Report:
    """What was recognised in a model, module by module. ``print`` shows it as a table.

    Iterating gives the findings; ``report[path]`` is that of one module, by its name in the model,
    and raises ``KeyError`` if nothing was recognised there.

    Attributes:
        findings: one :class:`Finding` for each recognised module, in the order of
            ``named_modules``.
    """

    findings: tuple[Finding, ...]

    @property
    def replaced(self) -> tuple[Finding, ...]:
        """The findings of modules that were converted, or are modules of this package."""
        return tuple(f for f in self.findings if f.converted)

    @property
    def left(self) -> tuple[Finding, ...]:
        """The findings of modules that do not recompute, or would not; each has a reason."""
        return tuple(f for f in self.findings if f.reason)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, path: str) -> Finding:
        """The finding of a module by its name.

        Raises:
            KeyError: if nothing was recognised there.
        """
        for finding in self.findings:
            if finding.path == path:
                return finding
        raise KeyError(path)

    def __str__(self) -> str:
        if not self.findings:
            return "no dense blocks, transitions or stems were recognised"
        header = ("module", "kind", "class", "naive MiB", "kept MiB", "state")
        columns = list(zip(header, *(finding.row() for finding in self), strict=True))
        columns = [column for column in columns if any(column[1:])]  # without an input, no sizes
        widths = [max(map(len, column)) for column in columns]
        rows = zip(*columns, strict=True)
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
