"""The half of `mllm-edge doctor` that looks at a checkpoint."""

from typing import Any

from mllm_edge.cli.exporter import load_exporter
from mllm_edge.cli.output import bytes_text, table

__all__ = ["checkpoint_report", "checkpoint_text"]


def checkpoint_report(folder: str, adapters: tuple[str, ...]) -> dict[str, Any]:
    """What an export of the checkpoint in `folder` would do; see `export.diagnosis.Diagnosis`."""
    load_exporter()
    from mllm_edge.export.diagnosis import diagnose_checkpoint

    return diagnose_checkpoint(folder, adapters).as_dict()


def checkpoint_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{name:<16}{value}" for name, value in _facts(report).items() if value]
    lines += [f"note: {text}" for text in report["notices"]]
    for refusal in report["refusals"]:
        lines += [f"refused: {refusal['what']}", f"  fix: {refusal['fix']}"]
    if report["costs"]:
        header, rows = ("recipe", "decoder, bits", "bundle", "in memory", "read per token"), []
        for name, cost in report["costs"].items():
            sizes = [bytes_text(cost[key]) for key in ("bundle", "run", "token")]
            rows.append((name, f"{cost['bits']:.1f}", *sizes))
        lines += ["", table(header, rows), "", "in memory: weights, and the cache for a full context"]
    if report["exports"]:
        lines += ["", f"next: mllm-edge export {report['checkpoint']} OUT"]
    return "\n".join(lines)


def _facts(report: dict[str, Any]) -> dict[str, str]:
    stored = ", ".join(f"{count} × {kind}" for kind, count in report["stored"].items())
    seconds, memory = report["export_seconds"], report["export_memory"]
    exporting = "" if seconds is None else f"about {_duration(seconds)} and {bytes_text(memory)} of memory on two cores"
    return {
        "checkpoint": report["checkpoint"],
        "model type": report["model_type"],
        "family": report["family"] or "none",
        "parameters": f"{report['parameters'] / 1e6:,.1f} M" if report["parameters"] else "",
        "tensors": stored,
        "context": f"{report['context_length']} tokens" if report["context_length"] else "",
        "export takes": exporting,
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
