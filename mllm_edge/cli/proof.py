"""What quantization cost, as text."""

import shlex
from collections.abc import Mapping
from typing import Any

from mllm_edge.cli.output import bytes_text, milliseconds, table

__all__ = ["float32_operators", "layers_table", "proof_summary"]

_WORST = 5  # layers shown


def proof_summary(report: dict[str, Any]) -> str:
    """The report of a quantization, as a dict: the proof, the worst layers, what to do next."""
    from mllm_edge.loss import words

    out = shlex.quote(report["out"])
    ending = (
        f"wrote {report['out']}: {bytes_text(report['nbytes'])} in {report['seconds']:.1f} s\n"
        f'next: mllm-edge run {out} "What is in the picture?" --image FILE'
    )
    return "\n\n".join(
        part
        for part in (
            _proof(report),
            _rounding(report),
            layers_table(report["layers"]),
            float32_operators(report),
            _without_images(report),
            _skipped(report),
            words(report),
            ending,
        )
        if part
    )


def float32_operators(report: dict[str, Any]) -> str:
    """The operators that compute in float32 where half precision would overflow, by graph; empty without any."""
    lines = []
    for file, found in report["float32_operators"].items():
        largest = sorted(found.items(), key=lambda item: item[1], reverse=True)
        names = ", ".join(f"{name} ({peak:.2g})" for name, peak in largest[:_WORST])
        more = f" and {len(found) - _WORST} more" if len(found) > _WORST else ""
        lines.append(f"{file}: in float32, where half precision would overflow: {names}{more}")
    return "\n".join(lines)


def _skipped(report: dict[str, Any]) -> str:
    """The samples that were left out, all of them: whoever asked for --skip-bad wants to know."""
    lines = report.get("skipped", ())
    if not lines:
        return ""
    return "\n".join([f"left out, an image cannot be read ({len(lines)}):", *(f"  {line}" for line in lines)])


def _without_images(report: dict[str, Any]) -> str:
    """What the vision side got because there was no image to calibrate it with."""
    parts = " and ".join(f"{part} {kind}" for part, kind in report.get("without_images", {}).items())
    return (
        f"no sample has an image, so these are as without data: {parts}; --data with images calibrates them"
        if parts
        else ""
    )


def _rounding(report: dict[str, Any]) -> str:
    """Whether calibration of the decoder paid, on samples that it held apart."""
    losses = report.get("against_rounding")
    if not losses:
        return ""
    from mllm_edge.loss import calibration_costs

    found, rounded, error = losses
    line = (
        f"decoder on samples held apart: KL {found:.2g} as calibrated, {rounded:.2g} rounded to nearest (difference "
        f"± {error:.1g})"
    )
    if not calibration_costs(losses):
        return line
    return f"{line}\ncalibration did not pay, so the decoder is rounded: give more samples, or 8 bits (--recipe int8)"


def _proof(report: dict[str, Any]) -> str:
    proof = report["proof"]
    rows = [
        [f"{name}: SQNR, cosine", f"{found['sqnr']:.1f} dB, {found['cosine']:.5f}"]
        for name, found in proof["components"].items()
    ]
    rows += [
        ["KL divergence: mean, worst", f"{proof['kl']:.2g}, {proof['kl_worst']:.2g}"],
        ["likeliest token agrees", f"{proof['top1']:.2%} of {proof['positions']}"],
        ["greedy answer repeated", f"{proof['prefix']:.1%}"],
    ]
    if proof["exact_match"]:
        before, after = proof["exact_match"]
        rows.append(["answers right: float, quantized", f"{before:.1%}, {after:.1%}"])
    for title, key, text in (
        ("size", "nbytes", bytes_text),
        ("prefill ms", "prefill_seconds", milliseconds),
        ("token ms", "token_seconds", milliseconds),
    ):
        before, after = proof[key]
        rows.append([f"{title}: float, quantized", f"{text(before)}, {text(after)}"])
    builtin = report.get("builtin", 0)
    own = f"{report['samples']} samples" + (f" and {builtin} built-in questions" if builtin else "")
    own = own if report["samples"] else f"{builtin} built-in questions"
    title = f"{report['recipe']}, {own}; proof on {report['held_back']} others"
    return table([title, ""], rows)


def layers_table(layers: Mapping[str, Any]) -> str:
    """The worst of the layers (component → layer → its error, that of rounding); empty without any."""
    ranked = sorted(((errors, f"{c}: {n}") for c, found in layers.items() for n, errors in found.items()), reverse=True)
    if not ranked:
        return ""
    rows = [[name, f"{error:.2%}", f"{nearest:.2%}"] for (error, nearest), name in ranked[:_WORST]]
    return table(["layers with the largest error", "error", "by rounding"], rows)
