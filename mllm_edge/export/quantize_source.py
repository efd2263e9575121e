"""What a quantization starts from: samples, the float bundle, the folder of an earlier attempt."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm_edge.bundle import MANIFEST, Bundle, sha256
from mllm_edge.calibration.data import Sample, load_samples, readable, split
from mllm_edge.calibration.recipes import Recipe
from mllm_edge.errors import BundleError, DataError
from mllm_edge.files import write_whole
from mllm_edge.json_form import to_json

__all__ = ["check_float", "check_images", "open_work", "read_samples", "so_far", "work_key"]

_FLOATS = ("float32", "float16")
_FEWEST = 4  # samples for calibration
_HELD_BACK = 4  # one of so many samples is held back …
_MOST_HELD_BACK = 32  # … up to this number


def read_samples(
    data: str | Path | Iterable[Any], prompt: str, held_back: int | None, skip_bad: bool = False
) -> tuple[list[Sample], list[Sample], list[str]]:
    """(for calibration, held back for the proof, lines on those that were left out because an image cannot be read);
    raises DataError when there are too few, or for the first bad one unless `skip_bad`."""
    samples, bad = readable(load_samples(data, prompt, missing_images=skip_bad), skip_bad)
    wanted = min(max(1, len(samples) // _HELD_BACK), _MOST_HELD_BACK) if held_back is None else held_back
    if wanted < 1:
        raise DataError("no sample is held back: the result could not be proven", "--held-back 1 or more")
    if len(samples) - wanted < _FEWEST:
        left_out = f" ({len(bad)} others cannot be read, the first: {bad[0]})" if bad else ""
        raise DataError(
            f"{len(samples)} samples{left_out}, {wanted} of them held back: calibration needs at least {_FEWEST}",
            "give more samples (a few dozen or more that look like what the device will see)",
        )
    return (*split(samples, wanted), bad)


def check_float(bundle: Bundle) -> None:
    """Raise BundleError for a bundle that holds anything quantized."""
    for name, component in bundle.manifest.components.items():
        for variant in component.variants:
            int8_cache = any(tensor.dtype == "int8" for tensor in variant.inputs)
            if variant.precision not in _FLOATS or int8_cache:
                what = "int8 cache" if int8_cache else variant.precision
                raise BundleError(
                    f"{bundle.path}: {name} is quantized already ({what})",
                    f"mllm-edge export MODEL {bundle.path} --recipe fp16 --force, and quantize that",
                )


def check_images(bundle: Bundle, samples: list[Sample], recipe: Recipe) -> None:
    """Raise DataError when the recipe calibrates the vision side and no sample has an image."""
    if bundle.manifest.model.image is None or any(sample.images for sample in samples):
        return
    if recipe.vision.needs_data or recipe.connector.needs_data:
        raise DataError(
            f"no sample has an image, and recipe {recipe.name} calibrates the vision encoder",
            "give samples with images, or a recipe file whose [vision] and [connector] are float16",
        )


def open_work(work: Path, key: str) -> bool:
    """The folder of an earlier, interrupted calibration if it was the same one, else a new one; whether it is the
    earlier one."""
    note = work / "key"
    if note.is_file() and note.read_bytes() == key.encode():
        return True
    if work.is_dir():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_whole(note, key)
    return False


def so_far(work: Path, components: Iterable[str]) -> str:
    """What an interrupted calibration has done, for people."""
    if not (work / "recorded").is_file():
        return "the samples were not recorded yet"
    counts = {name: len(list((work / name).glob("done-*"))) for name in components}
    pieces = [f"{count} pieces of the {name.replace('_', ' ')}" for name, count in counts.items() if count]
    return "done: " + ", ".join(["the samples are recorded", *pieces])


def work_key(source: str | Path, recipe: Recipe, samples: list[Sample], options: Any) -> str:
    """What decides about a calibration: the model, the recipe, the samples."""
    manifest = Path(source) / MANIFEST
    model = sha256(manifest) if manifest.is_file() else f"{source} {options}"
    digest = hashlib.sha256(model.encode())
    digest.update(json.dumps(to_json(recipe), sort_keys=True).encode())
    for sample in samples:
        digest.update(repr((sample.prompt, sample.answer, [_name(i) for i in sample.images])).encode())
    return digest.hexdigest()


def _name(image: Any) -> str:
    if isinstance(image, Path):
        stat = image.stat()
        return f"{image.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(bytes(image) if isinstance(image, (bytes, bytearray)) else repr(image).encode()).hexdigest()
