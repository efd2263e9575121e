"""From a float bundle (or a checkpoint) and calibration data to a quantized bundle with the proof of what that cost."""

import hashlib
import importlib.util
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mllm_edge.bundle import MANIFEST, Bundle, file_entries, sha256, write_manifest
from mllm_edge.calibration.calibrate import calibrate
from mllm_edge.calibration.collect import Feeds, record
from mllm_edge.calibration.data import DEFAULT_PROMPT, Sample, load_samples, split
from mllm_edge.calibration.evaluate import Proof, prove
from mllm_edge.calibration.figure import draw_errors
from mllm_edge.calibration.findings import Findings
from mllm_edge.calibration.layers import Layer, find_layers
from mllm_edge.calibration.mixed import Candidate, raise_worst, weight_bytes
from mllm_edge.calibration.recipes import Recipe, calibrated_recipe, check_rules, precision_of
from mllm_edge.errors import AccuracyError, BundleError, DataError, ExportError, MllmEdgeError
from mllm_edge.export.datafile import DataFile
from mllm_edge.export.graph import save_model
from mllm_edge.export.pipeline import Verify, export
from mllm_edge.export.progress import Progress, Silent
from mllm_edge.export.requantize import requantize
from mllm_edge.export.workspace import check_out, check_space, workspace
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.spec import Component, FileEntry, Manifest, Variant, to_json

__all__ = ["FIGURE", "FromCheckpoint", "Gate", "QuantizeReport", "quantize"]

FIGURE = "accuracy.png"
_FLOATS = ("float32", "float16")
_FEWEST = 4  # samples for calibration
_HELD_BACK = 4  # one of so many samples is held back …
_MOST_HELD_BACK = 32  # … up to this number


@dataclass(frozen=True)
class Gate:
    """What the proof must show: the mean KL divergence at most, the part of positions with the same likeliest token at
    least. None: no demand."""

    max_kl: float | None = None
    min_agreement: float | None = None


@dataclass(frozen=True)
class FromCheckpoint:
    """How a checkpoint becomes the float bundle that is calibrated: options of `pipeline.export`."""

    targets: tuple[str, ...] = ("cpu",)
    fallback: bool = True
    verify_mode: Verify = "auto"
    revision: str | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizeReport:
    """What was done. `layers`: component → layer → (error, error of rounding to nearest), relative, for sampled
    inputs; only layers that calibration decided about."""

    source: str
    out: str
    recipe: str
    samples: int
    held_back: int
    layers: Mapping[str, Mapping[str, tuple[float, float]]]
    proof: Proof
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return to_json(self)


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "int4",
    data: str | Path | Iterable[Any],
    prompt: str = DEFAULT_PROMPT,
    held_back: int | None = None,
    gate: Gate | None = None,
    checkpoint: FromCheckpoint | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize `source`, the directory of a float bundle or a checkpoint, to a new bundle in `out`.

    `recipe`: a name, a .toml file, or a Recipe. `data` as for `load_samples`, `prompt` for folders of images.
    `held_back` samples (default: a quarter, up to 32) are kept from calibration and prove the result. When `gate` is
    not met, nothing is written. `checkpoint`: options for a source that has to be exported first; a bundle keeps its
    targets. An interrupted calibration leaves `.{out}.calibration` beside `out` and goes on from there when called
    again in the same way.

    Raises SourceError, BundleError, DataError, RecipeError, AccuracyError, ExportError; then `out` is as it was.
    """
    out, progress = Path(out), progress or Silent()
    chosen = calibrated_recipe(recipe) if isinstance(recipe, str) else recipe
    check_out(out, force)
    samples, kept = _samples(data, prompt, held_back)
    work = out.parent / f".{out.name}.calibration"
    options = checkpoint or FromCheckpoint()
    _open_work(work, _key(source, chosen, samples, options))
    try:
        bundle = _float_bundle(source, work, options, progress)
        _check_images(bundle, samples, chosen)
        check_rules(chosen, {n: [layer.name for layer in _layers(bundle, n)] for n in bundle.manifest.components})
    except MllmEdgeError:
        shutil.rmtree(work)  # nothing in it is worth another try
        raise
    job = _Job(bundle, chosen, samples, work, threads, progress)
    findings = job.calibrate()
    check_space(out, bundle.nbytes)
    with workspace(out) as folder:
        manifest = job.write(folder, findings)
        write_manifest(folder, manifest)
        progress.stage("comparing with the float bundle", len(kept))
        proof = prove(bundle.path, folder, kept, threads, progress.advance)
        layers = {name: job.errors(name, found) for name, found in findings.items()}
        _check_gate(gate or Gate(), proof, layers, work)
        manifest = _with_figure(folder, manifest, layers)
        accuracy = {**proof.as_dict(), "layers": to_json(layers), "calibration_samples": len(samples)}
        write_manifest(folder, replace(manifest, accuracy=accuracy))
    shutil.rmtree(work, ignore_errors=True)
    nbytes = Bundle.load(out).nbytes
    return QuantizeReport(str(source), str(out), chosen.name, len(samples), len(kept), layers, proof, nbytes)


def _with_figure(folder: Path, manifest: Manifest, layers: Mapping[str, Mapping[str, tuple[float, float]]]) -> Manifest:
    """Draw the errors into the bundle, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None or not any(layers.values()):
        return manifest
    path = folder / FIGURE
    draw_errors(layers, path)
    entry = FileEntry(path.stat().st_size, sha256(path))
    return replace(manifest, files={**manifest.files, FIGURE: entry})


def _open_work(work: Path, key: str) -> None:
    """The folder of an earlier, interrupted calibration if it was the same one, else a new one."""
    note = work / "key"
    if work.exists() and not (note.is_file() and note.read_text(encoding="utf-8") == key):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(key, encoding="utf-8")


def _float_bundle(source: str | Path, work: Path, options: FromCheckpoint, progress: Progress) -> Bundle:
    """The float bundle that `source` is, or that is exported from it; raises BundleError when it is quantized."""
    path = Path(source)
    if not (path / MANIFEST).is_file():
        path = work / "float"
        if not path.exists():
            export(str(source), path, recipe_name="fp16", progress=progress, **vars(options))
    bundle = Bundle.load(path)
    _check_float(bundle)
    return bundle


class _Job:
    """One quantization in progress."""

    def __init__(
        self,
        source: Bundle,
        recipe: Recipe,
        samples: list[Sample],
        work: Path,
        threads: int | None,
        progress: Progress,
    ):
        self._source, self._recipe, self._samples = source, recipe, samples
        self._work, self._progress = work, progress
        target = next(iter(source.manifest.components.values())).variants[0].target
        self._backend = OnnxRuntimeCpu(threads, target)

    def calibrate(self) -> dict[str, Findings]:
        """What calibration finds for each component, or found before it was interrupted."""
        feeds = self._work / "feeds"
        if not (self._work / "recorded").exists():
            shutil.rmtree(feeds, ignore_errors=True)
            self._progress.stage("recording the samples", len(self._samples))
            record(self._source, self._backend, self._samples, feeds, self._progress.advance)
            (self._work / "recorded").touch()
        findings = {n: self._calibrate(n, Feeds(feeds / n)) for n in self._source.manifest.components}
        if self._recipe.raised is not None:
            self._recipe = raise_worst(self._recipe, self._room(), self._candidates(findings))
        return findings

    def write(self, folder: Path, findings: Mapping[str, Findings]) -> Manifest:
        """Every file of the new bundle but the manifest, which is returned, still without the proof."""
        manifest = self._source.manifest
        rewritten = {v.file for c in manifest.components.values() for v in c.variants}
        for name in manifest.files:
            if name.removesuffix(".data") not in rewritten and not name.startswith("engines/") and name != FIGURE:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._source.listed(name), folder / name)
        hashes: dict[Path, str] = {}
        components = {
            name: Component(tuple(self._write(folder, name, v, findings[name], hashes) for v in component.variants))
            for name, component in manifest.components.items()
        }
        return replace(
            manifest,
            components=components,
            recipe=to_json(self._recipe),
            files=file_entries(folder, hashes),
        )

    def errors(self, component: str, findings: Findings) -> dict[str, tuple[float, float]]:
        """Layer → (error, error of rounding to nearest) of the layers that kept the precision they were measured in."""
        precision = partial(precision_of, self._recipe, component)
        return {n: errors for n, errors in findings.errors().items() if precision(n) != self._recipe.raised}

    def _calibrate(self, component: str, feeds: Feeds) -> Findings:
        variant = self._source.variant(component, self._backend.target)
        precision = partial(precision_of, self._recipe, component)
        folder = self._work / component
        if not any(precision(layer.name).needs_data for layer in _layers(self._source, component)):
            return Findings(folder / "layers")
        path = self._source.listed(variant.file)
        begin = partial(self._progress.stage, f"calibrating the {component.replace('_', ' ')}")
        return calibrate(
            path, variant, self._backend, feeds, precision, folder, begin=begin, progress=self._progress.advance
        )

    def _candidates(self, findings: Mapping[str, Findings]) -> list[Candidate]:
        """The layers that calibration decided about, with their sizes and errors."""
        return [
            Candidate(component, layer.name, layer.shape, found.error)
            for component, of in findings.items()
            for layer in _layers(self._source, component)
            if (found := of.layer(layer.name)) is not None
        ]

    def _room(self) -> float:
        """Bytes that the linear layers may take, for the part of the half-precision size that the recipe allows."""
        manifest = self._source.manifest
        graphs = {v.file for c in manifest.components.values() for v in c.variants}
        others = sum(e.nbytes for n, e in manifest.files.items() if n.removesuffix(".data") not in graphs)
        layers = [(name, layer) for name in manifest.components for layer in _layers(self._source, name)]
        half = sum(2 * math.prod(layer.shape) for _, layer in layers)
        chosen = [(layer.shape, precision_of(self._recipe, name, layer.name)) for name, layer in layers]
        fixed = sum(weight_bytes(shape, precision) for shape, precision in chosen if not precision.needs_data)
        return self._recipe.size * (others + half) - others - fixed

    def _write(
        self, folder: Path, component: str, variant: Variant, findings: Findings, hashes: dict[Path, str]
    ) -> Variant:
        path = self._source.listed(variant.file)
        self._progress.stage(f"writing {path.stem}", self._source.manifest.files[variant.file].nbytes)
        model = ir.load(path)
        precision = partial(precision_of, self._recipe, component)
        data = folder / f"{variant.file}.data"
        try:
            with DataFile(data, self._progress.advance) as sink:
                requantize(model, variant.dialect, precision, findings, sink)
        except OverflowError as e:
            raise ExportError(f"recipe {self._recipe.name}: {e}", "export the float bundle with --recipe fp32") from e
        hashes[data] = sink.sha256
        save_model(model, folder / variant.file)
        part = {"decoder": self._recipe.decoder, "connector": self._recipe.connector}
        chosen = part.get(component, self._recipe.vision)
        return replace(variant, precision=chosen.kind if chosen.kind != "blocks" else f"int{chosen.bits}_blocks")


def _samples(data: str | Path | Iterable[Any], prompt: str, held_back: int | None) -> tuple[list[Sample], list[Sample]]:
    samples = load_samples(data, prompt)
    wanted = min(max(1, len(samples) // _HELD_BACK), _MOST_HELD_BACK) if held_back is None else held_back
    if wanted < 1:
        raise DataError("no sample is held back: the result could not be proven", "--held-back 1 or more")
    if len(samples) - wanted < _FEWEST:
        raise DataError(
            f"{len(samples)} samples, {wanted} of them held back: calibration needs at least {_FEWEST}",
            "give more samples (a few dozen or more that look like what the device will see)",
        )
    return split(samples, wanted)


def _check_float(bundle: Bundle) -> None:
    for name, component in bundle.manifest.components.items():
        for variant in component.variants:
            if variant.precision not in _FLOATS:
                raise BundleError(
                    f"{bundle.path}: {name} is quantized already ({variant.precision})",
                    f"mllm-edge export MODEL {bundle.path} --recipe fp16 --force, and quantize that",
                )


def _check_images(bundle: Bundle, samples: list[Sample], recipe: Recipe) -> None:
    """A recipe that calibrates the vision side needs samples with images."""
    if bundle.manifest.model.image is None or any(sample.images for sample in samples):
        return
    if recipe.vision.needs_data or recipe.connector.needs_data:
        raise DataError(
            f"no sample has an image, and recipe {recipe.name} calibrates the vision encoder",
            "give samples with images, or a recipe file whose [vision] and [connector] are float16",
        )


def _layers(bundle: Bundle, component: str) -> list[Layer]:
    variant = bundle.manifest.components[component].variants[0]
    return find_layers(ir.load(bundle.listed(variant.file)).graph)


def _check_gate(gate: Gate, proof: Proof, layers: Mapping[str, Mapping[str, tuple[float, float]]], work: Path) -> None:
    missed = []
    if gate.max_kl is not None and not proof.kl <= gate.max_kl:
        missed.append(f"KL divergence {proof.kl:.3g} > {gate.max_kl:g}")
    if gate.min_agreement is not None and not proof.top1 >= gate.min_agreement:
        missed.append(f"the likeliest token agrees in {proof.top1:.2%} < {gate.min_agreement:.2%}")
    if not missed:
        return
    ranked = sorted(((e[0], f"{c}: {n}") for c, found in layers.items() for n, e in found.items()), reverse=True)
    worst = ", ".join(f"{name} ({error:.1%})" for error, name in ranked[:5])
    raise AccuracyError(
        f"{'; '.join(missed)}. Layers with the largest error: {worst or 'none was calibrated'}",
        "keep those in float16 with a recipe file ([[rules]] with layers and kind), give more samples, or allow more "
        f"(what was found so far is kept in {work})",
    )


def _key(source: str | Path, recipe: Recipe, samples: list[Sample], options: FromCheckpoint) -> str:
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
