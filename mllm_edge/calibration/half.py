"""Half-precision graphs of a bundle, looked through for values that half precision cannot hold."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mllm_edge.bundle import Bundle, write_manifest
from mllm_edge.calibration.collect import Feeds, record
from mllm_edge.calibration.data import Sample
from mllm_edge.calibration.overflow import LIMIT, InFloat32, find_peaks, widen
from mllm_edge.checksums import file_entry
from mllm_edge.errors import ExportError
from mllm_edge.graph.builder import save_model
from mllm_edge.graph.gate import check_graph
from mllm_edge.progress import Progress, Silent
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.spec import Manifest, Variant

__all__ = ["KEY", "Float32Operators", "keep_in_range"]

# In the manifest's recipe: graph file → operator → the largest magnitude that it takes or makes.
KEY = "float32_operators"
Float32Operators = Mapping[str, Mapping[str, float]]
_MOST_SAMPLES = 16
_LARGEST = float(np.finfo(np.float32).max)  # JSON has no infinity


def _probe(manifest: Manifest) -> list[Sample]:
    """A question about a picture that stands for calibration data where there is none."""
    if manifest.model.image is None:
        return [Sample("Name three colours.", (), "", "the built-in question")]
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((48, 48, 1), np.uint8))
    return [Sample("What is in the picture?", (picture,), "", "the built-in picture")]


def keep_in_range(
    folder: Path, manifest: Manifest, samples: Sequence[Sample] = (), progress: Progress | None = None
) -> Manifest:
    """Find the values of the half-precision graphs in `folder` that go beyond LIMIT for `samples`, and let the
    operators that make or take them compute in float32. Returns the manifest with these operators in its recipe.

    Without samples a built-in question about a picture stands for them. Raises ExportError where an input or output of
    a graph would have to hold such a value.
    """
    targets, progress = _half_targets(manifest), progress or Silent()
    if not targets:
        return manifest
    found = {file: dict(operators) for file, operators in manifest.recipe.get(KEY, {}).items()}
    files = dict(manifest.files)
    chosen = samples[:_MOST_SAMPLES] or _probe(manifest)
    used = [replace(sample, answer=sample.answer or "") for sample in chosen]
    for target in targets:
        write_manifest(folder, replace(manifest, files=files))  # as the files are now
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            bundle, work = Bundle.load(folder), Path(scratch)
            progress.stage(f"looking for values beyond half precision ({target})", len(used))
            record(bundle, InFloat32(target, work / "twins"), used, work / "feeds", progress.advance)
            shutil.rmtree(work / "twins", ignore_errors=True)  # text alone opens no graphs of images
            for name in manifest.components:
                variant = bundle.variant(name, target)
                if not _is_half(variant):  # a choice
                    continue
                operators = _widen_file(bundle, variant, Feeds(work / "feeds" / name), work, progress)
                if operators:
                    found.setdefault(variant.file, {}).update(operators)
                    path = folder / variant.file
                    files[variant.file] = file_entry(path)
    recipe = {**manifest.recipe, KEY: found} if found else manifest.recipe
    return replace(manifest, recipe=recipe, files=files)


def _half_targets(manifest: Manifest) -> list[str]:
    """The targets whose graphs compute in half precision."""
    return [variant.target for variant in manifest.components["decoder"].variants if _is_half(variant)]


def _is_half(variant: Variant) -> bool:
    return any(tensor.dtype == "float16" for tensor in (*variant.inputs, *variant.outputs))


def _widen_file(bundle: Bundle, variant: Variant, feeds: Feeds, work: Path, progress: Progress) -> dict[str, float]:
    """Look through one graph and rewrite its file if need be; its operators that compute in float32 now."""
    path = bundle.listed(variant.file)

    def begin(runs: int) -> None:
        progress.stage(f"looking through {path.stem}", runs)

    backend = OnnxRuntimeCpu(target=variant.target)
    peaks = find_peaks(path, variant, backend, feeds, work / "pieces", begin, progress.advance)
    beyond = {name: min(peak, _LARGEST) for name, peak in peaks.items() if peak > LIMIT}
    if not beyond:
        return {}
    contract = [tensor.name for tensor in variant.outputs if tensor.name in beyond]
    if contract:
        raise ExportError(
            f"{variant.file}: {contract[0]} reaches {beyond[contract[0]]:.3g}, which half precision cannot be "
            "relied on to hold",
            "use --recipe fp32, or a target whose graphs are float32 (cpu)",
        )
    model = ir.load(path)
    touched = _largest(model, beyond)
    widen(model, beyond)
    if any(node.op_type == "GroupQueryAttention" and node.name in touched for node in model.graph):
        raise ExportError(
            f"{variant.file}: attention gets values that half precision cannot be relied on to hold, and ONNX Runtime "
            f"has no float32 kernel of it for {variant.target}",
            "export for --target tensorrt, or tensorrt-10.3 for an older TensorRT",
        )
    if variant.dialect != "contrib":
        check_graph(model, variant.dialect)
    path.unlink()  # whoever has a link to the file keeps what it was
    save_model(model, path)
    return touched


def _largest(model: ir.Model, beyond: Mapping[str, float]) -> dict[str, float]:
    """Operator → the largest magnitude among its values that are `beyond`."""
    found = {}
    for node in model.graph:
        names = [v.name or "" for v in (*node.inputs, *node.outputs) if v is not None]
        largest = max((beyond[name] for name in names if name in beyond), default=0.0)
        if largest:
            found[node.name or ""] = largest
    return found
