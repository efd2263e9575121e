"""From a float bundle (or a checkpoint) and calibration data to a quantized bundle with the proof of what that cost."""

import importlib.util
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.bundle import MANIFEST, Bundle, file_entries, write_manifest
from mllm_edge.calibration.calibrate import calibrate
from mllm_edge.calibration.collect import Feeds, is_recorded, mark_recorded, record
from mllm_edge.calibration.data import DEFAULT_PROMPT, Sample
from mllm_edge.calibration.evaluate import Proof, prove
from mllm_edge.calibration.figure import draw_errors
from mllm_edge.calibration.findings import Findings
from mllm_edge.calibration.kv import MINIMUM, check_cache
from mllm_edge.calibration.layers import Layer, find_groups, find_layers
from mllm_edge.calibration.mixed import Candidate, by_loss, by_size, ranked, weight_bytes
from mllm_edge.calibration.recipes import Recipe, calibrated_recipe, check_rules, precision_of
from mllm_edge.calibration.sensitivity import Unit, affordable, measure
from mllm_edge.calibration.whole import Losses, against_rounding, in_eight_bits
from mllm_edge.checksums import file_entry
from mllm_edge.errors import AccuracyError, BundleError, ExportError, MllmEdgeError
from mllm_edge.export.checkpoint.files import local_path
from mllm_edge.export.datafile import DataFile
from mllm_edge.export.early import check_source
from mllm_edge.export.graph import save_model, tensor_specs
from mllm_edge.export.half import KEY, Float32Operators, keep_in_range
from mllm_edge.export.judge import is_quantized, remedy
from mllm_edge.export.pipeline import Verify, export
from mllm_edge.export.progress import Progress, Silent
from mllm_edge.export.quantize_source import (
    Samples,
    check_float,
    check_vision,
    open_work,
    read_samples,
    replaced_parts,
    so_far,
    without_images,
    work_key,
)
from mllm_edge.export.requantize import requantize
from mllm_edge.export.verify import VerifyCase
from mllm_edge.export.workspace import check_space, full_disk, reserved, workspace
from mllm_edge.json_form import to_json
from mllm_edge.loss import MAX_KL, WARN_KL, Loss, headline, warning
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.spec import Component, FileEntry, Manifest, Variant

__all__ = ["FIGURE", "FromCheckpoint", "Gate", "QuantizeReport", "quantize"]

FIGURE = "accuracy.png"


@dataclass(frozen=True)
class Gate:
    """What the proof must show: the mean KL divergence at most, the part of positions with the same likeliest token at
    least. None: no demand of one's own; a divergence of more than MAX_KL nats is not written unless that is allowed."""

    max_kl: float | None = None
    min_agreement: float | None = None

    def missed(self, proof: Proof) -> str:
        """What the proof does not show; empty when all is met."""
        missed = []
        if self.max_kl is not None and not proof.kl <= self.max_kl:
            missed.append(f"KL divergence {proof.kl:.3g} > {self.max_kl:g}")
        if self.min_agreement is not None and not proof.top1 >= self.min_agreement:
            missed.append(f"the likeliest token agrees in {proof.top1:.2%} < {self.min_agreement:.2%}")
        return "; ".join(missed)


@dataclass(frozen=True)
class FromCheckpoint:
    """How a checkpoint becomes the float bundle that is calibrated: options of `pipeline.export`."""

    targets: tuple[str, ...] = ("cpu",)
    fallback: bool = True
    verify_mode: Verify = "auto"
    revision: str | None = None
    adapters: tuple[str, ...] = ()
    verify_cases: tuple[VerifyCase, ...] = ()


@dataclass(frozen=True)
class QuantizeReport:
    """What was done with `samples` of the user's own and `builtin` questions that come with the package.

    `without_images`: components that were not calibrated because no sample has an image → the precision they got
    instead. `layers`: component → layer → (error, error of rounding to nearest), relative, for sampled inputs; only
    layers that calibration decided about. `float32_operators`: graph file → operator → magnitude, those of
    half-precision graphs that half precision would have overflowed in. `skipped`: a line on each sample that was left
    out because an image of it cannot be read. `against_rounding`: the divergence of the decoder on samples that
    calibration held apart, with the weights that were found and with plain rounding; the better one was written. None:
    it was not measured. `loss`: of the proof, with what 8 bits would cost; `warning`: what to do about it where people
    will notice."""

    source: str
    out: str
    recipe: str
    samples: int
    held_back: int
    layers: Mapping[str, Mapping[str, tuple[float, float]]]
    proof: Proof
    nbytes: int
    float32_operators: Float32Operators
    skipped: tuple[str, ...] = ()
    against_rounding: tuple[float, float] | None = None
    loss: Loss | None = None
    warning: str = ""
    builtin: int = 0
    without_images: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return to_json(self)


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "int4",
    data: str | Path | Iterable[Any] | None = None,
    builtin: bool = True,
    prompt: str = DEFAULT_PROMPT,
    held_back: int | None = None,
    gate: Gate | None = None,
    checkpoint: FromCheckpoint | None = None,
    skip_bad: bool = False,
    allow_loss: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize `source`, the directory of a float bundle or a checkpoint, to a new bundle in `out`.

    `recipe`: a name, a .toml file, or a Recipe. `data` as for `load_samples`, `prompt` for folders of images; questions
    that come with the package calibrate beside it (`builtin`), and alone where it is None. Without images the decoder
    alone is calibrated, and the vision side gets what it gets without data.
    `held_back` samples (default: a quarter, up to 32) are kept from calibration and prove the result. When `gate` is
    not met, or the divergence is more than MAX_KL nats where the gate names none, nothing is written, unless
    `allow_loss`; a recipe that raises layers raises as many as meet a gate, in the place of its size.
    `checkpoint`: options for a source that has to be exported first; a bundle keeps its targets. `skip_bad`: leave out
    samples with an image that cannot be read, and report them; else the first one is an error. An interrupted
    calibration leaves `.{out}.calibration` beside `out` and goes on from there when called again in the same way.

    Raises SourceError, BundleError, DataError, RecipeError, AccuracyError, LockedError (another process works on
    `out`), ExportError; then `out` is as it was.
    """
    chosen = calibrated_recipe(recipe) if isinstance(recipe, str) else recipe
    check_source(str(source))
    if local_path(source).is_dir():
        source = local_path(source)
    with reserved(Path(out), force) as place:
        samples = read_samples(data, prompt, held_back, skip_bad, builtin)
        work, options = place.with_name(f".{place.name}.calibration"), checkpoint or FromCheckpoint()
        with full_disk(work):
            report = _quantize(
                source,
                place,
                work,
                chosen,
                samples,
                gate or Gate(),
                allow_loss,
                options,
                threads,
                progress or Silent(),
            )
    return replace(report, out=str(out), skipped=tuple(samples.skipped))


def _quantize(
    source: str | Path,
    out: Path,
    work: Path,
    chosen: Recipe,
    samples: Samples,
    gate: Gate,
    allow_loss: bool,
    options: FromCheckpoint,
    threads: int | None,
    progress: Progress,
) -> QuantizeReport:
    again = open_work(work, work_key(source, chosen, samples.calibration, options))
    images = any(sample.images for sample in samples.own)
    try:
        bundle = _float_bundle(source, work, options, progress)
        wished, chosen = chosen, chosen if images else without_images(chosen)
        if chosen.kv == "int8":
            check_cache(chosen.name, {v.target: v.dialect for v in bundle.manifest.components["decoder"].variants})
        names = {n: [layer.name for layer in _layers(bundle, n)] for n in bundle.manifest.components}
        check_rules(chosen, names)
        if not images:
            check_vision(chosen, names)
    except MllmEdgeError:
        shutil.rmtree(work)  # nothing in it is worth another try
        raise
    if again:
        progress.stage(f"going on where it was interrupted; {so_far(work, bundle.manifest.components)}")
    job = _Job(bundle, chosen, samples.calibration, work, threads, progress)
    findings, losses = job.against_rounding(job.calibrate())
    job.raise_worst(findings, gate)
    check_space(out, bundle.nbytes)
    with workspace(out, bundle.nbytes) as folder:
        manifest, proof = job.prove(folder, findings, samples.kept)
        while gate.missed(proof) and job.raise_more():
            manifest, proof = job.prove(folder, findings, samples.kept)
        layers = {name: job.errors(name, found) for name, found in findings.items()}
        loss = job.loss(proof, samples.kept)
        if not allow_loss:
            _check_gate(gate, proof, loss, layers, work, remedy(chosen, calibrated=True))
        manifest = _with_figure(folder, manifest, layers)
        accuracy = {**proof.as_dict(), "layers": to_json(layers), **samples.counts()}
        accuracy["loss"] = to_json(loss)
        if losses is not None:
            accuracy["kl_against_rounding"] = to_json(losses)
        write_manifest(folder, replace(manifest, accuracy=accuracy))
    shutil.rmtree(work, ignore_errors=True)
    written = Bundle.load(out)
    return QuantizeReport(
        source=str(source),
        out=str(out),
        recipe=chosen.name,
        samples=len(samples.own),
        held_back=len(samples.kept),
        layers=layers,
        proof=proof,
        nbytes=written.nbytes,
        float32_operators=written.manifest.recipe.get(KEY, {}),
        against_rounding=losses,
        loss=loss,
        warning=warning(to_json(loss), remedy(chosen, calibrated=True)),
        builtin=len(samples.builtin),
        without_images=replaced_parts(wished, chosen),
    )


def _with_figure(folder: Path, manifest: Manifest, layers: Mapping[str, Mapping[str, tuple[float, float]]]) -> Manifest:
    """Draw the errors into the bundle, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None or not any(layers.values()):
        return manifest
    path = folder / FIGURE
    draw_errors(layers, path)
    return replace(manifest, files={**manifest.files, FIGURE: file_entry(path)})


def _float_bundle(source: str | Path, work: Path, options: FromCheckpoint, progress: Progress) -> Bundle:
    """The float bundle that `source` is, or that is exported from it; raises BundleError when it is quantized."""
    path = Path(source)
    if not (path / MANIFEST).is_file():
        path = work / "float"
        if not _whole(path):
            shutil.rmtree(path, ignore_errors=True)
            export(str(source), path, recipe_name="fp16", progress=progress, **vars(options))
    bundle = Bundle.load(path)
    check_float(bundle)
    bundle.check_all()
    return bundle


def _whole(path: Path) -> bool:
    """Whether the bundle that an earlier attempt exported is there and undamaged."""
    try:
        Bundle.load(path).check_all()
    except BundleError:
        return False
    return True


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
        self._source, self._recipe, self._base, self._samples = source, recipe, recipe, samples
        self._order: list[Candidate] = []
        self._loss_left, self._threads = 0.0, threads
        self._work, self._progress = work, progress
        target = next(iter(source.manifest.components.values())).variants[0].target
        self._backend = OnnxRuntimeCpu(threads, target)

    def calibrate(self) -> dict[str, Findings]:
        """What calibration finds for each component, or found before it was interrupted."""
        feeds, names = self._work / "feeds", self._source.manifest.components
        if not is_recorded(self._work / "recorded", feeds):
            for folder in (feeds, *(self._work / name for name in names)):
                shutil.rmtree(folder, ignore_errors=True)
            self._progress.stage("recording the samples", len(self._samples))
            record(self._source, self._backend, self._samples, feeds, self._progress.advance)
            mark_recorded(self._work / "recorded", feeds)
        return {n: self._calibrate(n, Feeds(feeds / n)) for n in names}

    def against_rounding(self, findings: dict[str, Findings]) -> tuple[dict[str, Findings], Losses | None]:
        """See `whole.against_rounding`: of the decoder what does better on samples held apart is taken."""
        if "decoder" not in findings:
            return findings, None
        self._progress.stage("comparing with plain rounding")
        folder, layers = self._work / "against_rounding", _layers(self._source, "decoder")
        losses = against_rounding(
            self._source, self._backend, self._samples, self._recipe, layers, findings["decoder"], folder
        )
        if losses is not None and losses[0] > losses[1]:
            findings = {**findings, "decoder": Findings(findings["decoder"].folder, ignored=True)}
        return findings, losses

    def raise_worst(self, findings: Mapping[str, Findings], gate: Gate) -> None:
        """Give a recipe's `raised` precision to the layers that cost most: as many as the gate seems to want or, where
        there is none, as the recipe's size allows."""
        if self._base.raised is None:
            return
        losses, measured = self._losses(findings)
        self._order = ranked(self._base, self._candidates(findings, losses))
        if gate == Gate():
            self._recipe = by_size(self._base, self._room(), self._order)
        else:
            most = gate.max_kl if measured and gate.max_kl is not None else math.inf
            self._recipe, self._loss_left = by_loss(self._base, most, self._order)

    def raise_more(self) -> bool:
        """Raise as many layers more as halve the loss that is left; False when there are none."""
        if not self._loss_left:
            return False
        self._recipe, self._loss_left = by_loss(self._base, self._loss_left / 2, self._order)
        return True

    def prove(self, folder: Path, findings: Mapping[str, Findings], kept: list[Sample]) -> tuple[Manifest, Proof]:
        """Write the bundle and compare it with the float one."""
        manifest = keep_in_range(folder, self.write(folder, findings), self._samples, self._progress)
        write_manifest(folder, manifest)
        self._progress.stage("comparing with the float bundle", len(kept))
        return manifest, prove(self._source.path, folder, kept, self._threads, self._progress.advance)

    def loss(self, proof: Proof, kept: list[Sample]) -> Loss:
        """The proof in words for people; beside it, where they will notice, what 8 bits would cost."""
        eight = None
        if is_quantized(self._recipe) and not proof.kl < WARN_KL:
            self._progress.stage("measuring what 8 bits would cost")
            layers, folder = _layers(self._source, "decoder"), self._work / "eight_bits"
            eight = in_eight_bits(self._source, self._backend, kept, layers, folder)
        return Loss(
            kl=proof.kl,
            agreement=proof.top1,
            positions=proof.positions,
            kl_8_bits=eight and eight[0],
            agreement_8_bits=eight and eight[1],
            question=proof.question,
            answer_before=proof.answer_before,
            answer_after=proof.answer_after,
        )

    def write(self, folder: Path, findings: Mapping[str, Findings]) -> Manifest:
        """Every file of the new bundle but the manifest, which is returned, still without the proof."""
        manifest = self._source.manifest
        rewritten = {v.file for c in manifest.components.values() for v in c.variants}
        for name in manifest.files:
            if name.removesuffix(".data") not in rewritten and not name.startswith("engines/") and name != FIGURE:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._source.listed(name), folder / name)
        hashes: dict[Path, FileEntry] = {}
        components = {
            name: Component(tuple(self._write(folder, name, v, findings[name], hashes) for v in component.variants))
            for name, component in manifest.components.items()
        }
        return replace(
            manifest,
            components=components,
            recipe={**to_json(self._recipe), **_carried(manifest)},
            files=file_entries(folder, hashes),
        )

    def errors(self, component: str, findings: Findings) -> dict[str, tuple[float, float]]:
        """Layer → (error, error of rounding to nearest) of the layers that kept the precision they were measured in."""
        precision = partial(precision_of, self._recipe, component)
        return {n: errors for n, errors in findings.errors().items() if precision(n) != self._recipe.raised}

    def _calibrate(self, component: str, feeds: Feeds) -> Findings:
        variant = self._source.variant(component, self._backend.target)
        precision = partial(precision_of, self._recipe, component)
        folder, cache = self._work / component, component == "decoder" and self._recipe.kv == "int8"
        if not cache and not any(precision(layer.name).needs_data for layer in _layers(self._source, component)):
            return Findings(folder / "layers")
        path = self._source.listed(variant.file)
        begin = partial(self._progress.stage, f"calibrating the {component.replace('_', ' ')}")
        advance = self._progress.advance
        # Layers that are raised later would leave those behind them tuned to errors that are gone.
        sequential = self._recipe.raised is None
        return calibrate(path, variant, self._backend, feeds, precision, folder, begin, advance, cache, sequential)

    def _losses(self, findings: Mapping[str, Findings]) -> tuple[dict[str, float], bool]:
        """What rounding each unit alone costs, by its key; and whether that is a divergence in nats. Of a model too
        large to measure it is the squared relative errors of the layers' own outputs."""
        units = self._units(findings)
        count = affordable(len(units), sum(math.prod(layer.shape) for _, layer in self._all_layers()))
        if not count:
            errors = {name: found.errors() for name, found in findings.items()}
            return {u.key: sum(errors[u.component][layer][0] ** 2 for layer in u.layers) for u in units}, False

        def rounded(component: str, layer: str) -> np.ndarray:
            found = findings[component].layer(layer)
            weight = None if found is None else found.replaced()
            assert weight is not None
            return weight

        self._progress.stage("measuring what each layer costs", len(units))
        samples = [s for s in self._samples if s.images][:count] or self._samples[:count]
        folder = self._work / "sensitivity"
        return measure(self._source, self._backend, samples, units, rounded, folder, self._progress.advance), True

    def _units(self, findings: Mapping[str, Findings]) -> list[Unit]:
        """The layers that calibration decided about; those with the same input together."""
        units = []
        for component, found in findings.items():
            decided = set(found.errors())
            for group in find_groups(_layers(self._source, component)):
                names = tuple(layer.name for layer in group.layers if layer.name in decided)
                if names:
                    units.append(Unit(component, names))
        return units

    def _candidates(self, findings: Mapping[str, Findings], losses: Mapping[str, float]) -> list[Candidate]:
        shapes = {(component, layer.name): layer.shape for component, layer in self._all_layers()}
        return [
            Candidate(u.component, tuple((name, shapes[u.component, name]) for name in u.layers), losses[u.key])
            for u in self._units(findings)
        ]

    def _all_layers(self) -> list[tuple[str, Layer]]:
        return [(name, layer) for name in self._source.manifest.components for layer in _layers(self._source, name)]

    def _room(self) -> float:
        """Bytes that the linear layers may take, for the part of the half-precision size that the recipe allows. Of
        several targets the first one's size counts."""
        manifest = self._source.manifest
        graphs = {v.file for c in manifest.components.values() for v in c.variants}
        own = {c.variants[0].file for c in manifest.components.values()}
        counted = {n: e.nbytes for n, e in manifest.files.items() if n.removesuffix(".data") not in graphs - own}
        layers = self._all_layers()
        # Graphs, norms, embeddings and the tokenizer stay as they are.
        others = sum(counted.values()) - sum(layer.stored_bytes for _, layer in layers)
        half = sum(2 * math.prod(layer.shape) for _, layer in layers)
        chosen = [(layer.shape, precision_of(self._recipe, name, layer.name)) for name, layer in layers]
        fixed = sum(weight_bytes(shape, precision) for shape, precision in chosen if not precision.needs_data)
        return self._recipe.size * (others + half) - others - fixed

    def _write(
        self, folder: Path, component: str, variant: Variant, findings: Findings, hashes: dict[Path, FileEntry]
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
        hashes[data] = sink.entry
        save_model(model, folder / variant.file)
        part = {"decoder": self._recipe.decoder, "connector": self._recipe.connector}
        chosen = part.get(component, self._recipe.vision)
        newer = variant.dialect == "contrib" and component == "decoder" and self._recipe.kv == "int8"
        return replace(
            variant,
            precision=f"int{chosen.bits}_blocks" if chosen.kind == "blocks" else chosen.kind,
            inputs=tensor_specs(model.graph.inputs),
            outputs=tensor_specs(model.graph.outputs),
            minimum={**variant.minimum, **MINIMUM} if newer else variant.minimum,
        )


def _carried(manifest: Manifest) -> dict[str, Any]:
    """What stays true of the float graphs after their layers are quantized."""
    return {KEY: manifest.recipe[KEY]} if KEY in manifest.recipe else {}


def _layers(bundle: Bundle, component: str) -> list[Layer]:
    variant = bundle.manifest.components[component].variants[0]
    return find_layers(ir.load(bundle.listed(variant.file)).graph)


def _check_gate(
    gate: Gate,
    proof: Proof,
    loss: Loss,
    layers: Mapping[str, Mapping[str, tuple[float, float]]],
    work: Path,
    fix: str,
) -> None:
    """Raise AccuracyError where the gate is missed, or the stated divergence by a gate that names none."""
    missed = (gate if gate.max_kl is not None else replace(gate, max_kl=MAX_KL)).missed(proof)
    if not missed:
        return
    largest = sorted(((e[0], f"{c}: {n}") for c, found in layers.items() for n, e in found.items()), reverse=True)
    worst = ", ".join(f"{name} ({error:.1%})" for error, name in largest[:5])
    raise AccuracyError(
        f"{missed}. Layers with the largest error: {worst or 'none was calibrated'}. In all: "
        f"{headline(to_json(loss))}. Asked {loss.question!r:.200}, the float model answers "
        f"{loss.answer_before!r:.200}, this bundle {loss.answer_after!r:.200}",
        f"{fix}; keep those layers in float16 with a recipe file ([[rules]] with layers and kind); or allow more: "
        f"--max-kl, or --allow-loss for any (what was found so far is kept in {work})",
    )
