"""What quantization cost a bundle, and the words that tell it to people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MAX_KL", "NOT_MEASURED", "WARN_KL", "Loss", "calibration_costs", "headline", "warning", "words"]

MAX_KL = 0.5  # nats; what loses more is not written unless that is asked for
WARN_KL = 0.1  # nats; from here on people notice
NOT_MEASURED = "loss_not_measured"  # in a report, and in a manifest's `accuracy`: the reason, and how to measure it
_CLEAR = 2.0  # standard errors
_ANSWER = 240  # characters of an answer that are shown


@dataclass(frozen=True)
class Loss:
    """Mean KL divergence in nats of a bundle's next token from the float model's along the float model's answers, how
    often the likeliest token stays the same, and over how many positions. `kl_8_bits`, `agreement_8_bits`: the same
    for the float model with its language model rounded to 8-bit blocks, on the questions without pictures; None where
    that was not measured, for losses that are not worth it. `kl_texts`: the bundle's on these, None where they are not
    apart. `question`: one of them, and what the float model and the
    bundle answer."""

    kl: float
    agreement: float
    positions: int
    kl_8_bits: float | None
    agreement_8_bits: float | None
    question: str
    answer_before: str
    answer_after: str
    kl_texts: float | None = None


def calibration_costs(against_rounding: Sequence[float]) -> bool:
    """Whether what calibration found (divergence), against rounding to nearest (divergence, standard error of the
    difference), is worse beyond doubt."""
    found, rounded, error = against_rounding
    return found - rounded > _CLEAR * error


def headline(loss: Mapping[str, Any]) -> str:
    """A loss, as a dict, in a line: KL 0.26 nats, the likeliest token stays in 76% of 365 (8 bits: KL 0.004, 97%)."""
    line = f"KL {_nats(loss['kl'])} nats, the likeliest token stays in {loss['agreement']:.0%} of {loss['positions']}"
    if loss["kl_8_bits"] is None:
        return line
    return f"{line} (8 bits: KL {_nats(loss['kl_8_bits'])}, {loss['agreement_8_bits']:.0%})"


def words(accuracy: Mapping[str, Any]) -> str:
    """What a report or a manifest's `accuracy` says of the loss: a line, a sample question with both answers, and a
    line for each further target; or why it was not measured. Empty where it says nothing."""
    loss = accuracy.get("loss")
    if loss:
        others = [f"loss for {target}: {headline(other)}" for target, other in loss.get("targets", {}).items()]
        return "\n".join([f"loss: {headline(loss)}", *_sample(loss), *others])
    reason = accuracy.get(NOT_MEASURED)
    return f"loss not measured: {reason}" if reason else ""


def warning(loss: Mapping[str, Any], remedy: str) -> str:
    """What to tell people of a loss that they will notice, the largest of all targets'; empty for others."""
    losses = {"": loss, **{f" for {target}": other for target, other in loss.get("targets", {}).items()}}
    where, largest = max(losses.items(), key=lambda item: item[1]["kl"])
    if largest["kl"] < WARN_KL:
        return ""
    what = f"this bundle answers differently from its float model{where}"
    return f"{what}: KL {_nats(largest['kl'])} nats (people notice from {WARN_KL:g} on); {remedy}"


def _nats(kl: float) -> str:
    return f"{kl:.2f}" if kl >= WARN_KL else f"{kl:.2g}"


def _sample(loss: Mapping[str, Any]) -> list[str]:
    lines = [("asked", "question"), ("float model", "answer_before"), ("this bundle", "answer_after")]
    return [f"  {title + ':':<13}{_shown(loss[key])}" for title, key in lines]


def _shown(text: str) -> str:
    """On one line, without what drives terminals, its end left out where it is long."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return plain if len(plain) <= _ANSWER else f"{plain[:_ANSWER]} …"
