"""Encoded images on disk, and the ones that were seen last in memory."""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from PIL import Image

from mllm_edge.errors import ImageError
from mllm_edge.files import write_whole
from mllm_edge.runtime.prompt.layout import layout_of, video_layout
from mllm_edge.runtime.prompt.shown import Shown
from mllm_edge.runtime.prompt.sources import EncodedImage
from mllm_edge.runtime.prompt.timing import Timing
from mllm_edge.runtime.prompt.token_budget import budget_of, within
from mllm_edge.spec import ImageSpec

__all__ = ["FeatureCache", "encoded_bytes", "load_encoded", "save_encoded"]

_FIX = "give a file that VLM.save_image wrote, and the bundle that it was encoded with"
_PICTURE, _ABOUT = "picture", "about"


class FeatureCache:
    """What the stages made of the images that were seen last, by the key of their content, up to `budget` bytes."""

    def __init__(self, budget: int):
        self.budget = budget
        self._rows: OrderedDict[int, Mapping[str, np.ndarray]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for rows in self._rows.values() for array in rows.values())

    def get(self, shown: Shown) -> Mapping[str, np.ndarray] | None:
        """What is known of an image, which is then the last one seen."""
        if not self.budget or shown.key not in self._rows:
            return None
        self._rows.move_to_end(shown.key)
        return self._rows[shown.key]

    def put(self, shown: Shown, rows: Mapping[str, np.ndarray]) -> None:
        """Keep what was made of an image; the ones that were not seen for the longest time go."""
        if not self.budget:
            return
        self._rows[shown.key] = rows
        while self.nbytes > self.budget:
            self._rows.popitem(last=False)


def save_encoded(image: EncodedImage, path: str | os.PathLike[str]) -> None:
    """Write an encoded image to a file, whole or not at all; raises WriteError."""
    write_whole(os.fspath(path), encoded_bytes(image))


def encoded_bytes(image: EncodedImage) -> bytes:
    """What `load_encoded` reads."""
    shown, timing = image.shown, image.shown.timing
    about = {
        "model": image.model,
        "key": shown.key,
        "size": shown.size,
        "budget": [shown.budget.most, shown.budget.least],
        "timing": None if timing is None else [timing.times, timing.duration, timing.rate],
    }
    arrays: dict[str, Any] = {_ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8)}
    for kind, found in (("features", shown.features), ("inputs", shown.inputs)):
        arrays |= {f"{kind}/{name}": array for name, array in (found or {}).items()}
    if isinstance(image.source, Image.Image):
        arrays[_PICTURE] = np.asarray(image.source)
    with io.BytesIO() as file:
        np.savez(file, allow_pickle=False, **arrays)
        return file.getvalue()


def load_encoded(path: str | os.PathLike[str] | IO[bytes], spec: ImageSpec, model: str) -> EncodedImage:
    """An encoded image that `save_encoded` wrote; raises ImageError for a file that is none, or is another model's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays[_ABOUT].tobytes())
        size: tuple[int, ...] = tuple(about["size"])
        timing = about["timing"]
        known = None if timing is None else Timing(tuple(timing[0]), timing[1], timing[2])
        budget = budget_of(*about.get("budget", (None, None)))
        if len(size) == 3:
            layout = video_layout(spec, *size, known)
        else:
            layout = layout_of(within(spec, size[0], size[1], budget), *size)
        parts = {
            kind: {n.removeprefix(f"{kind}/"): a for n, a in arrays.items() if n.startswith(f"{kind}/")}
            for kind in ("features", "inputs")
        }
        stated, key = str(about["model"]), int(about["key"])
    except OSError as e:
        raise ImageError(f"{path}: cannot be read ({e.strerror or e})", _FIX) from None
    except Exception as e:
        raise ImageError(f"{path}: not an encoded image ({type(e).__name__})", _FIX) from None
    if stated != model:
        raise ImageError(f"{path}: an encoded image of another bundle, or another target", _FIX)
    picture = Image.fromarray(arrays[_PICTURE]) if _PICTURE in arrays else None
    shown = Shown(layout, parts["inputs"] or None, size, known, parts["features"] or None, key, budget)
    if shown.features is None and shown.inputs is None:
        raise ImageError(f"{path}: not an encoded image (it is empty)", _FIX)
    return EncodedImage(picture, shown, model)
