"""From a checkpoint to a bundle: plan, build, write, verify, move into place."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mllm_edge.bundle import write_manifest
from mllm_edge.calibration.half import KEY, Float32Operators, keep_in_range
from mllm_edge.calibration.recipes import Recipe, at_most, is_quantized, recipe
from mllm_edge.compare.cases import Case
from mllm_edge.errors import OptionError, WeightsError
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source, open_source
from mllm_edge.export.checkpoint.vocabulary import check_generation
from mllm_edge.export.early import check_checkpoint
from mllm_edge.export.export_job import ExportJob
from mllm_edge.export.family import family_for, open_weights, reading, understand
from mllm_edge.export.judge import Allowance, remedy, unmeasured
from mllm_edge.export.plan import Plan
from mllm_edge.export.targets import TARGETS, Form, forms
from mllm_edge.export.workspace import check_space, reserved, workspace
from mllm_edge.json_form import to_json
from mllm_edge.loss import MAX_KL, NOT_MEASURED, warning
from mllm_edge.progress import Progress, Silent

__all__ = ["TARGETS", "WHOLE_LIMIT", "ExportReport", "Verify", "export", "require_all_used"]

Verify = Literal["auto", "full", "off"]
WHOLE_LIMIT = 2_000_000_000  # parameters; larger models are compared by their first layers
_OTHER_FILES = 16 << 20  # bytes; room for tokenizer and graphs in the estimate


@dataclass(frozen=True)
class ExportReport:
    """What an export did, or (dry run) would do. `components` maps names to bytes of weights, embeddings included;
    `float32_operators` are those of half-precision graphs that half precision would have overflowed in; `notices` say
    what the user should know of how the checkpoint was read, and which layers got more bits. `loss`: a `Loss` as a
    dict, of a quantized recipe's first target; with others, theirs under `targets`. Where it was not measured,
    `loss_not_measured` says why. `warning`: what to do about a loss that people notice."""

    source: str
    adapters: tuple[str, ...]
    out: str
    targets: tuple[str, ...]
    recipe: str
    family: str
    parameters: int
    components: Mapping[str, int]
    parity: Mapping[str, Any]
    nbytes: int
    dry_run: bool
    float32_operators: Float32Operators = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    loss: Mapping[str, Any] = field(default_factory=dict)
    loss_not_measured: str = ""
    warning: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return to_json(self)


def export(
    model: str,
    out: str | Path,
    *,
    targets: Sequence[str] = ("cpu",),
    fallback: bool = True,
    recipe_name: str = "int4",
    verify_mode: Verify = "auto",
    force: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    adapters: Sequence[str | Path] = (),
    verify_cases: Sequence[Case] = (),
    most_bits: float | None = None,
    max_kl: float = MAX_KL,
    allow_loss: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Export `model` (a directory or a hub id) to a bundle in `out`.

    The CPU's graphs are among those of other `targets`, unless `fallback` is False. `adapters` are directories or hub
    ids of LoRA adapters, merged into the weights in their order. `verify_cases`: questions and images of your own that
    the bundle is compared with the source model on, too. A quantized bundle whose mean KL divergence from the source
    model's next token is more than `max_kl` nats fails, unless `allow_loss`. `most_bits`: of each weight of the
    decoder, in the place of the recipe's.

    Raises SourceError and its kinds, ExportError, ParityError, AccuracyError, LockedError (another process works on
    `out`); then `out` is as it was before.
    """
    if not max_kl >= 0:
        raise OptionError(f"max_kl = {max_kl!r}", "a KL divergence in nats: 0 or more")
    check_checkpoint(model)
    chosen = recipe(recipe_name)
    if most_bits is not None:
        if verify_mode == "off":
            raise OptionError(f"most_bits = {most_bits:g}, and nothing is measured", "leave out --verify off")
        chosen = at_most(chosen, most_bits)
    wanted = forms(targets, chosen.name, fallback)
    with nullcontext(Path(out)) if dry_run else reserved(Path(out), force) as place:
        return _export(
            model,
            str(out),
            place,
            wanted,
            chosen,
            verify_mode,
            dry_run,
            revision,
            adapters,
            verify_cases,
            Allowance(max_kl, allow_loss),
            progress or Silent(),
        )


def _export(
    model: str,
    out: str,
    place: Path,
    wanted: Sequence[Form],
    chosen: Recipe,
    verify_mode: Verify,
    dry_run: bool,
    revision: str | None,
    adapters: Sequence[str | Path],
    verify_cases: Sequence[Case],
    allowance: Allowance,
    progress: Progress,
) -> ExportReport:
    """`out` is the user's name for the directory `place`."""
    progress.stage("reading the checkpoint")
    source = open_source(model, revision, adapters, progress.notice)
    family_for(source)  # of a type that nobody serves no weight need be opened
    with reading(source):
        weights = open_weights(source)
        plan = understand(source, weights)
        check_generation(source, plan.texts.generation, plan.model)
        job = ExportJob(source, plan, weights, chosen, wanted, progress)
        sizes = job.plan_sizes()
    require_all_used(source, plan, weights)
    report = ExportReport(
        source=model,
        adapters=tuple(str(adapter) for adapter in adapters),
        out=out,
        targets=tuple(form.target for form in wanted),
        recipe=chosen.name,
        family=plan.model.family,
        parameters=plan.model.parameters,
        components=sizes,
        parity={},
        nbytes=sum(sizes.values()),
        dry_run=dry_run,
        notices=tuple(source.notices),
    )
    if dry_run:
        return report
    whole = verify_mode == "full" or plan.model.parameters <= WHOLE_LIMIT
    if chosen.limits_bits and not whole:
        raise OptionError(
            f"most_bits = {chosen.most_bits:g}: of a model of more than {WHOLE_LIMIT / 1e9:g} billion parameters only "
            "the first layers are measured",
            "--verify full (the whole source model runs, in float32), or mllm-edge quantize",
        )
    proof = job.proof_bytes(whole) if verify_mode != "off" else 0
    check_space(place, report.nbytes + _OTHER_FILES, proof)
    with workspace(place, report.nbytes + _OTHER_FILES) as folder:
        manifest = job.write(folder)
        accuracy: dict[str, Any] = {}
        if verify_mode != "off":
            if whole:  # all of it runs, in float32
                manifest = keep_in_range(folder, manifest, progress=progress)
                manifest = job.with_more_bits(folder, manifest, allowance.max_kl)
            parity, accuracy = job.verify(folder, manifest, whole, verify_cases, allowance)
            manifest = replace(manifest, parity=parity)
        if is_quantized(chosen) and not accuracy:
            accuracy = unmeasured(source, out, verify_mode == "off", WHOLE_LIMIT)
        # The comparison reads files, too.
        provenance = {**manifest.provenance, "notices": list(source.notices)}
        manifest = replace(manifest, provenance=provenance, accuracy=accuracy)
        write_manifest(folder, manifest)
    nbytes = sum(entry.nbytes for entry in manifest.files.values())
    operators = manifest.recipe.get(KEY, {})
    return replace(
        report,
        components=job.plan_sizes(),
        parity=manifest.parity,
        nbytes=nbytes,
        float32_operators=operators,
        notices=tuple(source.notices),
        loss=accuracy.get("loss", {}),
        loss_not_measured=accuracy.get(NOT_MEASURED, ""),
        warning=warning(accuracy["loss"], remedy(chosen)) if "loss" in accuracy else "",
    )


def require_all_used(source: Source, plan: Plan, weights: Weights) -> None:
    """Raise WeightsError for a tensor of the checkpoint that no part of the export uses."""
    weights.ignore(plan.ignored)
    unused = weights.unused()
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        first = weights.stored_name(unused[0])
        raise WeightsError(
            f"{source.folder}: the checkpoint holds {first}{more}, which no part of the export uses",
            f"the model has a part that family {plan.model.family} does not know: exporting would drop it silently",
        )
