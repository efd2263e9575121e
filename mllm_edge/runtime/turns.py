"""Several callers, one model: calls wait their turn, and none is inside native code when the model or the interpreter
goes away."""

import atexit
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from mllm_edge.errors import BusyError, ClosedError, GivenUpError
from mllm_edge.runtime.stopping import Stopping

__all__ = ["Turn", "Turns", "native"]

# How long the end of the interpreter waits for threads inside native code.
_PATIENCE = 60.0
_NUMBERS = itertools.count()


class Turn:
    """One call's place in the queue. `thread` is the one that asked for it, later the one that ran it last."""

    __slots__ = ("__weakref__", "depth", "given_up", "granted", "number", "thread")

    def __init__(self) -> None:
        self.number, self.thread = next(_NUMBERS), threading.get_ident()
        self.granted, self.given_up, self.depth = _gate(), False, 0


class Turns:
    """The queue of one model: first come, first served.

    A call makes a `Turn`, takes it, works in `working`, and releases it whatever happens. All is done under one lock
    that its holder may take again, in steps that are whole by themselves: the garbage collector can end an abandoned
    answer, which releases its turn, in any thread at any time. `free` is called once, when the queue is closed and
    nobody works any more.
    """

    def __init__(self, free: Callable[[], None]):
        self._free, self._closed = free, False
        self._lock = threading.RLock()
        # Weak: a turn whose call is gone without a release (an exception can come from a signal's handler anywhere,
        # even in the middle of one) is passed on.
        self._queue: dict[int, weakref.ref[Turn]] = {}
        self._inside = _Inside()

    def check(self, wait: bool = True) -> None:
        """Raise ClosedError when the queue is closed, and without `wait` BusyError where a call would have to wait."""
        with self._lock:
            if self._closed:
                raise _closed()
            holder = self._holder()
            if not wait and holder is not None and (holder.thread != threading.get_ident() or len(self._queue) > 1):
                raise _busy()

    def take(self, turn: Turn, wait: bool = True, stopping: Stopping | None = None) -> None:
        """Wait until all turns that were taken before are released; an answer that this thread has begun and not
        finished is given up first, for it would never end.

        Raises ClosedError, also while it waits; BusyError without `wait`, and for a call from within another one of
        this thread, such as from a signal's handler; what `stopping` raises.
        """
        with self._lock:
            self.check()
            for place, ref in enumerate(list(self._queue.values())):
                other = ref()
                if other is None or other.thread != turn.thread:
                    continue
                if place > 0 or other.depth:
                    raise BusyError(
                        "a call of this thread is under way, and another one began within it",
                        "ask again when the first one has returned, or load a second VLM",
                    )
                other.given_up = True
                self.release(other)
            if self._queue and not wait:
                raise _busy()
            self._queue[turn.number] = weakref.ref(turn, partial(self._remove, turn.number))
            self._grant()
        stopping = stopping or Stopping()
        with stopping.waiting(partial(_open, weakref.ref(turn))) as seconds:
            turn.granted.acquire(timeout=seconds)
        stopping.check()
        self.check()

    def release(self, turn: Turn) -> None:
        """Let the next one have its turn; nothing happens when this one was released before, or never taken."""
        self._remove(turn.number)

    @contextmanager
    def working(self, turn: Turn | None = None) -> Iterator[None]:
        """`enter` and `leave` around the body."""
        turn = turn or Turn()
        try:
            self.enter(turn)
            yield
        finally:
            self.leave(turn)

    def enter(self, turn: Turn) -> None:
        """From here to `leave`, native code may be entered, with a turn that was taken or as work that needs none.

        Raises ClosedError, or GivenUpError where the turn was lost to a later call of its thread; `leave` is due then,
        too.
        """
        native.enter()
        with self._lock:
            turn.thread = threading.get_ident()
            turn.depth += 1
            self._inside.enter()
            if self._closed:  # looked at inside: from here on nothing is freed
                raise _closed()
            if turn.given_up:
                raise GivenUpError(
                    "this answer was given up: another call began in the thread that took its pieces",
                    "finish one answer before you ask for the next, or load a second VLM",
                )

    def leave(self, turn: Turn) -> None:
        """The end of what `enter` began; nothing happens without it."""
        if turn.depth:
            with self._lock:
                turn.depth -= 1
                self._inside.leave()
                if self._closed:
                    self._free_if_idle()
            native.leave()

    @contextmanager
    def turn(self, stopping: Stopping | None = None) -> Iterator[None]:
        """A turn for the body, or within an unfinished answer of this thread that answer's."""
        holder = self._holder()
        if holder is not None and holder.thread == threading.get_ident() and not holder.depth:
            with self.working(holder):
                yield
            return
        turn = Turn()
        try:
            self.take(turn, True, stopping)
            with self.working(turn):
                yield
        finally:
            self.release(turn)

    @property
    def queued(self) -> int:
        """Calls that have their turn, or wait for it."""
        with self._lock:
            return len(self._queue)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Refuse all calls from now on, those that wait too; returns when nobody works any more, but for this thread:
        when it is inside a call, what is to be freed is freed at that call's end."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for ref in list(self._queue.values()):
                    _open(ref)
                self._free_if_idle()
        self._inside.wait_for_others()

    def _holder(self) -> Turn | None:
        with self._lock:
            first = next(iter(self._queue.values()), None)
            return None if first is None else first()

    def _remove(self, number: int, _: object = None) -> None:
        with self._lock:
            self._queue.pop(number, None)
            self._grant()

    def _grant(self) -> None:
        first = next(iter(self._queue.values()), None)
        if first is not None:
            _open(first)

    def _free_if_idle(self) -> None:
        if self._closed and not self._inside:
            free, self._free = self._free, lambda: None
            free()


class _Inside:
    """The threads that are inside some kind of work."""

    def __init__(self) -> None:
        self._threads: list[int] = []
        self._gates: list[threading.Lock] = []

    def __bool__(self) -> bool:
        return bool(self._threads)

    def enter(self) -> None:
        """This thread begins such work."""
        self._threads.append(threading.get_ident())

    def leave(self) -> None:
        """It ends the work that it began last."""
        self._threads.remove(threading.get_ident())
        while self._gates:
            with suppress(IndexError):  # another thread was faster
                self._gates.pop().release()

    def wait_for_others(self, seconds: float = -1) -> None:
        """Until no other thread is inside, or for so long each time that one leaves."""
        while True:
            gate = _gate()
            self._gates.append(gate)  # before the look at who is inside: who leaves looks at the gates last
            if all(thread == threading.get_ident() for thread in list(self._threads)):
                return
            if not gate.acquire(timeout=seconds):
                return


class _Native(_Inside):
    """Threads inside native code, of all models. The interpreter ends a daemon thread by unwinding its stack as soon as
    it wants to go on, which C++ and Rust answer with an abort: so the end waits until they are out, and lets none in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._leaving = False

    def enter(self) -> None:
        super().enter()
        if self._leaving and threading.current_thread() is not threading.main_thread():
            self.leave()
            _gate().acquire()  # the interpreter is about to end: this thread waits for that

    @contextmanager
    def section(self) -> Iterator[None]:
        """`enter` and `leave` around the body."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def watch(self) -> None:
        """Make this the first thing to happen at exit: before the engines imported so far clean up."""
        atexit.unregister(self._leave)
        atexit.register(self._leave)

    def _leave(self) -> None:
        self._leaving = True
        self.wait_for_others(_PATIENCE)


native = _Native()


def _gate() -> threading.Lock:
    """A closed one: whoever acquires it waits until it is opened."""
    gate = threading.Lock()
    gate.acquire()
    return gate


def _open(ref: "weakref.ref[Turn]") -> None:
    turn = ref()
    if turn is not None:
        with suppress(RuntimeError):  # it is open
            turn.granted.release()


def _closed() -> ClosedError:
    return ClosedError("the model was closed", "open it again with VLM.load")


def _busy() -> BusyError:
    return BusyError(
        "the model is answering another call", "leave wait=False out to wait for your turn, or load a second VLM"
    )
