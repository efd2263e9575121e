"""Images and videos as the model gets them: decoded, transformed, laid out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import xxhash

from mllm_edge.errors import BundleError, ImageError
from mllm_edge.runtime.prompt.image import ImageSource, load_image
from mllm_edge.runtime.prompt.layout import Layout, layout_of, on_one_canvas, shared_bounds, video_layout
from mllm_edge.runtime.prompt.shown_patches import shown_inputs
from mllm_edge.runtime.prompt.sources import EncodedImage, Source, Video, VideoFile, kind_of
from mllm_edge.runtime.prompt.timing import Timing, timing_of
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, cut_of, first_size
from mllm_edge.runtime.prompt.transforms.patches import frames_joined
from mllm_edge.runtime.prompt.transforms.tiles import filled
from mllm_edge.spec import PIXELS, FrameSampling, ImageSpec, Transform

__all__ = ["Shown", "Viewer"]

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Shown:
    """An image or a video of a prompt. `inputs`: its pixel values and views [slices, …] float32 by name; `features`:
    what the stages made of it, rows [n, …] by name, where that is known; one of the two may be None. `size`: (height,
    width) in px, of a video (frames, height, width), and its `timing`. `known`: the key, where the inputs are not
    there."""

    layout: Layout
    inputs: Arrays | None
    size: tuple[int, ...]
    timing: Timing | None = None
    features: Arrays | None = None
    known: int | None = None

    @cached_property
    def key(self) -> int:
        """A number of 64 bits for the content."""
        if self.known is not None:
            return self.known
        hasher = xxhash.xxh3_64(f"{self.layout.text} {self.layout.rows} {self.layout.cols}".encode())
        for name, array in (self.inputs or {}).items():
            hasher.update(f"{name} {array.shape}".encode())
            hasher.update(np.ascontiguousarray(array).data.cast("B"))
        return hasher.intdigest()

    def numbers(self, texts: Arrays) -> np.ndarray:
        """[tokens] int64 below zero, one for each of its tokens; of other content others. `texts`: what stages get of
        the text beside it."""
        seed = xxhash.xxh3_64(self.key.to_bytes(8, "little"))
        for array in texts.values():
            seed.update(array.tobytes())
        start = seed.intdigest() >> 1
        return -1 - ((start + np.arange(self.layout.tokens, dtype=np.uint64)) & np.uint64(2**62 - 1)).astype(np.int64)


class Viewer:
    """Shows images and videos as one model sees them."""

    def __init__(self, spec: ImageSpec, fast_jpeg: bool = False, model: str = ""):
        """`fast_jpeg`: decode large JPEG files at a smaller scale, see `load_image`; `model`: whose encoded images it
        takes."""
        self._spec, self._fast_jpeg, self._model = spec, fast_jpeg, model

    def show(self, sources: Sequence[Source]) -> tuple[Shown, ...]:
        """What becomes of all that a prompt shows; raises ImageError that names which of them it is."""
        images = sum(kind_of(source) == "image" for source in sources)
        found: list[Shown] = []
        for i, source in enumerate(sources):
            try:
                found.append(self._shown(source, images))
            except ImageError as error:
                if len(sources) == 1:
                    raise
                raise ImageError(f"{kind_of(source)} {i + 1} of {len(sources)}: {error.message}", error.fix) from error
        return _on_one_canvas(found) if self._spec.whole else tuple(found)

    def _shown(self, source: Source, images: int) -> Shown:
        spec = self._spec
        if isinstance(source, EncodedImage):
            if source.model != self._model:
                raise ImageError("an encoded image of another bundle, or another target", "encode it with this one")
            # Some models see one of several images otherwise than one alone.
            if images < 2 or not spec.seen_together or kind_of(source) == "video":
                return source.shown
            assert source.source is not None
            source = source.source
        if isinstance(source, (Video, VideoFile)):
            layout, made, size, timing = self._video(source)
        else:
            layout, made, size, timing = self._image(source, images)
        for name, shape in spec.inputs.items():
            found = made[name].shape[1:]
            if (found[:1] if spec.whole else found) != (shape[:1] if spec.whole else shape):
                raise BundleError(
                    f"the transforms give {name} of {found}, the model takes {shape}", "export the bundle again"
                )
        return Shown(layout, made, size, timing)

    def _image(self, source: ImageSource, images: int) -> tuple[Layout, Arrays, tuple[int, ...], Timing | None]:
        spec = self._spec
        ways = spec.transforms_for(images), *(view.transforms for view in spec.views)
        (pixels, *views), size = self._transformed(source, ways)
        layout = layout_of(spec, *size, images)
        pixels = pixels if spec.tiles is None else filled(pixels, layout.slices)
        made = dict(zip((PIXELS, *(view.name for view in spec.views)), (pixels, *views), strict=True))
        if spec.shown is not None:
            made |= shown_inputs(spec.shown, cut_of(*size, spec.transforms_for(images)))
        return layout, made, size, None

    def _video(self, video: Video | VideoFile) -> tuple[Layout, Arrays, tuple[int, ...], Timing | None]:
        spec = self._spec.video
        assert spec is not None
        count, frames, timing = _frames_of(video, spec.sampling)
        patches, shared = spec.patches, shared_bounds(spec, count)
        transforms = spec.transforms if patches is None else (*spec.transforms[:-1], replace(patches, frames=1))
        made, sizes = list[np.ndarray](), list[tuple[int, int]]()
        for i, frame in enumerate(frames):
            try:
                (pixels,), size = self._transformed(frame, (transforms,), shared)
                if patches is not None and sizes and size != sizes[0]:
                    (height, width), first = size, f"{sizes[0][0]}×{sizes[0][1]}"
                    raise ImageError(f"{height}×{width} px, and the first is {first}", "give frames of one size")
            except ImageError as error:
                where = f"frame {i + 1} of {count}"
                raise ImageError(f"{where}: {error.message}", error.fix) from error
            made.append(pixels)
            sizes.append(size)
        layout = video_layout(self._spec, len(made), *sizes[0], timing)
        if patches is not None:
            made += [made[-1]] * (-len(made) % patches.frames)
            groups = (made[i : i + patches.frames] for i in range(0, len(made), patches.frames))
            made = [frames_joined(group, self._spec.channels) for group in groups]
        return layout, {PIXELS: np.concatenate(made)}, (count, *sizes[0]), timing

    def _transformed(
        self, source: ImageSource, ways: Sequence[Sequence[Transform]], frames: tuple[int, int] = (1, 1)
    ) -> tuple[list[np.ndarray], tuple[int, int]]:
        """What several ways make of an image, and its size (height, width) as it is before it was decoded at a smaller
        scale; `frames` as of `Cut`."""
        sizes = list[tuple[int, int]]()

        def wanted(height: int, width: int) -> tuple[int, int] | None:
            firsts = [size for transforms in ways if (size := first_size(height, width, transforms, frames))]
            if len(firsts) < len(ways):
                return None
            sizes.append((height, width))
            return max(height for height, _ in firsts), max(width for _, width in firsts)

        image = load_image(source, wanted) if self._fast_jpeg else load_image(source)
        size = sizes[0] if sizes else (image.height, image.width)
        return [apply_transforms(image, transforms, size, frames) for transforms in ways], size


def _frames_of(
    video: Video | VideoFile, sampling: FrameSampling | None
) -> tuple[int, Iterable[ImageSource], Timing | None]:
    """How many, which, and when: those of a file are decoded as they are asked for."""
    if isinstance(video, Video):
        return len(video.frames), video.frames, video.timing
    clip = video.clip(sampling)
    return len(clip.times), clip.frames(), timing_of(len(clip.times), clip.times, None, clip.duration)


def _on_one_canvas(shown: Sequence[Shown]) -> tuple[Shown, ...]:
    """Images that are left whole, each [1, C, height, width], on canvases of zeros of one size, at the top left."""
    if len(shown) < 2:
        return tuple(shown)
    pixels = [one.inputs[PIXELS] for one in shown if one.inputs is not None]
    size, made = np.max([array.shape[1:] for array in pixels], axis=0), []
    for one, layout, array in zip(shown, on_one_canvas([one.layout for one in shown]), pixels, strict=True):
        canvas = np.zeros((1, *size), np.float32)
        canvas[:, :, : array.shape[2], : array.shape[3]] = array
        made.append(replace(one, layout=layout, inputs={PIXELS: canvas}))
    return tuple(made)
