"""Whether what a manifest says of images can be."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from mllm_edge.spec import (
    MOST_PIXELS,
    PIXELS,
    AspectRatioId,
    FitCanvas,
    FrameSampling,
    GridMerge,
    GridWindows,
    ImageSpec,
    LearnedPositions,
    ModelSpec,
    SelectResolution,
    ShownPatches,
    Shrink,
    Table,
    Transform,
    Trim,
    VideoSpec,
    View,
)

__all__ = ["LARGEST", "image_problems", "positive", "sampling_problems"]

LARGEST = (1 << 31) - 1  # of any size
_TABLE_INPUTS = {"grid_rope": 2, "grid_windows": 3, "grid_merge": 1, "learned_positions": 1, "aspect_ratio_id": 1}
_LARGEST_WINDOW = 64  # patches along a side: the bias of a window is that to the fourth power
_MOST_TILES = 1024  # of a canvas
_CUTTING = {
    *("split_tiles", "select_tiles", "cover_tiles", "fill_tiles", "select_resolution"),
    *("fit_canvas", "fit_tiles", "whole_before", "split_large", "fit_patches", "patchify"),
}
_MOST_FRAMES = 1000  # a second
_MAY_BE_ZERO = {"min_pixels"}  # of the sizes of transforms


def image_problems(image: ImageSpec, model: ModelSpec) -> Iterator[str]:
    """What of an image's specification cannot be, or contradicts the model."""
    prompt = image.prompt
    for name in ("height", "width"):
        yield from positive(f"model.image.{name}", getattr(image, name))
    if image.channels != 3:
        yield f"images of {image.channels} channels: they are RGB"
    yield from positive("model.image.features", image.features)
    if not 0 <= prompt.token_id < model.embedding.rows:
        yield f"image token {prompt.token_id} of {model.embedding.rows}"
    if not prompt.token:
        yield "the image token has no text"
    if image.around is not None and (
        not image.around.ids or any(not 0 <= token < model.embedding.rows for token in image.around.ids)
    ):
        yield f"tokens {list(image.around.ids)} around images, of {model.embedding.rows}"
    if not image.transforms:
        yield "images are not transformed"
    video = image.video.transforms if image.video is not None else ()
    views = [transform for view in image.views for transform in view.transforms]
    for k, transform in enumerate((*image.transforms, *(image.several or ()), *video, *views)):
        for field in dataclasses.fields(transform):
            for number in _numbers(getattr(transform, field.name)):
                where = f"model.image.transforms[{k}].{field.name}"
                free = field.name == "mean" or (field.name == "color" and 0 <= number <= 255)
                if not math.isfinite(number) or (number <= 0 and not free and field.name not in _MAY_BE_ZERO):
                    yield f"{where} is {number}"
                elif abs(number) > LARGEST:
                    yield f"{where} is {number:.3g}"
        lengths = [len(getattr(transform, name)) for name in ("mean", "std", "color") if hasattr(transform, name)]
        if any(length != image.channels for length in lengths):
            yield f"model.image.transforms[{k}] is not for {image.channels} channels"
    yield from _order(image.transforms)
    if image.several is not None:
        yield from _order(image.several)
    if image.video is not None:
        yield from _video(image, image.video, model)
    if image.patches is not None and (image.height, image.width) != (image.patches.patch * image.patches.merge,) * 2:
        yield f"cells of {image.height} x {image.width} px from patches of {image.patches.patch} px"
    if image.resampled and (image.patches is None or image.into != "tokens"):
        yield "features are made of grids of cells, and images are none, or are looked at"
    for step in image.pack:
        if isinstance(step, Shrink):
            yield from positive("model.image.pack.most", step.most)
        if isinstance(step, Trim):
            yield from positive("model.image.pack.side", step.side)
            if image.height % max(step.side * math.isqrt(image.features), 1):
                yield f"features of {step.side} x {step.side} patches of a tile of {image.height} px"
    if image.most_images is not None:
        yield from positive("model.image.most_images", image.most_images)
    if image.whole:
        yield from _whole(image, model)
    if image.pack and (image.patches is not None or math.isqrt(image.features) ** 2 != image.features):
        yield f"features are packed, and {image.features} of a tile are no square"
    shown = image.shown.names if image.shown is not None else ()
    names = [*shown, *(view.name for view in image.views), *(name for table in image.tables for name in table.names)]
    if image.text is not None:
        names.append(image.text.name)
        yield from positive("model.image.text.most", image.text.most)
    if len(set(names)) != len(names) or PIXELS in names:
        yield f"several inputs of images are called {names}"
    merges = sum(isinstance(table, GridMerge) for table in image.tables)
    if merges > 1 or (merges and (model.positions.images == "grid" or image.video is not None)):
        yield "cells are merged more than once, or their grid gives positions, or videos are shown as well"
    if image.shown is not None:
        yield from _shown(image.shown, image)
    for view in image.views:
        yield from _view(view, image)
    for table in image.tables:
        yield from _table(table, image)
    yield from _canvas(image)


def _whole(image: ImageSpec, model: ModelSpec) -> Iterator[str]:
    cut = [t.op for t in (*image.transforms, *(image.several or ())) if t.op in _CUTTING]
    if cut or image.tables or image.views or image.tiles or image.video or image.into != "tokens":
        yield f"images are left whole, and are cut ({', '.join(cut)}), have tables or views, or are looked at"
    if image.features != 1 or any(stage.per == "slice" for stage in model.stages):
        yield f"images are left whole: a cell makes {image.features} features, or stages take several images at once"


def _video(image: ImageSpec, video: VideoSpec, model: ModelSpec) -> Iterator[str]:
    yield from _order(video.transforms)
    if video.sampling is not None:
        yield from sampling_problems(video.sampling)
    if not video.transforms or not video.token or video.written == image.prompt.written:
        yield "videos are not transformed, or have no placeholder of their own"
    if "{image}" not in video.frame or (video.features is None and (video.frame != "{image}" or video.between)):
        yield f"a frame of a video is written {video.frame!r}"
    if (video.together or video.rate is not None) and video.patches is None:
        yield "frames of a video share bounds or follow a clock, and are no cells of patches"
    alike = video.token == image.prompt.token
    if not 0 <= video.token_id < model.embedding.rows or (video.token_id == image.prompt.token_id) != alike:
        yield f"video token {video.token_id} of {model.embedding.rows}"
    if video.features is not None:
        yield from positive("model.image.video.features", video.features)
        if video.end or video.patches != image.patches:
            yield "a video's features are its tokens, and something stands behind them, or its cells are not images'"
    elif image.patches is not None or math.isqrt(image.features) ** 2 != image.features:
        yield f"a video's features are pooled, and {image.features} of a frame are no square"


def sampling_problems(sampling: FrameSampling) -> Iterator[str]:
    """What of the frames that are taken of a recording cannot be."""
    numbers = {name: getattr(sampling, name) for name in ("frames", "least", "most", "multiple")}
    wrong = [name for name, n in numbers.items() if n is not None and not (type(n) is int and 1 <= n <= LARGEST)]
    for name, least, most in (("fps", 1 / LARGEST, _MOST_FRAMES), ("seconds", 0, LARGEST), ("shift", 0, LARGEST)):
        n = getattr(sampling, name)
        if n is not None and not (type(n) in (int, float) and least <= n <= most):
            wrong.append(name)
    for name in wrong:
        yield f"{name} = {getattr(sampling, name)!r} of the frames of a video"
    if not wrong and sampling.most is not None and sampling.most < max(sampling.least, sampling.multiple):
        yield f"{max(sampling.least, sampling.multiple)} frames of a video at least, and {sampling.most} at most"


def _view(view: View, image: ImageSpec) -> Iterator[str]:
    """Beside an image that is one slice."""
    yield from _order(view.transforms)
    for name in ("height", "width"):
        yield from positive(f"{view.name}.{name}", getattr(view, name))
    if not view.transforms:
        yield f"the view {view.name} is not transformed"
    cut = [t.op for t in (*image.transforms, *(image.several or ()), *view.transforms) if t.op in _CUTTING]
    if cut or image.tiles is not None or image.video is not None:
        yield f"{view.name} is made of whole images, and these are cut ({', '.join(cut)}), filled up or a video's"


def _shown(shown: ShownPatches, image: ImageSpec) -> Iterator[str]:
    """Beside tiles that an image does not fill, and the overview before them."""
    for name in ("patch", "side"):
        yield from positive(f"shown patches' {name}", getattr(shown, name))
    if not {"fit_tiles", "whole_before"} <= {t.op for t in image.transforms} or image.several or image.video:
        yield "patches that show something are told, and images are not fitted into tiles"
    elif len(shown.names) != 2 or shown.patch < 1 or image.height % shown.patch or image.width % shown.patch:
        yield f"patches of {shown.patch} px of tiles of {image.height} x {image.width} px, and inputs {shown.names}"
    yield from _bounds(shown.bounds, shown.side)


def _bounds(bounds: tuple[float, ...] | None, side: int) -> Iterator[str]:
    """Where learned positions begin."""
    found = [*(bounds or ())]
    if len(found) >= max(side, 1) or found != sorted(found) or not all(0 < bound < 1 for bound in found):
        yield f"{len(found)} bounds of {side} learned positions along a side"


def _canvas(image: ImageSpec) -> Iterator[str]:
    """Where the number of tiles is fixed, and where features go."""
    if image.tiles is not None:
        most = [t.max_tiles for t in (*image.transforms, *(image.several or ())) if isinstance(t, FitCanvas)]
        if max(most, default=0) != image.tiles:
            yield f"images have {image.tiles} tiles, and the transforms make up to {max(most, default=0)}"
    if image.into == "cross_attention" and (image.pack or image.patches is not None):
        yield "cross-attention looks at images, and these are packed or cut into cells"


def _order(transforms: Sequence[Transform]) -> Iterator[str]:
    """Pixels are moved first, then their values are computed, then they are cut into patches."""
    ranks = {"rescale": 1, "normalize": 2, "patchify": 3, "whole_before": 3}
    order = [ranks.get(transform.op, 0) for transform in transforms]
    if order != sorted(order) or any(order.count(rank) > 1 for rank in (1, 2, 3)):
        yield f"the transforms {', '.join(t.op for t in transforms)} are not in an order that can be"
    for t in transforms:
        if t.op in ("select_tiles", "split_large") and t.min_tiles > t.max_tiles:
            yield f"{t.min_tiles} to {t.max_tiles} tiles"
        if t.op == "split_large" and t.min_cells > t.max_cells:
            yield f"{t.min_cells} to {t.max_cells} cells"
        if t.op == "split_large" and t.max_tiles > 1 and (t.min_tiles < 2 or t.size % t.cell):
            yield f"large images are cut into {t.min_tiles} tiles of {t.size} px and cells of {t.cell} px"
        if t.op == "fit_patches" and not t.patch <= t.shortest <= t.longest:
            yield f"sides of {t.shortest} to {t.longest} px for patches of {t.patch} px"
        if t.op == "resize_to_pixels" and t.min_pixels > t.max_pixels:
            yield f"{t.min_pixels} to {t.max_pixels} pixels"
        if t.op == "select_resolution":
            yield from _resolutions(t)
        if t.op in ("fit_canvas", "fit_tiles") and (t.max_tiles > _MOST_TILES or t.max_tiles * t.size**2 > MOST_PIXELS):
            yield f"a canvas of up to {t.max_tiles} tiles of {t.size} px"


def _resolutions(transform: SelectResolution) -> Iterator[str]:
    if not transform.resolutions:
        yield "images are fitted into one of no resolutions"
    for resolution in transform.resolutions:
        whole = len(resolution) == 2 and all(side > 0 and side % transform.size == 0 for side in resolution)
        if not whole or math.prod(resolution) > MOST_PIXELS:
            yield f"a resolution of {list(resolution)} px for tiles of {transform.size} px"


def _table(table: Table, image: ImageSpec) -> Iterator[str]:
    if isinstance(table, AspectRatioId):
        if all(not isinstance(t, FitCanvas) or t.max_tiles != table.max_tiles for t in image.transforms):
            yield f"grids of up to {table.max_tiles} tiles are numbered, and the transforms make others"
    elif isinstance(table, GridWindows):
        patches = table.side * (image.patches.merge if image.patches is not None else 1)
        if table.side < 1 or patches > _LARGEST_WINDOW:
            yield f"windows of {table.side} cells along a side"
    elif isinstance(table, GridMerge):
        yield from positive("merged cells' side", table.side)
    elif isinstance(table, LearnedPositions):
        yield from positive("learned positions' side", table.side)
        yield from positive("learned positions' dim", table.dim)
        yield from _bounds(table.bounds, table.side)
    elif table.dim < 4 or table.dim % 4 or not math.isfinite(table.theta) or table.theta <= 0:
        yield f"a rope of dim {table.dim} and theta {table.theta} for images"
    if image.patches is None and not isinstance(table, AspectRatioId):
        yield f"images that are not cut into cells have the table {table.op}, which follows their grid"
    if len(table.names) != _TABLE_INPUTS[table.op]:
        yield f"{table.op} makes {_TABLE_INPUTS[table.op]} inputs, and {len(table.names)} have names"


def positive(where: str, number: int) -> Iterator[str]:
    """A size below 1, or beyond what any has."""
    if not 1 <= number <= LARGEST:
        yield f"{where} is {number}"


def _numbers(value: object) -> list[float]:
    values = value if isinstance(value, tuple) else (value,)
    return [number for number in values if isinstance(number, (int, float)) and not isinstance(number, bool)]
