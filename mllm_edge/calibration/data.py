"""Calibration data: images with prompts, from a folder, a JSONL file or any iterable."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_edge.errors import DataError
from mllm_edge.runtime.image import ImageSource

__all__ = ["DEFAULT_PROMPT", "Sample", "load_samples", "split"]

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


def load_samples(data: str | Path | Iterable[Any], prompt: str = DEFAULT_PROMPT) -> list[Sample]:
    """The samples in `data`, in a fixed order.

    A folder: its image files by name, each with `prompt`. A .jsonl file: lines of {"images": [paths, relative to the
    file], "prompt": text, "answer": text, optional}. An iterable: such dicts, with any image source, or Samples.

    Raises DataError naming the file and line of what is wrong; image files must exist, but are not opened yet.
    """
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir():
            samples = list(_folder(path, prompt))
        elif path.is_file():
            samples = list(_jsonl(path))
        else:
            raise DataError(f"{path} does not exist", "--data takes a folder of images or a .jsonl file")
        kind = "image files" if path.is_dir() else "samples"
    else:
        samples = [_sample(item, f"sample {i}", None) for i, item in enumerate(data, 1)]
        path, kind = Path("the data"), "samples"
    if not samples:
        raise DataError(f"{path} holds no {kind}", "give at least a few dozen images or questions of your own")
    return samples


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
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            yield Sample(prompt, (path,), None, str(path))


def _jsonl(path: Path) -> Iterator[Sample]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 text ({e})", "--data takes a folder of images or a .jsonl file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except ValueError as e:
            raise DataError(f"{where}: not valid JSON ({e})", _LINE) from None
        yield _sample(item, where, path.parent)


_LINE = 'a line is {"images": ["a.jpg"], "prompt": "What is this?", "answer": "A cat."}; the answer may be left out'


def _sample(item: Any, where: str, folder: Path | None) -> Sample:
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
    return Sample(prompt, _images(item, where, folder), answer, where)


def _images(item: Mapping[str, Any], where: str, folder: Path | None) -> tuple[ImageSource, ...]:
    images = item.get("images", [item["image"]] if "image" in item else [])
    if not isinstance(images, (list, tuple)):
        raise DataError(f"{where}: images is {type(images).__name__}, not a list", _LINE)
    if folder is None:
        return tuple(images)
    paths = []
    for name in images:
        if not isinstance(name, str):
            raise DataError(f"{where}: {name!r:.40} is no path of an image", _LINE)
        if not (folder / name).is_file():
            raise DataError(f"{where}: there is no image {folder / name}", "paths are relative to the .jsonl file")
        paths.append(folder / name)
    return tuple(paths)


def _digest(sample: Sample) -> str:
    """A number for the sample's text and images; of a file, its name."""
    parts = [sample.prompt, sample.answer or ""]
    parts += [image.name if isinstance(image, Path) else type(image).__name__ for image in sample.images]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
