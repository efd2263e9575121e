"""When the frames of a video were taken, and how that is written."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from mllm_edge.errors import OptionError
from mllm_edge.runtime.numbers import number

__all__ = ["Timing", "hours", "in_words", "timing_of", "written"]

_FIX = "give Video(frames, fps=…), or times=[…] with one per frame, in seconds, in order"
_LONGEST = 1e9  # seconds
_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True)
class Timing:
    """`times` of the frames and `duration` of the whole, in seconds; `rate`: frames a second, 0 where one frame alone
    does not tell."""

    times: tuple[float, ...]
    duration: float
    rate: float

    def __str__(self) -> str:
        return f"{self.times[0]:g} to {self.times[-1]:g} s"

    def groups(self, size: int) -> tuple[tuple[float, float], ...]:
        """Times of the first and last of every `size` frames; the last frame fills up."""
        last = len(self.times) - 1
        return tuple((self.times[i], self.times[min(i + size - 1, last)]) for i in range(0, last + 1, size))


def timing_of(frames: int, times: Iterable[float] | None, fps: float | None, duration: float | None) -> Timing | None:
    """What a caller tells of so many frames; None where that is nothing. Raises OptionError for what cannot be."""
    if times is None and fps is None:
        if duration is not None:
            raise OptionError("a video has a duration, and its frames have no times", _FIX)
        return None
    if times is not None and fps is not None:
        raise OptionError("a video has times and fps", _FIX)
    if fps is not None:
        rate = number("fps", fps, 1 / _LONGEST)
        found = [i / rate for i in range(frames)]
    else:
        found, given = list[float](), list(times or ())
        if len(given) != frames:
            raise OptionError(f"a video has {frames} frames and {len(given)} times", _FIX)
        for i, time in enumerate(given):
            found.append(number(f"times[{i}] of a video", time, found[-1] if found else 0, _LONGEST))
        span = found[-1] - found[0]
        rate = (frames - 1) / span if span > 0 else 0.0
    end = found[-1] if duration is None else number("duration", duration, found[-1], _LONGEST)
    return Timing(tuple(found), end, rate)


def written(first: float, last: float) -> dict[str, str]:
    """What stands for the times of a frame, or of the first and last of a few, by the words of `VideoSpec`."""
    clock = f"{int(first // 60):02d}:{int(first % 60):02d}"
    return {"clock": clock, "second": str(int(first)), "seconds": f"{(first + last) / 2:.1f}"}


def hours(duration: float) -> str:
    """A duration as H:MM:SS."""
    return str(timedelta(seconds=int(duration)))


def in_words(number: int) -> str:
    """A number below a million in English words."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        ten, unit = divmod(number, 10)
        return _TENS[ten - 2] + (f"-{_UNITS[unit]}" if unit else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_UNITS[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = "" if not rest else f" and {in_words(rest)}" if rest < 100 else f", {in_words(rest)}"
    return f"{in_words(thousands)} thousand{joint}"
