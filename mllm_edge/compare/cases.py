"""What both sides of a comparison are asked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.runtime.prompt.layout import layout_of
from mllm_edge.spec import ModelSpec

__all__ = ["Case", "fitting", "synthetic_cases", "synthetic_frames"]

_SEED = 0
_TOKENS = 64  # of a question, and of its answer


@dataclass(frozen=True)
class Case:
    """A question and its images, as paths or as Pillow images; `description`: the words for it in a report."""

    prompt: str
    images: tuple[Any, ...] = ()
    description: str = ""


def synthetic_cases(takes_images: bool) -> list[Case]:
    """A question without images and, for models that take them, one with an image and one with two of unequal size."""
    random = np.random.default_rng(_SEED)

    def case(prompt: str, *sizes: tuple[int, int]) -> Case:
        images = tuple(_smooth(random, height, width) for height, width in sizes)
        shown = "".join(f", {width} x {height} px" for height, width in sizes)
        return Case(prompt, images, f"{prompt!r}{shown}")

    cases = [case("Name three colours.")]
    if takes_images:
        cases.append(case("What is in the picture?", (240, 320)))
        cases.append(case("Compare the two pictures.", (97, 131), (180, 77)))
    return cases


def fitting(cases: Iterable[Case], model: ModelSpec) -> list[Case]:
    """Those of `cases` that have no more images than the model takes, which leave room for a question and its answer in
    its context."""
    most = None if model.image is None else model.image.most_images
    taken = [case for case in cases if most is None or len(case.images) <= most]
    return [case for case in taken if _image_tokens(case, model) + _TOKENS <= model.context_length or not case.images]


def _image_tokens(case: Case, model: ModelSpec) -> int:
    image, pictures = model.image, case.images
    return 0 if image is None else sum(layout_of(image, p.height, p.width, len(pictures)).tokens for p in pictures)


def synthetic_frames() -> list[Image.Image]:
    """The frames of a short video."""
    random = np.random.default_rng(_SEED)
    return [_smooth(random, 90, 120) for _ in range(3)]


def _smooth(random: np.random.Generator, height: int, width: int) -> Image.Image:
    coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
