"""Telling a library's own errors from what comes from elsewhere while it runs: memory that is used up, Ctrl-C, and
exceptions of the caller's own, which signal handlers raise between any two lines."""

import sys
from types import FrameType, TracebackType

__all__ = ["pass_on"]


def pass_on(error: BaseException, *libraries: str) -> None:
    """To be called with an error that a library's call ended with: raises it as it is, or what it was made of, where it
    is not the library's own; otherwise returns.

    `libraries`: beginnings of the names of all modules that the call may lead to, beside the standard library's. Where
    they are given, an error is somebody else's too when code of other modules raised it (a caller's file, say), or when
    its class is of another module.
    """
    link: BaseException | None = error
    while link is not None:
        if not isinstance(link, Exception) or isinstance(link, MemoryError) or _of_a_signal(link):
            raise link
        if libraries and not (_is_of(type(link).__module__, libraries) and _all_within(link.__traceback__, libraries)):
            raise link
        link = link.__cause__  # compiled modules wrap whatever interrupts their import


def _of_a_signal(error: BaseException) -> bool:
    """Whether a signal's handler raised it: a function that was given the very frame it interrupted."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        if _was_given(trace.tb_next.tb_frame, trace.tb_frame):
            return True
        trace = trace.tb_next
    return False


def _was_given(frame: FrameType, interrupted: FrameType) -> bool:
    given = frame.f_locals.values()
    return any(v is interrupted or (isinstance(v, tuple) and any(x is interrupted for x in v)) for v in given)


def _all_within(trace: TracebackType | None, libraries: tuple[str, ...]) -> bool:
    while trace is not None:
        if not _is_of(_module(trace.tb_frame), libraries):
            return False
        trace = trace.tb_next
    return True


def _module(frame: FrameType) -> str:
    """The name of its module, or the first part of it: a frame that Cython made knows a path in its package alone."""
    return frame.f_globals.get("__name__") or frame.f_code.co_filename.partition("/")[0].removesuffix(".py")


def _is_of(module: str, libraries: tuple[str, ...]) -> bool:
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top.startswith((*libraries, __name__.partition(".")[0]))
