"""What a caller gives the model to look at: images, and videos as their frames."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import Image

from mllm_edge.errors import ImageError, PromptError
from mllm_edge.runtime.prompt.image import BGR, ImageSource
from mllm_edge.runtime.prompt.timing import timing_of

__all__ = ["EncodedImage", "Kind", "Source", "Video", "as_sources", "entry_source", "in_order", "kind_of", "merged"]

Kind = Literal["image", "video"]
_PAYLOADS = ("image", "path", "url", "base64")
_T = TypeVar("_T")


class Video:
    """A video as its `frames` in order, each as `load_image` takes an image; which frames of a recording these are is
    the caller's choice.

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


Source = ImageSource | Video | EncodedImage
_ALONE = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, BGR, Video, EncodedImage)


def kind_of(source: Source) -> Kind:
    """Which placeholder stands for it."""
    if isinstance(source, EncodedImage):
        kind: Kind = source.shown.layout.kind
        return kind
    return "video" if isinstance(source, Video) else "image"


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
        frames = entry.get("video")
        return frames if frames is None or isinstance(frames, (Video, EncodedImage)) else Video(frames)
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
