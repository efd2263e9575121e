"""Bounds on image tokens: kept by every family, and met as transformers' own processor meets the same setting."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mllm_edge.errors import ImageError, OptionError
from mllm_edge.export.checkpoint.config import load_config
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import families, family_for, open_weights, understand
from mllm_edge.runtime.prompt.layout import layout_of
from mllm_edge.runtime.prompt.shown import Viewer
from mllm_edge.runtime.prompt.token_budget import FREE, TokenBudget, settings_of, within
from mllm_edge.spec import PIXELS, ImageSpec
from tests.families.parity import make_image
from tests.families.row import families_of
from tests.timm_reference import stand_in_for_timm

# (height, width): tiny, odd, narrow in both directions, and pages.
SIZES = [(1, 1), (7, 3), (48, 64), (50, 71), (37, 301), (301, 37), (480, 640), (1080, 1920), (2000, 900)]
BOUNDS = (1, 3, 5, 9, 16, 17, 20, 36, 50, 64, 100, 200, 500)


@pytest.fixture(scope="module")
def image_of(saved: Callable[..., Path]) -> Callable[[str], ImageSpec]:
    """What becomes of images, of a family's first tiny checkpoint; nothing is exported."""
    stand_in_for_timm()

    def found(family: str) -> ImageSpec:
        source = open_source(str(saved(family)))
        image = understand(source, open_weights(source)).model.image
        assert image is not None
        return image

    return found


def told(error: OptionError, bound: str) -> int:
    """The tokens that an image has at least, or at most, as an error says it in both parts."""
    found = re.search(rf"has (\d+) tokens at {bound}", error.message)
    assert found is not None
    assert f"={found[1]} or " in error.fix
    return int(found[1])


@pytest.mark.parametrize("family", families_of(""))
def test_no_image_has_more_tokens_than_it_may(family: str, image_of: Callable[[str], ImageSpec]) -> None:
    image = image_of(family)
    for images in (1, 2):
        for size in SIZES:
            try:
                own = layout_of(image, *size, images).tokens
            except ImageError:  # the model takes no image of such a shape
                continue
            for most in BOUNDS:
                try:
                    bounded = within(image, *size, TokenBudget(most), images)
                except OptionError as error:
                    least = told(error, "least")
                else:
                    assert (bounded is image) == (own <= most), "what fits is left as it is"
                    assert layout_of(bounded, *size, images).tokens <= most
                    continue
                assert least > most
                bounded = within(image, *size, TokenBudget(least), images)
                assert layout_of(bounded, *size, images).tokens == least


@pytest.mark.parametrize("family", families_of(""))
def test_least_tokens_are_had_or_refused(family: str, image_of: Callable[[str], ImageSpec]) -> None:
    image = image_of(family)
    for size in ((16, 16), (48, 64), (480, 640)):
        try:
            own = layout_of(image, *size).tokens
        except ImageError:
            continue
        for least in (1, own, own + 1, 2 * own):
            try:
                found = layout_of(within(image, *size, TokenBudget(None, least)), *size).tokens
            except OptionError as error:
                most = told(error, "most")
            else:
                assert found >= least
                continue
            assert own <= most < least


def test_both_bounds_at_once(image_of: Callable[[str], ImageSpec]) -> None:
    image = image_of("qwen2_vl")  # 4 to 64 cells of 16 px
    assert layout_of(image, 20, 20).tokens == 4
    assert layout_of(within(image, 20, 20, TokenBudget(20, 16)), 20, 20).tokens == 16
    assert layout_of(within(image, 20, 20, TokenBudget(2, 1)), 20, 20).tokens == 1  # the model's own least is another
    with pytest.raises(OptionError, match="has 16 tokens at least with min_image_tokens=16, and"):
        within(image, 20, 20, replace(TokenBudget(15), least=16))
    tiles = image_of("internvl")  # 16 tokens a tile, up to six and the whole
    assert layout_of(tiles, 32, 32).tokens == 16
    assert layout_of(within(tiles, 32, 32, TokenBudget(None, 70)), 32, 32).tokens == 80


# ---------------------------------------------------------------- beside transformers
def of_pixels(told: dict[str, Any]) -> dict[str, Any]:
    """Qwen's and GLM's bounds."""
    return {"size": {"shortest_edge": 1024, "longest_edge": told["max_pixels"]}}


# Of each kind of rule: the tokens of an image, its (height, width), and transformers' names for what is told.
CASES: dict[str, tuple[int, tuple[int, int], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "qwen2_vl": (20, (190, 330), of_pixels),
    "qwen2_5_vl": (9, (90, 41), of_pixels),
    "emu3": (30, (190, 330), lambda told: {"max_pixels": told["max_pixels"]}),
    "idefics3": (40, (97, 150), lambda told: {"size": {"longest_edge": told["longest_edge"]}}),
    "internvl": (90, (130, 97), lambda told: {"max_patches": told["max_tiles"]}),
    "aya_vision": (27, (240, 320), lambda told: {"max_patches": told["max_tiles"]}),
    "ovis2": (30, (97, 211), lambda told: {"max_patches": told["max_tiles"]}),
    "granite_docling": (12, (97, 131), lambda told: {"max_patches": told["max_tiles"]}),
    "llava_next": (100, (97, 131), lambda told: {"image_grid_pinpoints": list(map(list, told["resolutions"]))}),
    "llava_onevision": (100, (97, 131), lambda told: {"image_grid_pinpoints": list(map(list, told["resolutions"]))}),
    "idefics2": (3, (97, 131), lambda told: {"do_image_splitting": told["quarters"]}),
    "mistral3": (12, (190, 330), lambda told: {"size": {"longest_edge": told["longest_edge"]}}),
    "lighton_ocr": (12, (190, 330), lambda told: {"size": {"longest_edge": told["longest_edge"]}}),
    "fuyu": (40, (190, 330), lambda told: {"size": {"height": told["height"], "width": told["width"]}}),
}


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.xdist_group(f"bundle-{f}")) for f in CASES])
def test_pixels_are_those_of_the_source_librarys_setting(
    family: str, saved: Callable[..., Path], image_of: Callable[[str], ImageSpec]
) -> None:
    most, size, translated = CASES[family]
    image, picture = image_of(family), make_image(*size, 0)
    bounded = within(image, *size, TokenBudget(most))
    (shown,) = Viewer(image).show([picture], TokenBudget(most))
    assert bounded != image

    source = open_source(str(saved(family)))
    processor = family_for(source).load_processor(source)
    for name, value in translated(settings_of(image, bounded)).items():
        setattr(processor.image_processor, name, value)
    text = image.prompt.inline.replace("{image}", image.prompt.written)
    inputs = processor(text=text, images=[[picture]], return_tensors="pt")
    tokens = int((inputs["input_ids"] == image.prompt.token_id).sum())
    assert tokens == shown.layout.tokens <= most
    model: Any = SimpleNamespace(config=load_config(source))
    if family in ("llava_next", "llava_onevision"):
        model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
    expected = families()[source.model_type].pixel_values(model, inputs).numpy()
    assert shown.inputs is not None
    found = shown.inputs[PIXELS]
    assert expected.size == found.size
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=0.02)


def test_a_bound_that_an_image_keeps_changes_nothing(image_of: Callable[[str], ImageSpec]) -> None:
    image = image_of("internvl")
    picture = make_image(64, 64, 0)
    (free,), (bound,) = Viewer(image).show([picture]), Viewer(image).show([picture], TokenBudget(500))
    assert (free.key, free.budget, bound.budget) == (bound.key, FREE, TokenBudget(500))
    (less,) = Viewer(image).show([picture], TokenBudget(20))
    assert less.key != free.key
    assert not set(less.numbers({})) & set(free.numbers({}))
