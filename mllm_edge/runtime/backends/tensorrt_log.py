"""What TensorRT says: one logger for the process, read by the operation that it is said in."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mllm_edge.runtime.log import logger

__all__ = ["Said", "log_of"]

_KEPT = 10
# Without a GPU, TensorRT for RTX complains about the missing driver at every turn; and our graphs do have int64 inputs.
_KNOWN = ("driver version is insufficient", "has Int64 binding")
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "bad_alloc", "memory allocation", "gpu memory")


@dataclass
class Said:
    """The latest errors and warnings, some of each, every one once, the newest last."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def last(self) -> str:
        """The last error."""
        return self.errors[-1] if self.errors else "it does not say why"

    @property
    def out_of_memory(self) -> bool:
        """Whether memory was not enough."""
        return any(word in line.lower() for line in self.errors for word in _OUT_OF_MEMORY)

    def add(self, kind: str, message: str) -> None:
        """`kind`: errors or warnings."""
        known = [text for text in getattr(self, kind) if text != message]
        setattr(self, kind, [*known[1 - _KEPT :], message])


@cache  # kept for good: TensorRT goes on with the first logger that it gets, whatever other objects bring
def log_of(trt: Any) -> Any:
    """The logger of a TensorRT module. It prints nothing; `errors` are the latest ones, `listening()` gives those of an
    operation alone, of all threads."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._listeners, self._lock = [Said()], threading.Lock()

        @property
        def errors(self) -> list[str]:
            return self._listeners[0].errors

        @contextmanager
        def listening(self) -> Iterator[Said]:
            said = Said()
            with self._lock:
                self._listeners = [*self._listeners, said]
            try:
                yield said
            finally:
                with self._lock:
                    self._listeners = [one for one in self._listeners if one is not said]

        def log(self, severity: Any, message: str) -> None:
            """Called from TensorRT's threads too."""
            if severity > trt.ILogger.Severity.WARNING or any(text in message for text in _KNOWN):
                return
            error = severity <= trt.ILogger.Severity.ERROR
            for said in self._listeners:
                said.add("errors" if error else "warnings", message)
            logger.info("TensorRT: %s", message)

    return Log()
