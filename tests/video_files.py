"""Small video files, whose frames tell their number."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = (32, 48)  # height, width


def numbered(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A frame [H, W, 3]: its number modulo 8 and its eighths as grey, left and right, and a white corner."""
    height, width = size
    frame = np.empty((height, width, 3), np.uint8)
    frame[:, : width // 2], frame[:, width // 2 :] = 16 + 28 * (number % 8), 16 + 28 * (number // 8 % 8)
    frame[: height // 4, : width // 4] = 255
    return frame


def number_of(frame: np.ndarray) -> int:
    """Of a frame that was decoded, modulo 64."""
    height, width = frame.shape[:2]
    low, high = (
        frame[height // 2 :, part, :3].mean() for part in (slice(2, width // 2 - 2), slice(width // 2 + 2, -2))
    )
    return round((low - 16) / 28) + 8 * round((high - 16) / 28)


def save_video(
    path: Path,
    times: Sequence[float],
    codec: str = "mpeg4",
    size: tuple[int, int] = SIZE,
    turned: int | None = None,
    gop: int = 12,
    options: dict[str, str] | None = None,
    base: Fraction = Fraction(1, 60),
) -> Path:
    """A video of numbered frames at these times; `turned`: by how many degrees a player turns it, counterclockwise."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(1) / base)
        stream.height, stream.width = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base, stream.codec_context.gop_size = base, gop
        if turned is not None:
            stream.set_display_rotation(turned)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(i, size), format="rgb24").reformat(format=stream.pix_fmt)
            frame.time_base, frame.pts = base, round(time / base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def save_sound(path: Path) -> Path:
    """A second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def even(count: int, fps: float = 30.0) -> list[float]:
    """Times of so many frames at equal distances."""
    return [i / fps for i in range(count)]
