"""A trace that does something in the midst of a call."""

from collections.abc import Callable
from typing import Any

from mllm_edge.runtime.trace import Trace

__all__ = ["Hook"]


class Hook(Trace):
    """Calls `act` when the stage `name` begins, for the n-th time."""

    def __init__(self, name: str, act: Callable[[], Any], n: int = 1):
        super().__init__()
        self._name, self._act, self._left = name, act, n

    def span(self, name: str) -> Any:
        if name == self._name:
            self._left -= 1
            if self._left == 0:
                self._act()
        return super().span(name)
