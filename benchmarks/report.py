"""The one form in which benchmarks report: a table for people, JSON for machines."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mllm_edge.runtime.machine.cpu import cpu_name, physical_cores

__all__ = ["Check", "Report"]


@dataclass(frozen=True)
class Check:
    """One figure against its target, both in the unit that the name tells."""

    name: str
    value: float
    target: float
    ok: bool


@dataclass
class Report:
    """Rows of figures and the checks made on them; `on_row` is called after each row."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    on_row: Callable[[], None] = lambda: None

    def row(self, row: dict[str, Any]) -> None:
        """Add a row that took long enough to be kept at once."""
        self.rows.append(row)
        self.on_row()

    def at_most(self, name: str, value: float, target: float) -> None:
        """Check value ≤ target."""
        self.checks.append(Check(name, value, target, value <= target))

    def at_least(self, name: str, value: float, target: float) -> None:
        """Check value ≥ target."""
        self.checks.append(Check(name, value, target, value >= target))

    def print(self) -> None:
        """The rows as a table, then the checks."""
        print(f"{self.title} — {cpu_name()}, {physical_cores()} cores")
        if self.rows:
            print(_table(self.rows))
        for check in self.checks:
            print(f"{'ok  ' if check.ok else 'MISS'} {check.name}: {check.value:.4g} (target {check.target:.4g})")

    def write(self, path: Path) -> None:
        """machine, rows and checks as JSON."""
        machine = {"processor": cpu_name(), "cores": physical_cores()}
        data = {"machine": machine, "rows": self.rows, "checks": [asdict(check) for check in self.checks]}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
