"""What a quantization starts from: samples, the float bundle, the folder of an earlier attempt."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_edge.bundle import MANIFEST, Bundle, sha256
from mllm_edge.calibration.builtin import builtin_samples
from mllm_edge.calibration.data import Sample, load_samples, readable, split
from mllm_edge.calibration.recipes import Recipe, precision_of
from mllm_edge.errors import BundleError, DataError
from mllm_edge.files import write_whole
from mllm_edge.graph.precision import INT8_DYNAMIC
from mllm_edge.json_form import to_json
from mllm_edge.spec import Role

__all__ = [
    "Samples",
    "check_float",
    "check_vision",
    "open_work",
    "read_samples",
    "replaced_parts",
    "so_far",
    "without_images",
    "work_key",
]

_FLOATS = ("float32", "float16")
_FEWEST = 4  # samples for calibration
_HELD_BACK = 4  # one of so many samples is held back …
_MOST_HELD_BACK = 32  # … up to this number
_BESIDE = 128  # questions of the built-in text that join samples of the user's own: all of them


@dataclass(frozen=True)
class Samples:
    """`own` and `builtin` ones for calibration, those `kept` from it for the proof, and a line on each that was
    `skipped` because an image cannot be read."""

    own: list[Sample]
    builtin: list[Sample]
    kept: list[Sample]
    skipped: list[str]

    @property
    def calibration(self) -> list[Sample]:
        """What calibration sees."""
        return [*self.own, *self.builtin]

    def counts(self) -> dict[str, int]:
        """For the manifest."""
        return {"calibration_samples": len(self.own), "builtin_samples": len(self.builtin)}


def read_samples(
    data: str | Path | Iterable[Any] | None,
    prompt: str,
    held_back: int | None,
    skip_bad: bool = False,
    builtin: bool = True,
) -> Samples:
    """The user's `data` and, where `builtin` is wanted, the built-in text beside it; that alone without data.

    Raises DataError when there are too few, or for the first bad one unless `skip_bad`.
    """
    if data is None:
        if not builtin:
            raise DataError("no data, and no built-in text: nothing to calibrate with", "--data, or the built-in text")
        given, bad = builtin_samples(), list[str]()
    else:
        given, bad = readable(load_samples(data, prompt, missing_images=skip_bad), skip_bad)
    wanted = min(max(1, len(given) // _HELD_BACK), _MOST_HELD_BACK) if held_back is None else held_back
    if wanted < 1:
        raise DataError("no sample is held back: the result could not be proven", "--held-back 1 or more")
    if len(given) - wanted < _FEWEST:
        left_out = f" ({len(bad)} others cannot be read, the first: {bad[0]})" if bad else ""
        raise DataError(
            f"{len(given)} samples{left_out}, {wanted} of them held back: calibration needs at least {_FEWEST}",
            "give more samples (a few dozen or more that look like what the device will see)",
        )
    used, kept = split(given, wanted)
    if data is None:
        return Samples([], used, kept, bad)
    return Samples(used, builtin_samples(_BESIDE) if builtin else [], kept, bad)


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


def without_images(recipe: Recipe) -> Recipe:
    """The recipe with what the vision side gets without data, where it would be calibrated."""
    return replace(
        recipe,
        vision=INT8_DYNAMIC if recipe.vision.needs_data else recipe.vision,
        connector=INT8_DYNAMIC if recipe.connector.needs_data else recipe.connector,
    )


def replaced_parts(wished: Recipe, chosen: Recipe) -> dict[str, str]:
    """Of the vision side, what `chosen` has in another precision than was `wished` → its kind."""
    parts = {
        "vision encoder": (wished.vision, chosen.vision),
        "connector": (wished.connector, chosen.connector),
    }
    return {part: got.kind for part, (want, got) in parts.items() if want != got}


def check_vision(recipe: Recipe, layers: Mapping[str, Iterable[str]], role: Callable[[str], Role]) -> None:
    """Raise DataError for a rule that would calibrate one of the vision side's `layers`, by component, though no sample
    has an image. `role`: of a component."""
    for component, names in layers.items():
        for name in names:
            if role(component) != "text" and precision_of(recipe, component, name, role(component)).needs_data:
                raise DataError(
                    f"no sample has an image, and a rule of recipe {recipe.name} calibrates {component}: {name}",
                    "give samples with images, or make that rule float16 or int8_dynamic",
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
