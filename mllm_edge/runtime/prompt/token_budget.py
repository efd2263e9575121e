"""Image tokens within bounds: a model's own settings of pixels and tiles, changed until an image's tokens fit.

What an image becomes is what the model's own processor makes of it under the changed setting: fewer pixels where images
keep their shape, fewer tiles where they are cut into some. An image that fits already is left as it is.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mllm_edge.errors import ImageError, OptionError
from mllm_edge.runtime.numbers import whole
from mllm_edge.runtime.prompt.layout import layout_of
from mllm_edge.spec import (
    CoverTiles,
    FillTiles,
    FitPatches,
    FitTiles,
    ImageSpec,
    PadToMultiple,
    Resize,
    ResizeLongestEdge,
    ResizeToMultiple,
    ResizeToPixels,
    ResizeWithin,
    SelectResolution,
    SelectTiles,
    ShrinkInto,
    SplitLarge,
    SplitTiles,
    Transform,
)

__all__ = ["FREE", "TokenBudget", "budget_of", "settings_of", "within"]

Chain = tuple[Transform, ...]


@dataclass(frozen=True)
class TokenBudget:
    """The `most` and the `least` tokens that an image becomes; None: as the model's own settings have it."""

    most: int | None = None
    least: int | None = None

    def over(self, other: "TokenBudget") -> "TokenBudget":
        """This one, with the bounds of the `other` where it has none."""
        most, least = (b if a is None else a for a, b in ((self.most, other.most), (self.least, other.least)))
        return budget_of(most, least)

    def at_most(self, tokens: int | None) -> "TokenBudget":
        """This one, with so many tokens at most, where it does not have fewer."""
        bounds = [most for most in (self.most, tokens) if most is not None]
        return TokenBudget(min(bounds, default=None), self.least)


FREE = TokenBudget()


def budget_of(most: Any, least: Any) -> TokenBudget:
    """The options max_image_tokens and min_image_tokens as one value; raises OptionError."""
    most = None if most is None else whole("max_image_tokens", most, 1)
    least = None if least is None else whole("min_image_tokens", least, 1, most)
    return TokenBudget(most, least)


def within(image: ImageSpec, height: int, width: int, budget: TokenBudget, images: int = 1) -> ImageSpec:
    """The spec under which one of so many `images` of a prompt, `height` × `width` px (upright), keeps the budget: with
    the largest of the model's settings that does.

    Raises OptionError that names the least (or most) tokens where none does, ImageError as `layout_of`.
    """
    if budget == FREE:
        return image
    chain, told = image.transforms_for(images), f"an image of {height}×{width} px"

    def tokens(chain: Chain) -> int:
        return layout_of(_with(image, chain, images), height, width, images).tokens

    found = tokens(chain)
    if budget.least is not None:
        chain, found = _raised(chain, budget.least, found, tokens)
        if found < budget.least:
            raise OptionError(
                f"{told} has {found} tokens at most, and min_image_tokens is {budget.least}",
                f"give min_image_tokens={found} or less, or a larger image",
            )
    if budget.most is None or found <= budget.most:
        return _with(image, chain, images)
    kept, fewest = _lowered(chain, found, budget.most, tokens)
    if kept is not None:
        return _with(image, kept, images)
    fits = True
    while fits:  # the way down to what is asked for may have missed what is almost there
        kept, fewer = _lowered(chain, found, fewest - 1, tokens)
        fewest, fits = min(fewest, fewer), kept is not None
    beside = "" if budget.least is None else f" with min_image_tokens={budget.least}"
    raise OptionError(
        f"{told} has {fewest} tokens at least{beside}, and max_image_tokens is {budget.most}",
        f"give max_image_tokens={fewest} or more",
    )


def settings_of(image: ImageSpec, bounded: ImageSpec) -> dict[str, Any]:
    """The settings that `within` has changed, by their names in the transforms."""
    found: dict[str, Any] = {}
    chains = [(image.transforms, bounded.transforms), (image.several or (), bounded.several or ())]
    for before, after in chains:
        ops = {transform.op: transform for transform in before}
        for transform in after:
            own = ops.get(transform.op)
            for name, value in vars(transform).items():
                if name != "resample" and (own is None or getattr(own, name) != value):
                    found[name] = value
    return found


def _with(image: ImageSpec, chain: Chain, images: int) -> ImageSpec:
    """The spec with that chain for each of so many images."""
    if chain == image.transforms_for(images):
        return image
    if image.several is None or images < 2:
        return replace(image, transforms=chain)
    return replace(image, several=chain)


# ---------------------------------------------------------------- at least
def _raised(chain: Chain, least: int, found: int, tokens: Callable[[Chain], int]) -> tuple[Chain, int]:
    """The chain with its own lower bound at so many tokens, and what the image then has."""
    for i, transform in enumerate(chain):
        larger: Transform | None = None
        if isinstance(transform, ResizeToPixels):
            larger = replace(transform, min_pixels=min(least * transform.multiple**2, transform.max_pixels))
        elif isinstance(transform, SplitLarge):
            larger = replace(transform, min_cells=min(least, transform.max_cells))
        if larger is not None:
            with suppress(ImageError):  # rounded up, it would have more cells than the model takes
                return _put(chain, i, larger), tokens(_put(chain, i, larger))
        if isinstance(transform, SelectTiles):
            for count in range(transform.min_tiles + 1, transform.max_tiles + 1):
                if found >= least:
                    break
                chain = _put(chain, i, replace(transform, min_tiles=count))
                found = tokens(chain)
    return chain, found


# ---------------------------------------------------------------- at most
def _lowered(chain: Chain, found: int, most: int, tokens: Callable[[Chain], int]) -> tuple[Chain | None, int]:
    """The chain under which an image of `found` tokens has at most so many, None where there is none, and the fewest
    that it had on the way."""
    fewest = found
    while found > most:
        smaller = _narrowed(chain, most)
        try:
            found = 0 if smaller is None else tokens(smaller)
        except ImageError:  # so narrow an image has no shape of so few pixels
            smaller = None
        if smaller is None:
            return None, fewest
        chain, fewest = smaller, min(fewest, found)
    return chain, fewest


def _narrowed(chain: Chain, most: int) -> Chain | None:
    """The chain with the next smaller setting, for images that may have so many tokens; None: the model has none."""
    for i, transform in enumerate(chain):
        rule = _NEXT.get(type(transform))
        smaller = None if rule is None else rule(transform, most)
        if smaller is not None:
            return _put(chain, i, smaller)
        if isinstance(transform, ShrinkInto):
            return _less_of_a_page(chain, i, transform)
        if isinstance(transform, SplitTiles):
            return _fewer_parts(chain, transform)
    return None


def _put(chain: Chain, place: int, transform: Transform) -> Chain:
    return (*chain[:place], transform, *chain[place + 1 :])


def _next_cells(own: int, least: int, most: int) -> int | None:
    """Of an upper bound of `own` cells the next smaller one: first what may be, then one less each time, for an image
    that is far longer than wide has more cells than its bound."""
    cells = max(least, min(most, own - 1))
    return cells if cells < own else None


def _fewer_pixels(transform: ResizeToPixels, most: int) -> Transform | None:
    cell = transform.multiple**2
    cells = _next_cells(transform.max_pixels // cell, max(1, math.ceil(transform.min_pixels / cell)), most)
    return None if cells is None else replace(transform, max_pixels=cells * cell)


def _fewer_tiles(transform: Any, most: int) -> Transform | None:
    fewer = transform.max_tiles - 1
    if fewer < getattr(transform, "min_tiles", 1):
        return None
    made: Transform = replace(transform, max_tiles=fewer)
    return made


def _one_tile(transform: FillTiles, most: int) -> Transform:
    """Behind the overview there is one tile at least: without any, the image is stretched to one."""
    return _fewer_tiles(transform, most) or Resize(transform.size, transform.size, transform.resample)


def _smaller_resolutions(transform: SelectResolution, most: int) -> Transform | None:
    size = transform.size
    tiles = [height // size * (width // size) for height, width in transform.resolutions]
    if max(tiles) == 1:
        return None
    fewer = [resolution for resolution, n in zip(transform.resolutions, tiles, strict=True) if n < max(tiles)]
    return replace(transform, resolutions=tuple(fewer) or ((size, size),))


def _fewer_cells(transform: SplitLarge, most: int) -> Transform | None:
    if transform.max_tiles > 1:
        fewer = transform.max_tiles - 1
        return replace(transform, max_tiles=fewer if fewer >= max(2, transform.min_tiles) else 1)
    cells = _next_cells(transform.max_cells, max(1, transform.min_cells), most)
    return None if cells is None else replace(transform, max_cells=cells)


def _not_quartered(transform: FitPatches, most: int) -> Transform | None:
    return replace(transform, quarters=False) if transform.quarters else None


def _shorter(transform: ResizeWithin, most: int) -> Transform | None:
    longest = (math.ceil(transform.longest_edge / transform.multiple) - 1) * transform.multiple
    return replace(transform, longest_edge=longest) if longest else None


def _less_of_a_page(chain: Chain, place: int, transform: ShrinkInto) -> Chain | None:
    """A page that is one patch lower, its width in proportion."""
    patch = next((t.multiple for t in chain if isinstance(t, PadToMultiple)), 1)
    height = (math.ceil(transform.height / patch) - 1) * patch
    width = max(1, round(transform.width * height / transform.height / patch)) * patch
    return _put(chain, place, replace(transform, height=height, width=width)) if height else None


def _fewer_parts(chain: Chain, transform: SplitTiles) -> Chain | None:
    """The longest side, which all images are brought to, one tile shorter; without such, no image is cut."""
    longest = next((t for t in chain if isinstance(t, ResizeLongestEdge)), None)
    if longest is not None:
        edge = (math.ceil(longest.longest_edge / transform.size) - 1) * transform.size
        return _put(chain, chain.index(longest), replace(longest, longest_edge=edge)) if edge else None
    whole = Resize(transform.size, transform.size, transform.resample)
    return tuple(whole if t is transform else t for t in chain if not isinstance(t, ResizeToMultiple))


_NEXT: Mapping[type, Callable[[Any, int], Transform | None]] = {
    ResizeToPixels: _fewer_pixels,
    SelectTiles: _fewer_tiles,
    CoverTiles: _fewer_tiles,
    FitTiles: _fewer_tiles,
    FillTiles: _one_tile,
    SelectResolution: _smaller_resolutions,
    SplitLarge: _fewer_cells,
    FitPatches: _not_quartered,
    ResizeWithin: _shorter,
}
