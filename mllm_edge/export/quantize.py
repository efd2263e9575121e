"""From a float bundle (or a checkpoint) and calibration data to a quantized bundle with the proof of what that cost."""

import importlib.util
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm_edge.bundle import MANIFEST, Bundle, write_manifest
from mllm_edge.calibration.bits import check_bits
from mllm_edge.calibration.data import DEFAULT_PROMPT
from mllm_edge.calibration.evaluate import Proof
from mllm_edge.calibration.figure import draw_errors
from mllm_edge.calibration.half import KEY, Float32Operators
from mllm_edge.calibration.inputs import (
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
from mllm_edge.calibration.int8_cache import check_cache
from mllm_edge.calibration.quantize_job import FIGURE, Gate, QuantizeJob, layers_of
from mllm_edge.calibration.recipes import (
    Recipe,
    at_most,
    calibrated_recipe,
    check_rules,
)
from mllm_edge.checksums import file_entry
from mllm_edge.compare.cases import Case
from mllm_edge.errors import AccuracyError, BundleError, MllmEdgeError
from mllm_edge.export.checkpoint.files import local_path
from mllm_edge.export.early import check_source
from mllm_edge.export.judge import remedy
from mllm_edge.export.pipeline import Verify, export
from mllm_edge.export.workspace import check_space, full_disk, reserved, workspace
from mllm_edge.json_form import to_json
from mllm_edge.loss import MAX_KL, Loss, headline, warning
from mllm_edge.progress import Progress, Silent
from mllm_edge.spec import Manifest

__all__ = ["FIGURE", "FromCheckpoint", "Gate", "QuantizeReport", "quantize"]


@dataclass(frozen=True)
class FromCheckpoint:
    """How a checkpoint becomes the float bundle that is calibrated: options of `pipeline.export`."""

    targets: tuple[str, ...] = ("cpu",)
    fallback: bool = True
    verify_mode: Verify = "auto"
    revision: str | None = None
    adapters: tuple[str, ...] = ()
    verify_cases: tuple[Case, ...] = ()


@dataclass(frozen=True)
class QuantizeReport:
    """What was done with `samples` of the user's own and `builtin` questions that come with the package.

    `without_images`: components that were not calibrated because no sample has an image → the precision they got
    instead. `layers`: component → layer → (error, error of rounding to nearest), relative, for sampled inputs; only
    layers that calibration decided about. `float32_operators`: graph file → operator → magnitude, those of
    half-precision graphs that half precision would have overflowed in. `skipped`: a line on each sample that was left
    out because an image of it cannot be read. `against_rounding`: the divergence of the decoder on samples that
    calibration held apart, with the weights that were found, with plain rounding, and the standard error of the
    difference; rounding was written where it is clearly better. None: it was not measured. `loss`: of the proof, with
    what 8 bits would cost; `warning`: what to do about it where people will notice. `notices`: which layers got more
    bits, as the manifest keeps it beside the source's."""

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
    against_rounding: tuple[float, float, float] | None = None
    loss: Loss | None = None
    warning: str = ""
    builtin: int = 0
    without_images: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return to_json(self)


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = "int4",
    most_bits: float | None = None,
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

    `recipe`: a name, a .toml file, or a Recipe; `most_bits`: in the place of the recipe's, see `Recipe`.
    `data` as for `load_samples`, `prompt` for folders of images; questions
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
    if most_bits is not None:
        chosen = at_most(chosen, most_bits)
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
        names = {n: [layer.name for layer in layers_of(bundle, n)] for n in bundle.manifest.components}
        check_rules(chosen, names)
        check_bits(chosen, layers_of(bundle, "decoder"))
        if not images:
            check_vision(chosen, names, bundle.manifest.model.role)
    except MllmEdgeError:
        shutil.rmtree(work)  # nothing in it is worth another try
        raise
    if again:
        progress.stage(f"going on where it was interrupted; {so_far(work, bundle.manifest.components)}")
    job = QuantizeJob(bundle, chosen, samples.calibration, work, threads, progress)
    job.choose_bits(gate)
    findings, losses = job.against_rounding(job.calibrate())
    job.raise_worst(findings, gate)
    check_space(out, bundle.nbytes)
    with workspace(out, bundle.nbytes) as folder:
        manifest, proof = job.prove(folder, findings, samples.kept)
        while gate.missed(proof) and job.raise_more():
            manifest, proof = job.prove(folder, findings, samples.kept)
        layers = {name: job.errors(name, found) for name, found in findings.items()}
        loss, fix = job.loss(proof, samples.kept), remedy(chosen, len(samples.own))
        if not allow_loss:
            _check_gate(gate, proof, loss, layers, work, fix)
        manifest = _with_figure(folder, manifest, layers)
        accuracy = {**proof.as_dict(), "layers": to_json(layers), **samples.counts()}
        accuracy["loss"] = to_json(loss)
        if losses is not None:
            accuracy["kl_against_rounding"] = to_json(losses)
        write_manifest(folder, replace(manifest, accuracy=accuracy, provenance=_told(manifest, job.notices)))
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
        warning=warning(to_json(loss), fix),
        builtin=len(samples.builtin),
        without_images=replaced_parts(wished, chosen),
        notices=job.notices,
    )


def _told(manifest: Manifest, notices: tuple[str, ...]) -> dict[str, Any]:
    """The provenance with `notices` beside those of the source's export."""
    return {**manifest.provenance, "notices": [*manifest.provenance.get("notices", []), *notices]}


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
