"""Video files: which of their frames are taken, when each is shown, and these frames, upright, one behind the other.

PyAV is imported here alone, on first use. A file is read twice: its packets are listed first, which decodes nothing,
then the taken frames are decoded, from the keyframe before each where that is far ahead. One frame at a time is held.
"""

import io
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from mllm_edge.errors import BackendError, ImageError
from mllm_edge.install import install_hint
from mllm_edge.runtime.foreign import pass_on
from mllm_edge.runtime.prompt.frame_sampling import frames_on_show
from mllm_edge.runtime.prompt.image import image_path, open_file
from mllm_edge.spec import FrameSampling

__all__ = ["Clip", "VideoBytes", "clip_of", "file_name", "upright"]

VideoBytes = str | os.PathLike | bytes | bytearray | memoryview | IO[bytes]

# Nothing that a file names is opened: playlists name other files, and addresses.
_OPTIONS = {"protocol_whitelist": "none"}
_LENGTH_STATED = ("matroska", "mov", "flv")  # formats whose header says how long all of it is
_FAR = 30  # frames to the next keyframe, from which on it is looked for, not decoded up to
_NEAR = 0.0015  # seconds: some files tell times in whole milliseconds
_USUAL_RATE = 25.0  # of a file that tells no times and no rate


@dataclass(frozen=True, eq=False)
class Clip:
    """The taken frames of a video file. `times`: when each is shown, in seconds from the file's first frame, rising;
    `duration`: of the whole file, in seconds."""

    name: str
    times: tuple[float, ...]
    duration: float
    _file: VideoBytes
    _index: "_Index"
    _taken: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the first taken frame, upright, which is decoded for it; errors as of `frames`."""
        height, width = next(self.frames()).shape[:2]
        return height, width

    def frames(self) -> Iterator[np.ndarray]:
        """Each as an array [H, W, 3] uint8 RGB, or [H, W, 4] where the file has opacity; decoded as they are asked for.
        Raises ImageError for a file that cannot be decoded so far."""
        last, made = -1, np.zeros(0, np.uint8)
        for place, frame in _decoded(self._file, self.name, self._index, self._taken):
            if place != last:
                last, made = place, upright(*_pixels_and_matrix(frame))
            yield made


def clip_of(file: VideoBytes, sampling: FrameSampling, start: float = 0.0, end: float | None = None) -> Clip:
    """The frames that `sampling` takes of those on show from `start` until `end` (seconds from the first frame; None:
    until the last). Nothing is decoded. Raises ImageError for a file that is missing, none of a video, empty, cut off
    or damaged, or that has no frames then; BackendError without PyAV."""
    name = file_name(file)
    index = _index_of(file, name)
    until = index.end if end is None else min(end, index.end)
    if index.cut is not None and until > index.cut:
        raise ImageError(
            f"{name}: cut off at {index.cut:.2f} s",
            f"copy it again, or end before: end={max(index.cut - 0.01, 0):.2f}",
        )
    first = bisect_right(index.times, start + _NEAR) - 1
    behind = bisect_right(index.times, until - _NEAR) if until < index.end else len(index.times)
    if start >= index.end or first < 0 or behind <= first:
        raise ImageError(
            f"{name}: no frames from {start:g} to {until:g} s", f"it lasts {index.end:g} s: choose start and end within"
        )
    taken = [first + i for i in frames_on_show(sampling, index.times[first:behind], until, index.rate)]
    times = tuple(index.times[i] for i in taken)
    return Clip(name, times, max(index.end, times[-1]), file, index, tuple(taken))


def file_name(file: VideoBytes) -> str:
    """What errors call it."""
    if isinstance(file, (bytes, bytearray, memoryview)):
        return f"video bytes ({len(file)} bytes)"
    if isinstance(file, (str, os.PathLike)):
        return str(image_path(file))
    return f"video file object {getattr(file, 'name', type(file).__name__)!r}"


def upright(pixels: np.ndarray, matrix: Sequence[int] | None) -> np.ndarray:
    """Pixels [H, W, C] as they are to be shown, by a display matrix of nine numbers: (x, y) is shown at (ax + cy, bx +
    dy) for its first, second, fourth and fifth, a, b, c and d (FFmpeg's `av_display_rotation_get`); of other angles
    than right ones the nearest. None: as they are."""
    if matrix is None:
        return pixels
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    aside = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c, b) if aside else (a, d)
    turned = pixels.transpose(1, 0, 2) if aside else pixels
    return turned[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


# ---------------------------------------------------------------- what a file holds
@dataclass(frozen=True, eq=False)
class _Index:
    """`times` of all frames in seconds from the first; `marks`: what a decoded frame tells of itself (its pts, or where
    none are told its number); `keys`: places of those that are decoded without others. `end`: of the last one in
    seconds; `rate`: frames a second that the file states; `cut`: where it ends too early."""

    times: list[float]
    marks: list[int]
    keys: list[int]
    timed: bool
    end: float
    rate: float | None
    cut: float | None


def _index_of(file: VideoBytes, name: str) -> _Index:
    with _opened(file, name) as (container, stream), _decoding(name):
        stated = any(word in container.format.name for word in _LENGTH_STATED)
        packets, reached, corrupt = list[tuple[int | None, int, bool]](), 0.0, False
        for packet in container.demux(*(container.streams if stated else (stream,))):
            if not packet.size:
                continue
            if packet.pts is not None and packet.time_base is not None:
                reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index and not packet.is_discard:
                packets.append((packet.pts, packet.duration or 0, packet.is_keyframe))
                corrupt = packet.is_corrupt
        if not packets:
            raise ImageError(f"{name}: a video without frames", "check where the file comes from")
        rate = stream.average_rate or stream.guessed_rate
        length = (container.duration or 0) / 1e6 if stated else 0.0
        missing = length - max(reached - (container.start_time or 0) / 1e6, 0.0) > max(1.0, 0.02 * length)
        return _indexed(packets, float(stream.time_base or 0), float(rate) if rate else None, missing or corrupt)


def _indexed(packets: list[tuple[int | None, int, bool]], base: float, rate: float | None, is_cut: bool) -> _Index:
    known = {pts: (duration, key) for pts, duration, key in packets if pts is not None}
    timed = bool(base) and len(known) * 2 > len(packets)
    if timed:
        marks = sorted(known)
        times = [(mark - marks[0]) * base for mark in marks]
        keys, last = [i for i, mark in enumerate(marks) if known[mark][1]], known[marks[-1]][0] * base
    else:
        marks, keys, last = list(range(len(packets))), [0], 0.0
        times = [i / (rate or _USUAL_RATE) for i in marks]
    step = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / rate if rate else 0.0
    end = times[-1] + (last or step)
    return _Index(times, marks, keys, timed, end, rate, times[-1] if is_cut else None)


# ---------------------------------------------------------------- decoding
def _decoded(file: VideoBytes, name: str, index: _Index, taken: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """The place and the frame for each taken place (rising); the next one's where the file's own cannot be decoded."""
    with ExitStack() as stack:
        container, stream = stack.enter_context(_opened(file, name))
        frames, place, frame, seeks = _frames(container, stream, name, index), -1, None, index.timed
        for wanted in taken:
            key = index.keys[bisect_right(index.keys, wanted) - 1] if index.keys and index.keys[0] <= wanted else 0
            if seeks and key - place > _FAR:
                found = _from_key(container, stream, name, index, key)
                seeks = found is not None and found[0] <= wanted
                if found is not None and seeks:
                    place, frame, frames = found
                else:  # the format cannot: from the beginning again
                    stack.close()
                    container, stream = stack.enter_context(_opened(file, name))
                    frames, place = _frames(container, stream, name, index), -1
            while place < wanted:
                following = next(frames, None)
                if following is None:
                    break
                place, frame = following
            if frame is None or index.times[wanted] - index.times[place] > 0.5:
                raise _damaged(name, index.times[max(place, 0)], "its frames cannot be decoded")
            yield place, frame


def _from_key(
    container: Any, stream: Any, name: str, index: _Index, key: int
) -> tuple[int, Any, Iterator[tuple[int, Any]]] | None:
    """Place, first frame and those behind it, of the decoding that begins at a keyframe; None where that fails."""
    try:
        container.seek(index.marks[key], stream=stream)
        frames = _frames(container, stream, name, index)
        return (*next(frames), frames)
    except (ImageError, StopIteration):
        return None
    except Exception as error:
        pass_on(error, "av")
        return None


def _frames(container: Any, stream: Any, name: str, index: _Index) -> Iterator[tuple[int, Any]]:
    """Frames with their places, as far as they can be decoded."""
    place = -1
    with _decoding(name, lambda: index.times[max(place, 0)]):
        for number, frame in enumerate(container.decode(stream)):
            if index.timed and frame.pts is None:
                continue
            found = bisect_right(index.marks, frame.pts) - 1 if index.timed else min(number, len(index.marks) - 1)
            if found >= 0:
                place = found
                yield place, frame


def _pixels_and_matrix(frame: Any) -> tuple[np.ndarray, list[int] | None]:
    opaque = not any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgb24" if opaque else "rgba")
    found = [bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    return pixels, np.frombuffer(found[0], np.int32).tolist() if found else None


# ---------------------------------------------------------------- files and their errors
@contextmanager
def _opened(file: VideoBytes, name: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and the stream of its pictures."""
    av = _import_av()
    with ExitStack() as stack:
        source: Any = file
        if isinstance(file, (bytes, bytearray, memoryview)):
            source = io.BytesIO(file)
        elif isinstance(file, (str, os.PathLike)):
            source = stack.enter_context(open_file(image_path(file), "video"))
        elif not (hasattr(file, "seekable") and file.seekable()):
            raise ImageError(f"{name}: cannot be read twice", "pass its path, or its bytes: file.read()")
        source.seek(0)
        with _decoding(name):
            container = stack.enter_context(av.open(source, metadata_errors="ignore", options=_OPTIONS))
        pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not pictures:
            kinds = sorted({stream.type for stream in container.streams})
            raise ImageError(f"{name}: no video in it ({', '.join(kinds) or 'nothing at all'})", "give a file with one")
        pictures[0].thread_type = "AUTO"
        yield container, pictures[0]


def _import_av() -> Any:
    try:
        import av
        import av.stream
    except ImportError as error:
        pass_on(error)
        raise BackendError(
            f"video files need PyAV, which cannot be imported ({error})", install_hint("video")
        ) from None
    return av


@contextmanager
def _decoding(name: str, reached: Any = None) -> Iterator[None]:
    """PyAV's errors in the body become ImageErrors that tell `name`, and how far the file was `reached`."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        pass_on(error, "av")
        raise _damaged(
            name, None if reached is None else reached(), getattr(error, "strerror", None) or str(error)
        ) from error


def _damaged(name: str, seconds: float | None, reason: str) -> ImageError:
    if not seconds:
        return ImageError(f"{name}: no video, or a damaged one ({reason})", "give a file that a player can play")
    return ImageError(
        f"{name}: damaged at about {seconds:.2f} s ({reason})", f"copy it again, or end before: end={seconds:.2f}"
    )
