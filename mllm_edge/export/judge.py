"""What is done about a bundle's loss: refused, told, or said why it was not measured."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm_edge.calibration.recipes import Recipe
from mllm_edge.errors import AccuracyError, ParityError
from mllm_edge.export.answers import References
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.loss import ask, measure
from mllm_edge.export.source_model import Reference
from mllm_edge.json_form import to_json
from mllm_edge.loss import MAX_KL, NOT_MEASURED, WARN_KL, Loss, headline

__all__ = [
    "Allowance",
    "asked",
    "judge",
    "judged",
    "least_bits",
    "loss_of",
    "remedy",
    "require_rounding",
    "unmeasured",
]

_PICTURE = 1  # of the comparison's cases, the one that goes into the loss
# A loss comes from something else than rounding when it is so many times what rounding the source itself costs. Right
# graphs lie near 1; on trained weights at 4 bits, wrong ones from 2.3 on. On the few tokens of terse models that is
# noise: there it has to be a good part of the divergence between unrelated distributions, too.
_TIMES_ROUNDING, _FEW, _PART_OF_UNRELATED = 2.0, 100, 0.2


@dataclass(frozen=True)
class Allowance:
    """Which loss may be written: a mean KL of at most `max_kl` nats, or (`anyway`) any."""

    max_kl: float = MAX_KL
    anyway: bool = False


def judged(
    reference: Reference,
    folder: Path,
    recipe: Recipe,
    targets: Sequence[str],
    allowance: Allowance,
    known: Mapping[str, Loss],
) -> dict[str, Any]:
    """The loss of the bundle in `folder` as a manifest's `accuracy` has it: the first target's, under `targets` those
    of the others; or why it cannot be measured. `known`: what `loss_of` has measured already. Of a source of which only
    the first layers were loaded it is looked at only, and not returned.

    Raises ParityError for a loss that rounding does not explain, AccuracyError for one that is not allowed.
    """
    try:
        references = asked(reference, folder)
    except AccuracyError as e:
        return {NOT_MEASURED: f"{e.message}; {e.fix}"}
    losses = {target: known.get(target) or measure(references, folder, target) for target in targets}
    for target, loss in losses.items():
        require_rounding(loss, references, recipe, target)
    if reference.scope.decoder_layers is not None:
        return {}
    for target, loss in losses.items():
        judge(loss, allowance, remedy(recipe), f" for {target}" if len(losses) > 1 else "")
    first, *others = targets
    found = to_json(losses[first])
    if others:
        found["targets"] = {target: to_json(losses[target]) for target in others}
    return {"loss": found}


def loss_of(reference: Reference, folder: Path, target: str) -> Loss | None:
    """That of the bundle in `folder`; None where it cannot be measured."""
    try:
        return measure(asked(reference, folder), folder, target)
    except AccuracyError:
        return None


def asked(reference: Reference, folder: Path) -> References:
    """What the reference answers to the built-in questions, asked for once; raises AccuracyError as `ask` does."""
    if reference.references is None:
        reference.references = ask(reference, folder, reference.cases[_PICTURE])
    return reference.references


def require_rounding(loss: Loss, references: References, recipe: Recipe, target: str) -> None:
    """Raise ParityError for a loss that rounding to the recipe's bits does not explain: the graph is wrong."""
    kl = loss.kl if loss.kl_texts is None else loss.kl_texts
    few = sum(len(a.tokens) for a in references.texts) < _FEW
    if kl < WARN_KL or (few and kl < _PART_OF_UNRELATED * references.unrelated):
        return
    bits = least_bits(recipe)
    by_rounding = references.explained(bits, min(recipe.head.bits, 8), target.startswith("tensorrt"))
    if kl < _TIMES_ROUNDING * by_rounding:
        return
    raise ParityError(
        f"the exported graphs for {target} disagree with the source model: {headline(asdict(loss))}, where rounding "
        f"the source's own weights to {bits} bits costs KL {by_rounding:.2g}",
        "please report this with the model's name; --verify off writes the bundle all the same",
    )


def judge(loss: Loss, allowance: Allowance, fix: str, where: str = "") -> None:
    """Raise AccuracyError for a loss that is not allowed; `fix`: see `remedy`; `where`: of which graphs, in words."""
    if loss.kl <= allowance.max_kl or allowance.anyway:
        return
    raise AccuracyError(
        f"quantization loses too much{where}: {headline(asdict(loss))}; a KL of {allowance.max_kl:g} is allowed "
        f"(--max-kl). Asked {loss.question!r}, the float model answers {loss.answer_before!r:.200}, this bundle "
        f"{loss.answer_after!r:.200}",
        f"{fix}; --allow-loss writes it all the same",
    )


def least_bits(recipe: Recipe) -> int:
    """Of any of the decoder's layers."""
    return min([recipe.decoder.bits, *(rule.precision.bits for rule in recipe.rules)])


def remedy(recipe: Recipe, samples: int | None = None) -> str:
    """What loses less than a recipe, calibrated on so many samples of the user's own; None: not calibrated."""
    few = least_bits(recipe) < 8
    ways = ["use --recipe int8"] if few else []
    if samples is not None:
        ways.append("give more samples" if samples else "give questions of your own as --data")
    elif few:
        ways.append("calibrate: mllm-edge quantize, on questions that come with it or (--data) your own")
    return ", or ".join([*ways, "use --recipe fp16"])


def unmeasured(source: Source, out: str, off: bool, whole_limit: float) -> dict[str, Any]:
    """Why a loss is not measured when nothing is compared (`off`), or of a model of more than `whole_limit` parameters
    only the first layers, and the command that does it; as a manifest's `accuracy` has it."""
    compare = f"with: mllm-edge compare {shlex.quote(str(source.folder))} {shlex.quote(out)}"
    ways = [] if source.adapters else [compare]  # it would compare with the model without them
    if off:
        ways.append("by an export without --verify off")
        return {NOT_MEASURED: f"nothing was compared (--verify off); measure it {' or '.join(ways)}"}
    ways.append("by an export with --verify full")
    return {
        NOT_MEASURED: f"of a model of more than {whole_limit / 1e9:g} billion parameters only the first layers are "
        f"compared; measure it {' or '.join(ways)} (the whole source model runs, in float32)"
    }
