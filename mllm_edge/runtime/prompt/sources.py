"""What a caller gives the model to look at: images, and videos as their frames."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import Image

from mllm_edge.errors import ImageError, PromptError
from mllm_edge.runtime.numbers import number
from mllm_edge.runtime.prompt.frame_sampling import ALL, DEFAULT, told
from mllm_edge.runtime.prompt.image import BGR, ImageSource, Pixels, image_path, open_file
from mllm_edge.runtime.prompt.timing import timing_of
from mllm_edge.runtime.prompt.video_file import Clip, VideoBytes, clip_of, file_name
from mllm_edge.spec import FrameSampling

__all__ = [
    "EncodedImage",
    "Kind",
    "Source",
    "Video",
    "VideoFile",
    "as_sources",
    "entry_source",
    "in_order",
    "kind_of",
    "merged",
]

Kind = Literal["image", "video"]
_PAYLOADS = ("image", "path", "url", "base64")
_FILES = (
    *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov"),
    *(".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
_OPTIONS = ("fps", "frames", "start", "end")  # of `Video.open`, in a message beside the file
_LONGEST = 1e9  # seconds
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class VideoFile:
    """A video file whose frames are decoded when a model looks at it, as `Video.open` makes it. `sampling`: which
    frames are taken of those from `start` until `end`, in seconds; None: those that the model's own processor takes."""

    file: VideoBytes
    sampling: FrameSampling | None = None
    start: float = 0.0
    end: float | None = None

    def clip(self, sampling: FrameSampling | None = None) -> "Clip":
        """The frames that are taken, not decoded yet; `sampling`: of the model. Raises as `clip_of` does."""
        return clip_of(self.file, self.sampling or sampling or DEFAULT, self.start, self.end)

    @property
    def stated(self) -> dict[str, float | int | str]:
        """The options of `Video.open` that make it."""
        found: dict[str, float | int | str] = {} if not self.start else {"start": self.start}
        if self.end is not None:
            found["end"] = self.end
        if self.sampling is not None:
            fps, frames = self.sampling.fps, self.sampling.most or self.sampling.frames
            found |= ({} if fps is None else {"fps": fps}) | ({} if frames is None else {"frames": frames})
        return found | ({"frames": "all"} if self.sampling == ALL else {})

    def read(self) -> "Video":
        """All taken frames, decoded and in memory; where nothing was said of them, 8 at equal distances. Raises as
        `clip_of` does."""
        clip = self.clip()
        return Video(list(clip.frames()), times=clip.times, duration=clip.duration)

    def __repr__(self) -> str:
        return f"VideoFile({file_name(self.file)})"


class Video:
    """A video as its `frames` in order, each as `load_image` takes an image; which frames of a recording these are is
    the caller's choice. `Video.open` is one in a file.

    `times`: when each was taken, in seconds from the beginning, in order; or `fps`, frames a second, of frames at equal
    distances from 0 s on. Some models read them in the prompt. `duration`: of the whole video in seconds; None: until
    the last frame.

    Raises ImageError where there are no frames, OptionError for times that cannot be."""

    def __init__(
        self,
        frames: ImageSource | Iterable[ImageSource],
        *,
        times: Iterable[float] | None = None,
        fps: float | None = None,
        duration: float | None = None,
    ):
        self.frames = tuple(as_sources(frames))
        if not self.frames:
            raise ImageError("a video without frames", "pass one image or more: Video([first, second, …])")
        self.timing = timing_of(len(self.frames), times, fps, duration)

    @staticmethod
    def open(
        file: VideoBytes,
        *,
        fps: float | None = None,
        frames: int | Literal["all"] | None = None,
        start: float = 0.0,
        end: float | None = None,
    ) -> VideoFile:
        """A video file (a path, its bytes, or a file object that can seek), which stands for a video wherever one may.
        It is decoded when a model looks at it, one frame at a time, and shown as the file says (a phone's rotation)
        with the times that it states. Needs the extra `video`.

        `fps`: so many frames a second, by their times; `frames`: so many at equal distances, or all where there are
        fewer; both: at that rate, but no more than `frames`, at equal distances then; "all": every one. None of them:
        those that the model's own processor takes, or 8 at equal distances where its bundle does not say. What is on
        show at two of these times is taken once. `start`, `end`: of the part that is shown, in seconds.

        Raises OptionError for numbers that cannot be, ImageError for a file that is not there. What is damaged, cut
        off or without video is an ImageError of the call that shows it, which names the file."""
        if isinstance(file, (str, os.PathLike)):
            open_file(image_path(file), "video").close()
        elif not isinstance(file, (bytes, bytearray, memoryview)) and not hasattr(file, "read"):
            fix = "pass a path, the bytes of a file or a file object; frames in memory are Video([…])"
            raise ImageError(f"cannot open a video from {type(file).__name__}", fix)
        return _video_file(file, fps, frames, start, end)

    def __repr__(self) -> str:
        return f"Video({len(self.frames)} frames{f', {self.timing}' if self.timing else ''})"


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image (or a video) that a model has looked at, as `VLM.encode_image` returns it: it stands for its `source` in
    any later prompt of that model, and is not looked at again. `model`: whose stages made of it what it is `shown` as
    (a `Shown`). The source is None where no prompt needs it.
    """

    source: ImageSource | None
    shown: Any
    model: str

    def __repr__(self) -> str:
        layout = self.shown.layout
        return f"EncodedImage({layout.kind}, {layout.tokens} tokens)"


Source = ImageSource | Video | VideoFile | EncodedImage
_ALONE = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, BGR, Pixels, Video, VideoFile, EncodedImage)
_SHOWN = (Video, VideoFile, EncodedImage)


def _video_file(file: VideoBytes, fps: Any, frames: Any, start: Any, end: Any) -> VideoFile:
    """As `Video.open` makes it, but not looked for."""
    begin = 0.0 if start is None else number("start", start, 0, _LONGEST)
    until = None if end is None else number("end", end, begin, _LONGEST, above=True)
    return VideoFile(file, told(fps, frames), begin, until)


def kind_of(source: Source) -> Kind:
    """Which placeholder stands for it."""
    if isinstance(source, EncodedImage):
        kind: Kind = source.shown.layout.kind
        return kind
    return "video" if isinstance(source, (Video, VideoFile)) else "image"


def as_sources(images: Any) -> list[Any]:
    """`images` as a list: one image alone is not a sequence of images, even where Python could iterate over it."""
    if images is None:
        return []
    if isinstance(images, _ALONE) or hasattr(images, "read"):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim < 4:
        return [images]
    if not isinstance(images, Iterable):
        raise ImageError(f"images is {type(images).__name__}", "pass one image, or several in a list")
    return list(images)


def entry_source(entry: Mapping[str, Any]) -> Source | None:
    """What an entry of a message's content holds to look at, or None."""
    if entry["type"] == "video":
        return _entry_video(entry)
    if entry["type"] == "image_url":
        url = entry.get("image_url")
        return url.get("url") if isinstance(url, Mapping) else url
    key = next((key for key in _PAYLOADS if entry.get(key) is not None), None)
    if key is None:
        return None
    if key != "base64":
        return entry[key]
    data = entry[key]
    return f"data:;base64,{data.decode('ascii', 'replace') if isinstance(data, (bytes, bytearray)) else data}"


def _entry_video(entry: Mapping[str, Any]) -> Source | None:
    """A value that stands for a video, a video file, or frames."""
    shown = next((entry[key] for key in ("video", "path", "url") if entry.get(key) is not None), None)
    if shown is None or isinstance(shown, _SHOWN):
        return shown
    if isinstance(shown, (str, os.PathLike)) and ("video" not in entry or os.fspath(shown).lower().endswith(_FILES)):
        return _video_file(shown, *(entry.get(key) for key in _OPTIONS))  # opened when the model is known to take it
    return Video(shown)


def merged(entries: Sequence[tuple[Kind, Source | None]], given: Sequence[Source]) -> list[Source]:
    """What every entry shows: its own, or the next of its kind of those `given`. Raises PromptError where their numbers
    differ."""
    for kind in get_args(Kind):
        empty = sum(own is None for of, own in entries if of == kind)
        count = sum(kind_of(source) == kind for source in given)
        if empty != count:
            article = "an image" if kind == "image" else "a video"
            raise PromptError(
                f"the messages have {empty} {kind} entries without {article}, and {count} {kind}s were given",
                f"give exactly one {kind} per {kind} entry, in order",
            )
    kinds = [kind for kind, own in entries if own is None]
    rest = iter(in_order(kinds, [(kind_of(source), source) for source in given]))
    return [next(rest) if own is None else own for _, own in entries]


def in_order(kinds: Iterable[Kind], items: Sequence[tuple[Kind, _T]]) -> list[_T]:
    """The items, of each kind in their order, as `kinds` follow each other."""
    rest = {kind: iter([item for of, item in items if of == kind]) for kind in get_args(Kind)}
    return [next(rest[kind]) for kind in kinds]
