"""Ending long work by SIGINT, SIGTERM or SIGHUP so that everything it had begun is cleaned up."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "interrupted_message", "interruptible", "was_interrupted"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Interrupted(BaseException):
    """A signal asked to stop. Like KeyboardInterrupt it is no Exception: code that goes on after errors must not."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.message = message
        self.exit_code = 128 + number


def interrupted_message(work: str) -> str:
    """The line that says that `work` was stopped by the user."""
    return f"interrupted: {work} was stopped"


def was_interrupted(error: BaseException) -> bool:
    """Whether an error came of Ctrl-C, which the code around it turned into another one."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        e = todo.pop()
        if e is None or e in seen:
            continue
        if isinstance(e, (KeyboardInterrupt, Interrupted)):
            return True
        seen.append(e)
        todo += [e.__cause__, e.__context__]
    return False


@contextmanager
def interruptible(message: str) -> Iterator[Callable[[], None]]:
    """Turn the first signal into Interrupted, raised in the body; later ones are ignored while the body cleans up.

    Yields a function to call now and then: foreign code may have swallowed the exception, and it raises it again.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            raise Interrupted(number, message)

    def check() -> None:
        if received:
            raise Interrupted(received[0], message)

    previous = _install(handle)
    try:
        yield check
    except Exception as e:
        if received:  # foreign code made another error of it
            raise Interrupted(received[0], message) from e
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _install(handle: Callable[[int, FrameType | None], None]) -> dict[int, signal.Handlers | Callable | int | None]:
    """Handle the signals that are not ignored (as under nohup); only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return {n: signal.signal(n, handle) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
