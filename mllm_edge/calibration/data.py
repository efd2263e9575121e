"""Calibration data: images with prompts, from a folder, a JSONL file or any iterable."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_edge.errors import DataError, ImageError
from mllm_edge.runtime.prompt.image import ImageSource, load_image

__all__ = ["DEFAULT_PROMPT", "Sample", "load_samples", "readable", "split"]

DEFAULT_PROMPT = "Describe the image."
_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_FIELDS = frozenset({"images", "image", "prompt", "answer"})


@dataclass(frozen=True, eq=False)
class Sample:
    """A question with its images, and the answer where it is known. `where` names it in messages."""

    prompt: str
    images: tuple[ImageSource, ...]
    answer: str | None
    where: str


def load_samples(
    data: str | Path | Iterable[Any], prompt: str = DEFAULT_PROMPT, missing_images: bool = False
) -> list[Sample]:
    """The samples in `data`, in a fixed order.

    A folder: its image files and those of the folders in it, sorted by name with numbers by their value, each with
    `prompt`; hidden files and folders are left out. A .jsonl file: lines of {"images": [paths, relative to the
    file], "prompt": text, "answer": text, optional}. An iterable: such dicts, with any image source, or Samples.

    Raises DataError naming the file and line of what is wrong; image files must exist (unless `missing_images`), but
    are not opened yet.
    """
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir():
            samples = list(_folder(path, prompt))
        elif path.is_file():
            samples = list(_jsonl(path, missing_images))
        else:
            raise DataError(f"{path} does not exist", "--data takes a folder of images or a .jsonl file")
        kind = "image files" if path.is_dir() else "samples"
    else:
        samples = [_sample(item, f"sample {i}", None, True) for i, item in enumerate(data, 1)]
        path, kind = Path("the data"), "samples"
    if not samples:
        raise DataError(f"{path} holds no {kind}", "give at least a few dozen images or questions of your own")
    return samples


def readable(samples: Sequence[Sample], skip: bool) -> tuple[list[Sample], list[str]]:
    """(the samples whose images can be decoded, a line on each of the others); unless they are to be `skip`ped, the
    first such one raises DataError."""
    good, bad = [], []
    for sample in samples:
        try:
            good.append(replace(sample, images=tuple(map(_decoded_once, sample.images))))
        except ImageError as e:
            if not skip:
                fix = f"{e.fix}; or leave such samples out with --skip-bad"
                raise DataError(f"{sample.where}: {e.message}", fix) from e
            where = "" if sample.where in e.message else f"{sample.where}: "
            bad.append(f"{where}{e.message}")
    return good, bad


def _decoded_once(image: ImageSource) -> ImageSource:
    """The source of an image that can be decoded: of an open file, which is read up now, the image."""
    decoded = load_image(image)
    return decoded if hasattr(image, "read") else image


def split(samples: Sequence[Sample], held_back: int) -> tuple[list[Sample], list[Sample]]:
    """(for calibration, held back for the proof): `held_back` samples, chosen by a hash of their content.

    The same samples give the same parts whatever their order; their order is kept.
    """
    ranked = sorted(range(len(samples)), key=lambda i: (_digest(samples[i]), i))
    chosen = set(ranked[:held_back])
    return (
        [s for i, s in enumerate(samples) if i not in chosen],
        [s for i, s in enumerate(samples) if i in chosen],
    )


def _folder(folder: Path, prompt: str) -> Iterator[Sample]:
    for path in sorted(_files(folder, {folder.resolve()}), key=lambda path: _natural(path.relative_to(folder))):
        if path.suffix.lower() in _SUFFIXES:
            yield Sample(prompt, (path,), None, str(path))


def _files(folder: Path, seen: Set[Path]) -> Iterator[Path]:
    """The files in a folder and in those in it; a link that leads back to a folder around it ends there."""
    try:
        entries = list(folder.iterdir())
    except OSError as e:
        raise DataError(f"{folder}: {e.strerror}", "make it readable, or move it out of the data") from e
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in seen:
            yield from _files(path, seen | {path.resolve()})


def _natural(path: Path) -> list[list[tuple[int, int, str]]]:
    """A key that sorts a.9 before a.10, and the files of a folder together."""
    return [
        [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", part) if piece]
        for part in path.parts
    ]


def _jsonl(path: Path, missing_images: bool) -> Iterator[Sample]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 text ({e})", "--data takes a folder of images or a .jsonl file") from None
    # At LF alone: `splitlines` and universal newlines also end a line at characters that a JSON string may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where}: not valid JSON ({e})", _LINE) from None
        yield _sample(item, where, path.parent, missing_images)


_LINE = 'a line is {"images": ["a.jpg"], "prompt": "What is this?", "answer": "A cat."}; the answer may be left out'


def _sample(item: Any, where: str, folder: Path | None, missing_images: bool) -> Sample:
    if isinstance(item, Sample):
        return item
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: {type(item).__name__} instead of an object", _LINE)
    unknown = sorted(set(item) - _FIELDS)
    if unknown:
        raise DataError(f"{where}: unknown field {unknown[0]!r}", _LINE)
    prompt, answer = item.get("prompt"), item.get("answer")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: no prompt", _LINE)
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"{where}: the answer is {type(answer).__name__}, not text", _LINE)
    return Sample(prompt, _images(item, where, folder, missing_images), answer, where)


def _images(item: Mapping[str, Any], where: str, folder: Path | None, missing_images: bool) -> tuple[ImageSource, ...]:
    images = item.get("images", [item["image"]] if "image" in item else [])
    if not isinstance(images, (list, tuple)):
        raise DataError(f"{where}: images is {type(images).__name__}, not a list", _LINE)
    if folder is None:
        return tuple(images)
    paths = []
    for name in images:
        if not isinstance(name, str):
            raise DataError(f"{where}: {name!r:.40} is no path of an image", _LINE)
        if not missing_images and not (folder / name).is_file():
            raise DataError(
                f"{where}: there is no image {folder / name}",
                "paths are relative to the .jsonl file; --skip-bad leaves such samples out",
            )
        paths.append(folder / name)
    return tuple(paths)


def _digest(sample: Sample) -> str:
    """A number for the sample's text and images; of a file, its name."""
    parts = [sample.prompt, sample.answer or ""]
    parts += [image.name if isinstance(image, Path) else type(image).__name__ for image in sample.images]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
