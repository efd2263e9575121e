"""What TensorRT for RTX builds, ahead of time on this machine: every family's parts, and decoders of real geometries.

python -m benchmarks.tensorrt_builds [--family NAME ...] [--geometry S M] [--json F]

Each engine is built in a process of its own, so that its peak memory is its own, and for all GPU generations at once; a
decoder's segments are built one after the other in one process, as `mllm-edge build` does, and the peak is that of all.
A generation is `built`, `impossible` (its hardware has not what the graph needs; TensorRT's refusal is what is checked)
or `failed`. Without --family and --geometry everything is built; with one of them, only what it names. Needs the tests'
tiny checkpoints: run it in a checkout.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoints import GEOMETRIES, Geometry, write_checkpoint
from benchmarks.report import Report

__all__ = ["main"]

CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
TARGETS = ("tensorrt", "tensorrt-10.3")
RECIPES = ("fp16", "int8", "int4", "fp8")
# 4-bit weights need Ampere, float8 needs Ada.
IMPOSSIBLE = {"int4": ("SM75",), "fp8": ("SM75", "SM80", "SM86")}
MAX_SEQ = 128  # of the tiny models
CAPACITY = 2048  # of real geometries
DIALECTS = ("opset24", "opset17")
# What is built in segments as well: for boards on which one engine does not build.
IN_SEGMENTS, SEGMENTS = ("M", "int4"), (2, 4)
MOST_BEYOND_WEIGHTS = 64
# float16 weights of M are 3.1 GB; a little above that still means one copy.
LARGEST_M_FP16 = 3.3e9
_HERE = "benchmarks.tensorrt_builds"


def main() -> None:
    from tests.families.row import rows

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", nargs="+", choices=rows())
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", nargs=4, metavar=("BUNDLE", "COMPONENT", "TARGET", "RECIPE"), help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=5, metavar=("GEOMETRY", "DIALECT", "RECIPE", "DIR", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part or options.one:
        print(json.dumps(_build_part(*options.part) if options.part else _build_one(*options.one)))
        return
    everything = not options.family and not options.geometry
    report = Report("TensorRT for RTX builds")
    report.rows += _family_rows(list(rows()) if everything else options.family or [])
    report.rows += _geometry_rows(list(GEOMETRIES) if everything else options.geometry or [])
    _check(report)
    report.print()
    if options.json:
        report.write(options.json)


def _family_rows(families: Iterable[str]) -> Iterable[dict[str, Any]]:
    from mllm_edge.bundle import Bundle
    from mllm_edge.export.pipeline import export
    from mllm_edge.export.quantize import quantize
    from tests.families.row import rows

    for family in families:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-") as name:
            checkpoint = Path(name) / "checkpoint"
            rows()[family].save(checkpoint)
            export(str(checkpoint), Path(name) / "fp16", targets=TARGETS, recipe_name="fp16", verify_mode="off")
            for recipe in RECIPES:
                if recipe != "fp16":
                    quantize(Path(name) / "fp16", Path(name) / recipe, recipe=recipe, data=_noise(), allow_loss=True)
                bundle = Path(name) / recipe
                for target in TARGETS:
                    for component in Bundle.load(bundle).manifest.components:
                        found = _child("--part", bundle, component, target, recipe)
                        yield {"model": f"{family} {component}", "recipe": recipe, **found}


def _noise() -> list[dict[str, Any]]:
    """To calibrate with: ranges of random weights mean nothing, their forms are what is built."""
    pictures = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    return [{"images": [picture], "prompt": "What is it?"} for picture in pictures]


def _geometry_rows(names: Iterable[str]) -> Iterable[dict[str, Any]]:
    for name in names:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
            write_checkpoint(GEOMETRIES[name], Path(folder))
            for dialect in DIALECTS:
                for recipe in ("fp16", "int4"):
                    for count in (1, *(SEGMENTS if (name, recipe) == IN_SEGMENTS else ())):
                        found = _child("--one", name, dialect, recipe, folder, count)
                        yield {"model": _decoder(name, count), "recipe": recipe, **found}


def _decoder(name: str, count: int) -> str:
    return f"{name} decoder" if count == 1 else f"{name} decoder in {count} segments"


def _child(*arguments: Any) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", _HERE, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}: the build's process ended\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _build_part(folder: str, component: str, target: str, recipe: str) -> dict[str, Any]:
    """A component of a bundle, as `mllm-edge build` builds it."""
    from mllm_edge.bundle import Bundle
    from mllm_edge.runtime.backends.tensorrt_engines import Limits, build_inputs

    bundle = Bundle.load(folder)
    variant = bundle.variant(component, target)
    profiles, options = build_inputs(variant, Limits(MAX_SEQ))
    path = bundle.listed(variant.file)
    return {"dialect": variant.dialect, **_build(path, profiles, options, recipe)}


def _build_one(name: str, dialect: str, recipe: str, folder: str, count: str) -> dict[str, Any]:
    from mllm_edge.graph.builder import tensor_specs
    from mllm_edge.graph.dialects.known import DIALECTS
    from mllm_edge.graph.ranges import decoder_ranges
    from mllm_edge.runtime.backends.tensorrt_engines import Limits, build_inputs
    from mllm_edge.runtime.onnx_file.split import partitions
    from mllm_edge.spec import Variant

    path, model = _write_graph(GEOMETRIES[name], dialect, recipe, Path(folder))
    specs, outputs, found = tensor_specs(model.graph.inputs), tensor_specs(model.graph.outputs), []
    kv_mode = DIALECTS[dialect].kv_mode
    for piece in next(islice(partitions(path), int(count) - 1, None)):
        inputs = [tensor for tensor in specs if tensor.name in piece.inputs]
        inputs += [piece.enters] if piece.enters else []
        given = tuple(tensor for tensor in outputs if tensor.name in piece.outputs)
        tensors, ranges = (tuple(inputs), given), decoder_ranges(kv_mode)
        variant = Variant("", dialect, recipe, path.name, *tensors, kv_mode, ranges=ranges)  # type: ignore[arg-type]
        profiles, options = build_inputs(variant, Limits(CAPACITY))
        found.append(_build(path, profiles, replace(options, graph=piece.model), recipe))
    return {"dialect": dialect, **_together(found)}


def _together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of those of all segments: the worst verdict, the time and the size of all; the peak is the last one's."""
    row = dict(found[-1])
    for capability in CAPABILITIES:
        row[capability] = next((f[capability] for f in found if f[capability] != "built"), "built")
    for key in ("seconds", "engine MB"):
        row[key] = None if any(f[key] is None for f in found) else round(sum(f[key] for f in found), 2)
    return row | {"why": next((f["why"] for f in found if f["why"]), "")}


def _build(path: Path, profiles: list[Any], options: Any, recipe: str) -> dict[str, Any]:
    """One engine for all generations that can have it; where that fails, one for each."""
    from mllm_edge.errors import BackendError
    from mllm_edge.runtime.backends.tensorrt_build import build
    from mllm_edge.runtime.machine.cpu import peak_rss

    impossible = IMPOSSIBLE.get(recipe, ())
    able = [name for name in CAPABILITIES if name not in impossible]
    verdicts, why, engine = dict.fromkeys(able, "built"), "", None
    try:
        engine = build(path, profiles, able, options=options)
    except BackendError as e:
        why = e.message
        for name in able:
            verdicts[name] = "built" if _builds(path, profiles, name, options) else "failed"
    facts = {
        "seconds": round(engine.seconds, 1) if engine else None,
        "weights MB": round(path.with_name(f"{path.name}.data").stat().st_size / 1e6, 2),
        "engine MB": round(engine.nbytes / 1e6, 2) if engine else None,
        "peak MB": round(peak_rss() / 1e6),
    }
    for name in impossible:
        verdicts[name] = "built" if _builds(path, profiles, name, options) else "impossible"
    return {**{name: verdicts[name] for name in CAPABILITIES}, **facts, "why": why}


def _builds(path: Path, profiles: list[Any], capability: str, options: Any) -> bool:
    from mllm_edge.errors import BackendError
    from mllm_edge.runtime.backends.tensorrt_build import build

    try:
        return build(path, profiles, [capability], options=options).nbytes > 0
    except BackendError:
        return False


def _write_graph(geometry: Geometry, dialect: str, recipe: str, folder: Path) -> tuple[Path, Any]:
    import onnx_ir as ir

    from mllm_edge.calibration.recipes import RECIPES as BY_NAME
    from mllm_edge.export.checkpoint.config import ConfigReader
    from mllm_edge.export.checkpoint.safetensors import open_weights
    from mllm_edge.export.decoders.build import build_decoder
    from mllm_edge.export.decoders.find import decoder_for
    from mllm_edge.export.decoders.place import Place
    from mllm_edge.graph.builder import save_model
    from mllm_edge.graph.datafile import DataFile

    weights = open_weights(folder)
    reader = ConfigReader("config.json", geometry.config, {})
    spec = decoder_for(geometry.model_type, reader, weights, Place(tied=True), "model_type")
    path = folder / f"{dialect}-{recipe}.onnx"
    with DataFile(folder / f"{path.name}.data") as data:
        model = build_decoder(spec, weights, BY_NAME[recipe], data, dialect, ir.DataType.FLOAT16)
    save_model(model, path)
    return path, model


def _check(report: Report) -> None:
    for row in report.rows:
        name = f"{row['model']} {row['dialect']} {row['recipe']}"
        if row["model"].endswith("segments"):
            whole = _decoder(row["model"][0], 1)
            alike = [r for r in report.rows if (r["model"], r["dialect"], r["recipe"]) == (whole, *name.split()[-2:])]
            report.at_most(f"{name}: peak MB, below that in one", row["peak MB"], alike[0]["peak MB"] - 1)
        report.at_most(f"{name}: failed", sum(row[c] == "failed" for c in CAPABILITIES), 0)
        if row["model"] not in ("S decoder", "M decoder") or row["engine MB"] is None:
            continue
        # Kernels for all generations take some 15 to 60 MB; a second copy of any weight would show.
        report.at_most(f"{name}: engine beyond weights, MB", row["engine MB"] - row["weights MB"], MOST_BEYOND_WEIGHTS)
        if row["model"] == "M decoder" and row["recipe"] == "fp16":
            report.at_most(f"{name}: engine bytes", row["engine MB"] * 1e6, LARGEST_M_FP16)
        if row["model"] == "M decoder" and row["recipe"] == "int4":
            report.at_least(f"{name}: built for SM86", row["SM86"] == "built", 1)


if __name__ == "__main__":
    main()
