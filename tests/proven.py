"""What the tests prove of families, written down by themselves: `mllm_edge/export/proven.json` is what passed.

A test records it; at the end of a run of the whole suite that passed, it must be what the file says.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["FILE", "KINDS", "Proven", "proves_with"]

FILE = Path(__file__).parents[1] / "mllm_edge" / "export" / "proven.json"
KINDS = ("components", "precisions", "targets")
_PROPERTY = "proven"
# (family, kind, values)
Proves = Callable[[str, str, Iterable[str]], None]


def proves_with(record_property: Callable[[str, object], None]) -> Proves:
    """What a test calls to say what it proves."""

    def proves(family: str, kind: str, values: Iterable[str]) -> None:
        assert kind in KINDS
        for value in values:
            record_property(_PROPERTY, f"{family} {kind} {value}")

    return proves


class Proven:
    """A plugin that gathers what passed, in the process that gets all reports."""

    def __init__(self, config: pytest.Config):
        self._config, self._found = config, set[tuple[str, ...]]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._found |= {tuple(str(v).split()) for name, v in report.user_properties if name == _PROPERTY}

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """In a run of everything that passed the file must say what was found; else what it should say is beside it."""
        option = self._config.option
        whole = self._config.args_source is pytest.Config.ArgsSource.TESTPATHS
        if exitstatus or not whole or option.keyword or option.markexpr or option.collectonly or option.quick:
            return
        found = self.as_json()
        if found != FILE.read_text(encoding="utf-8"):
            other = self._config.rootpath / "build" / FILE.name
            other.parent.mkdir(exist_ok=True)
            other.write_text(found, encoding="utf-8")
            print(f"\n{FILE} is not what the tests prove: cp {other} {FILE}; python scripts/families.py")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def as_json(self) -> str:
        """Family → kind → values, in order."""
        content: dict[str, dict[str, Any]] = {}
        for family, kind, value in sorted(self._found):
            content.setdefault(family, {}).setdefault(kind, []).append(value)
        return json.dumps(content, indent=1) + "\n"
