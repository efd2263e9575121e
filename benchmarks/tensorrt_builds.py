"""TensorRT for RTX engines of real decoder geometries, built ahead of time on this machine.

python -m benchmarks.tensorrt_builds [--geometry S M] [--json F]

Each build runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import GEOMETRIES, Geometry, write_checkpoint
from benchmarks.report import Report

__all__ = ["main"]

CAPACITY = 2048
RECIPES = {"fp16": ["SM75", "SM86", "SM89", "SM120"], "int4": ["SM80", "SM86", "SM89", "SM120"]}
DIALECTS = ("opset24", "opset17")
# A decode profile fixed at one token would make TensorRT keep the weights twice.
PROFILES = ((1, 256, 1024), (1, 1, 8))
MOST_BEYOND_WEIGHTS = 64
# float16 weights of M are 3.1 GB; a little above that still means one copy.
LARGEST_M_FP16 = 3.3e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["S"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, metavar=("GEOMETRY", "DIALECT", "RECIPE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_build_one(*options.one)))
        return
    report = Report("TensorRT for RTX builds")
    for name in options.geometry:
        with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
            write_checkpoint(GEOMETRIES[name], Path(folder))
            report.rows += [_row(name, dialect, recipe, folder) for dialect in DIALECTS for recipe in RECIPES]
    _check(report)
    report.print()
    if options.json:
        report.write(options.json)


def _row(geometry: str, dialect: str, recipe: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.tensorrt_builds", "--one", geometry, dialect, recipe, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{geometry} {dialect} {recipe}: the build failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _build_one(name: str, dialect: str, recipe: str, folder: str) -> dict[str, Any]:
    from mllm_edge.export.graph import tensor_specs
    from mllm_edge.runtime.backends.tensorrt_build import build, check_network, shape_ranges
    from mllm_edge.runtime.device import peak_rss

    geometry = GEOMETRIES[name]
    path, model = _write_graph(geometry, dialect, recipe, Path(folder))
    found = check_network(path, 2 * geometry.layers if dialect == "opset24" else 0)
    inputs = tensor_specs(model.graph.inputs)
    profiles = [shape_ranges(inputs, new, (1, 512, CAPACITY - new[2])) for new in PROFILES]
    engine = build(path, profiles, RECIPES[recipe])
    weights = path.with_name(f"{path.name}.data").stat().st_size
    return {
        "geometry": name,
        "dialect": dialect,
        "recipe": recipe,
        "seconds": round(engine.seconds, 1),
        "weights MB": round(weights / 1e6),
        "engine MB": round(engine.nbytes / 1e6),
        "peak MB": round(peak_rss() / 1e6),
        "cache updates": found.cache_updates,
    }


def _write_graph(geometry: Geometry, dialect: str, recipe: str, folder: Path) -> tuple[Path, Any]:
    import onnx_ir as ir

    from mllm_edge.calibration.recipes import RECIPES as BY_NAME
    from mllm_edge.export.datafile import DataFile
    from mllm_edge.export.decoder.build import build_decoder
    from mllm_edge.export.decoder.llama import llama_spec
    from mllm_edge.export.graph import save_model
    from mllm_edge.export.safetensors import open_weights
    from mllm_edge.export.source import ConfigReader

    weights = open_weights(folder)
    reader = ConfigReader("config.json", geometry.config, {})
    spec = llama_spec(reader, weights, "model", True, geometry.model_type)
    path = folder / f"{dialect}-{recipe}.onnx"
    with DataFile(folder / f"{path.name}.data") as data:
        model = build_decoder(spec, weights, BY_NAME[recipe], data, dialect, ir.DataType.FLOAT16, CAPACITY)
    save_model(model, path)
    return path, model


def _check(report: Report) -> None:
    for row in report.rows:
        name = f"{row['geometry']} {row['dialect']} {row['recipe']}"
        # Kernels for four generations take some 15 to 40 MB; a second copy of any weight would show.
        report.at_most(f"{name}: engine beyond weights, MB", row["engine MB"] - row["weights MB"], MOST_BEYOND_WEIGHTS)
        if row["geometry"] == "M" and row["recipe"] == "fp16":
            report.at_most(f"{name}: engine bytes", row["engine MB"] * 1e6, LARGEST_M_FP16)


if __name__ == "__main__":
    main()
