"""One profile for each combination of values: prompt length, images, image size, output length, threads, speculation,
bundles."""

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_edge.bundle import Bundle
from mllm_edge.errors import PromptError
from mllm_edge.runtime.decode.speculation import MOST_GUESSED
from mllm_edge.runtime.numbers import whole
from mllm_edge.runtime.profiling.measure import TITLE, VERSION, Profile, profile, synthetic_image
from mllm_edge.runtime.prompt.image import ImageSource, load_image
from mllm_edge.runtime.prompt.tokenizer import Tokenizer

__all__ = ["KEYS", "Sweep", "parse_sweep", "points", "prompt_of", "run_sweep", "sweep_dict"]

Sweep = Mapping[str, Sequence[str | int]]

# What can be swept over, with what a value means.
KEYS: Mapping[str, str] = {
    "prompt": "tokens of the question, without template and images",
    "images": "how many images",
    "size": "WIDTHxHEIGHT of every image in px",
    "new": "tokens of the answer",
    "threads": "threads inside one operator",
    "speculation": "tokens that are guessed and checked in one step, at most",
    "bundle": "bundles, such as those of several precisions",
}
_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def parse_sweep(texts: Iterable[str], bundles: Sequence[str]) -> dict[str, list[str | int]]:
    """The values of each key from texts such as "new=32,128"; several bundles are the values of `bundle`.

    Raises ValueError for an unknown key, a key given twice and a value that does not fit, all of which it names.
    """
    found: dict[str, list[str | int]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}; there are: {', '.join(KEYS)}")
        if key in found:
            raise ValueError(f"{key} is given twice: write {key}=a,b")
        found[key] = [_value(key, value) for value in values.split(",")]
        if len(set(found[key])) < len(found[key]):
            raise ValueError(f"{key} has the same value twice: {values}")
    if len(bundles) > 1:
        if "bundle" in found:
            raise ValueError("bundles are named twice: as arguments, or by bundle=a,b")
        found["bundle"] = list(dict.fromkeys(bundles))
    return found


def points(sweep: Sweep) -> list[dict[str, str | int]]:
    """Every combination of the values; the last key changes first."""
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def run_sweep(
    path: str | Path,
    prompt: str,
    images: Sequence[ImageSource] = (),
    sweep: Sweep | None = None,
    *,
    new_tokens: int = 128,
    threads: int | None = None,
    speculation: int = 0,
    notice: Callable[[str], None] = warnings.warn,
    **options: Any,
) -> list[Profile]:
    """The profile of every point; without a sweep, of the one there is. Options as in `profile`; the bundle is opened
    anew for each point, in this process, so that only the first load includes the engine's import.

    Everything that a point asks for is made before the first measurement. Raises what `profile` raises.
    """
    plans = []
    for point in points(sweep or {}):
        bundle = str(point.get("bundle", path))
        question = prompt_of(bundle, prompt, int(point["prompt"])) if "prompt" in point else prompt
        plans.append((point, bundle, question, _images(bundle, images, point)))
    return [
        replace(
            profile(
                bundle,
                question,
                pictures,
                new_tokens=int(point.get("new", new_tokens)),
                threads=int(point["threads"]) if "threads" in point else threads,
                speculation=int(point.get("speculation", speculation)),
                notice=notice,
                **options,
            ),
            point=point,
        )
        for point, bundle, question, pictures in plans
    ]


def sweep_dict(sweep: Sweep, profiles: Sequence[Profile]) -> dict[str, Any]:
    """The JSON form, as profile.schema.json says."""
    values = {key: list(values) for key, values in sweep.items()}
    return {"version": VERSION, "sweep": values, "profiles": [p.as_dict() for p in profiles]}


def prompt_of(path: str | Path, text: str, tokens: int) -> str:
    """The text repeated and cut until it has so many tokens, or the most below them that whole characters make."""
    whole("prompt", tokens, 1)
    bundle = Bundle.load(path)
    tokenizer = Tokenizer.load(bundle.path, bundle.generation())
    if not text.strip():
        raise PromptError("an empty prompt cannot be repeated", 'give --prompt "TEXT"')
    repeated = f"{text.strip()} "
    while _count(tokenizer, repeated) <= tokens:
        repeated += repeated
    low, high = 1, len(repeated)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(tokenizer, repeated[:middle]) <= tokens else (low, middle)
    return repeated[:low]


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def _value(key: str, text: str) -> str | int:
    if key == "bundle":
        if not text:
            raise ValueError("bundle=a,b names folders")
        return text
    if key == "size":
        if not _SIZE.fullmatch(text):
            raise ValueError(f"size={text}: write WIDTHxHEIGHT, such as 640x480")
        return text
    if key == "speculation":
        if not text.isdecimal() or int(text) > MOST_GUESSED:
            raise ValueError(f"speculation={text}: {KEYS[key]}, a whole number from 0 to {MOST_GUESSED}")
        return int(text)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{key}={text}: {KEYS[key]}, a whole number from 1 on")
    return int(text)


def _images(path: str, given: Sequence[ImageSource], point: Mapping[str, str | int]) -> list[ImageSource]:
    """The images of a point: those given or a synthetic one, as often as wanted, in the size wanted."""
    if not {"images", "size"} & set(point):
        return list(given)
    if Bundle.load(path).manifest.model.image is None:
        raise PromptError(f"{path} takes no images", "leave images and size out of --sweep")
    size = _SIZE.fullmatch(str(point.get("size", "")))
    if size is not None:
        width, height = int(size[1]), int(size[2])
        pictures: list[ImageSource] = [_resized(image, width, height) for image in given]
        pictures = pictures or [synthetic_image(width, height)]
    else:
        pictures = list(given) or [synthetic_image()]
    count = int(point.get("images", len(pictures)))
    return list(itertools.islice(itertools.cycle(pictures), count))


def _resized(source: ImageSource, width: int, height: int) -> Image.Image:
    image = load_image(source).resize((width, height), Image.Resampling.BICUBIC)
    image.info[TITLE] = f"{source if isinstance(source, (str, Path)) else 'image'} at {width} x {height} px"
    return image
