"""What was converted and what was not, module by module, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One module that was recognised.

    Attributes:
        path: its name in the model, as ``named_modules`` says it.
        kind: ``"dense block"``, ``"transition"``, ``"stem"`` or ``"sequence"``.
        class_name: the name of its class.
        converted: whether it recomputes.
        reason: why not, ``None`` if it does or would.
    """

    path: str
    kind: str
    class_name: str
    converted: bool
    reason: str | None = None

    @property
    def state(self) -> str:
        """In words: what was done, or what would be."""
        if self.reason:
            return f"not converted: {self.reason}"
        return "recomputes" if self.converted else "naive, can be converted"


@dataclass(frozen=True)
class Report:
    """Findings in the order of ``named_modules``; its text is a table."""

    findings: tuple[Finding, ...]

    @property
    def replaced(self) -> tuple[Finding, ...]:
        """The modules that recompute."""
        return tuple(f for f in self.findings if f.converted)

    @property
    def left(self) -> tuple[Finding, ...]:
        """The modules that do not, and say why."""
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
        rows = [("module", "kind", "class", "state")]
        rows += [(f.path or "(the model)", f.kind, f.class_name, f.state) for f in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
