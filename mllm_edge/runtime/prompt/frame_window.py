"""The newest frames of a camera, as a video."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from mllm_edge.errors import ImageError
from mllm_edge.runtime.numbers import number, whole
from mllm_edge.runtime.prompt.frame_sampling import told
from mllm_edge.runtime.prompt.image import ImageSource
from mllm_edge.runtime.prompt.sources import Video

__all__ = ["FrameWindow"]

_LONGEST = 1e9  # seconds, also of a clock
_FIX = "add frames first: window.add(frame), or window.follow(camera)"


class FrameWindow:
    """Keeps the newest frames that a camera gives, and is a `Video` of them at any moment.

    `seconds`: how long before the newest frame the oldest one may be; None: any time. `fps`: at most so many of a
    second are kept, of each 1/fps seconds the last, so that the newest frame is always there; None: all. `frames`: at
    most so many: with `seconds` at no more than frames / seconds a second, without the newest ones. `clock`: seconds,
    asked where a frame comes without its time. Raises OptionError for numbers that cannot be.

    One thread may add while others ask. Frames are kept as they are given, and decoded when a model looks at them: of a
    buffer that the camera fills again, add a copy.
    """

    def __init__(
        self,
        *,
        seconds: float | None = None,
        fps: float | None = None,
        frames: int = 32,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._seconds = None if seconds is None else number("seconds", seconds, 0, _LONGEST, above=True)
        self._most, self._clock = whole("frames", frames, 1), clock
        sampling = told(fps)
        rates = [] if sampling is None or sampling.fps is None else [sampling.fps]
        if self._seconds is not None:
            rates.append(self._most / self._seconds)
        self._rate = min(rates, default=None)
        self._lock = threading.Lock()
        self._held = deque[tuple[float, ImageSource]]()
        self._slot = -1

    def __len__(self) -> int:
        return len(self._held)

    @property
    def times(self) -> tuple[float, ...]:
        """When each held frame was taken, by the clock."""
        with self._lock:
            return tuple(time for time, _ in self._held)

    def add(self, frame: ImageSource, time: float | None = None) -> None:
        """A new frame, as `load_image` takes it, and when it was taken. A time before that of the last one is an
        OptionError, and nothing is added."""
        taken = self._clock() if time is None else time
        with self._lock:
            now = number("time", taken, self._held[-1][0] if self._held else 0, _LONGEST)
            slot = -1 if self._rate is None else int(now * self._rate + 1e-6)
            if self._held and self._rate is not None and slot == self._slot:
                self._held.pop()
            self._held.append((now, frame))
            self._slot = slot
            while len(self._held) > self._most or (
                self._seconds is not None and now - self._held[0][0] > self._seconds + 1e-6
            ):
                self._held.popleft()

    def video(self) -> Video:
        """A video of what is held, whose times count from its first frame. Raises ImageError while there is nothing."""
        with self._lock:
            held = tuple(self._held)
        if not held:
            raise ImageError("no frames have come yet", _FIX)
        return Video([frame for _, frame in held], times=[time - held[0][0] for time, _ in held])

    def follow(self, frames: Iterable[ImageSource | tuple[float, ImageSource]]) -> Iterator[Video]:
        """Adds each of `frames`, or of pairs (time, frame), when it comes, and gives the video of what is held then.

        Errors of `frames` itself pass through as they are, and what came before them stays held: `follow` may be called
        again. Raises ImageError where it ends without any frame."""
        came = False
        for one in frames:
            time, frame = one if isinstance(one, tuple) else (None, one)
            self.add(frame, time)
            came = True
            yield self.video()
        if not came:
            raise ImageError(
                "the frames ended before the first one", "check the camera, or the iterator that was given"
            )
