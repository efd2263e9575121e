"""Which frames are taken, of a recording or as they come: what a caller says, or what a model's own processor does."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from mllm_edge.errors import OptionError
from mllm_edge.runtime.numbers import number, whole
from mllm_edge.spec import FrameSampling

__all__ = ["ALL", "DEFAULT", "frames_on_show", "positions", "told"]

# Where neither a caller nor the model's processor says anything.
DEFAULT = FrameSampling("even", frames=8)
ALL = FrameSampling("even")
_FASTEST = 1e9  # frames a second; as many seconds as one frame may take
_MOST_LOOKS = 1_000_000  # at a recording of this many and more every frame is taken
_NEAR = 0.0015  # seconds: some files tell times in whole milliseconds


def told(fps: Any = None, frames: Any = None) -> FrameSampling | None:
    """What a caller says: `fps` frames a second; so many `frames` at equal distances, or all where there are fewer;
    both: at that rate, and where that would be more than `frames`, so many. `frames` "all": every one. None: nothing.
    Raises OptionError."""
    rate = None if fps is None else number("fps", fps, 1 / _FASTEST, _FASTEST)
    if isinstance(frames, str):
        if frames != "all" or rate is not None:
            raise OptionError(f"frames is {frames!r:.60}", 'give a number, or frames="all" without fps')
        return ALL
    most = None if frames is None else whole("frames", frames, 1)
    if rate is not None:
        return FrameSampling("rate", fps=rate, most=most)
    return None if most is None else FrameSampling("even", frames=most)


def positions(sampling: FrameSampling, total: int, rate: float) -> list[int]:
    """Of `total` frames at equal distances, `rate` a second, those that are taken by a rule that counts frames (each
    but `rate`), in order."""
    found = _RULES[sampling.rule](sampling, total, rate)
    return np.clip(found, 0, total - 1).astype(int).tolist() or [0]


def frames_on_show(sampling: FrameSampling, times: Sequence[float], end: float, rate: float | None) -> list[int]:
    """Of frames that begin to be shown at `times` (seconds, rising; the last until `end`), which ones are taken, in
    order, each once. `rate`: frames a second that a file states, if it does. Where frames are at unequal distances, and
    by the rule `rate` always, those are taken that are on show when the taken ones of as many at equal distances would
    be."""
    total, seen = len(times), np.asarray(times) - times[0]
    if sampling == ALL:
        return list(range(total))
    length = max(end - times[0], float(seen[-1]), _NEAR)
    if sampling.rule == "rate":
        return _at_rate(sampling, seen, length)
    rates = [each for each in (rate, (total - 1) / (seen[-1] or length) or 1 / length) if each]
    alike = next((each for each in rates if np.abs(seen * each - np.arange(total)).max() <= 0.5), None)
    if alike is not None:
        found = positions(sampling, total, alike)
    else:
        count = _count(sampling, total, total / length)
        even = sampling.rule == "even"
        places = np.arange(count) * (total / count) if even else np.array(positions(sampling, total, total / length))
        found = _on_show(seen, places * (length / total))
    return _paired(found) if sampling.rule == "steps" else list(dict.fromkeys(found))


def _at_rate(sampling: FrameSampling, seen: np.ndarray, length: float) -> list[int]:
    fps = sampling.fps or 1.0
    count = math.floor((float(seen[-1]) + length) / 2 * fps) + 1  # until the last one's middle
    if sampling.most is not None and count > sampling.most:
        found = _on_show(seen, np.arange(sampling.most) * (length / sampling.most))
    else:
        found = _on_show(seen, np.arange(count) / fps) if count <= _MOST_LOOKS else list(range(len(seen)))
    return list(dict.fromkeys(found))


def _on_show(seen: np.ndarray, wanted: np.ndarray) -> list[int]:
    """Which frame is on show at each of the `wanted` times."""
    found: list[int] = np.maximum(np.searchsorted(seen, wanted + _NEAR, "right") - 1, 0).tolist()
    return found


# ---------------------------------------------------------------- the rules of `FrameSampling`
def _count(sampling: FrameSampling, total: int, rate: float) -> int:
    multiple = sampling.multiple
    if sampling.frames is not None:
        wanted: float = round(sampling.frames / multiple) * multiple
    elif sampling.fps is None:
        wanted = total
    else:
        wanted = max(total / rate * sampling.fps, sampling.least)
        wanted = wanted if sampling.most is None else min(wanted, sampling.most)
    return max(math.floor(min(wanted, total) / multiple) * multiple, 1)


def _even(sampling: FrameSampling, total: int, rate: float) -> np.ndarray:
    count = _count(sampling, total, rate)
    return np.arange(count) * total // count


def _stride(sampling: FrameSampling, total: int, rate: float) -> np.ndarray:
    step = total / _count(sampling, total, rate)
    shift = step / 2 if sampling.shift is None else sampling.shift
    found = np.floor(_arange(shift, total, step))
    return found[found < total]  # the reference's own may be one too many, by rounding


def _arange(first: float, end: float, step: float) -> np.ndarray:
    """`torch.arange` in float32, rounding as on x86-64: eight numbers are made of their first, in blocks of 16."""
    places = np.arange(math.ceil((end - first) / step))
    eighths = np.where(places < len(places) // 16 * 16, places % 8, 0)
    firsts = (first + (places - eighths) * step).astype(np.float32)
    return (firsts.astype(float) + eighths * step).astype(np.float32)


def _ends(sampling: FrameSampling, total: int, rate: float) -> np.ndarray:
    return np.linspace(0, total - 1, _count(sampling, total, rate)).round()


def _steps(sampling: FrameSampling, total: int, rate: float) -> np.ndarray:
    length, fps = total / rate, sampling.fps or rate
    if length <= sampling.seconds:
        found = np.ceil(np.arange(max(math.floor(length * fps), 1)) * rate / fps)
    else:
        count = max(int(sampling.seconds * fps), 1)
        found = np.ceil(np.linspace(0, length, count) * rate) if count < total else np.arange(total)
    return np.array(_paired(np.minimum(found, total - 1).astype(int).tolist()))


def _inner(sampling: FrameSampling, total: int, rate: float) -> np.ndarray:
    length, fps, most = total / rate, sampling.fps or rate, sampling.most or total
    first, last = 0, total - 1
    if length - 2 * sampling.seconds > most * fps:
        first, last = int(sampling.seconds * rate), min(int(total - sampling.seconds * rate), total - 1)
        first, last = (first, last) if first < last else (0, total - 1)
    return np.unique(np.linspace(first, last, max(min(round(fps * length), most), 1), dtype=int))


def _paired(found: Sequence[int]) -> list[int]:
    """Each once, and the last again where their number is odd."""
    once = list(dict.fromkeys(found))
    return once + once[-1:] * (len(once) % 2)


_RULES: Mapping[str, Callable[[FrameSampling, int, float], np.ndarray]] = MappingProxyType(
    {"even": _even, "stride": _stride, "ends": _ends, "steps": _steps, "inner": _inner}
)
