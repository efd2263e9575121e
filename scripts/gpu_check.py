"""Does the GPU give what the CPU gives? One command on any machine with an NVIDIA GPU:

python scripts/gpu_check.py [BUNDLE] [--recipe fp16] [--json F] [--cuda-only]

Runs a bundle on TensorRT, TensorRT for RTX and ONNX Runtime's CUDA provider, whatever of these is installed, and the
same graphs on ONNX Runtime's processor, and compares image features, logits and tokens. Without a BUNDLE the sample
model of this repository is exported first, which needs the extra `export`. Engines are built into the bundle. Of
TensorRT it tells graphs recorded, replayed and failed, the host's time for a step, and what TensorRT warned of.

`--cuda-only`: no bundle and no TensorRT, but what CUDA itself does here; needs cuda-bindings, and torch for two lines.

Every line says whether it was executed, and if not why. The exit code is 0 when all that was executed agrees (also when
nothing could be), else 1.
"""

import argparse
import dataclasses
import datetime
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge import __version__
from mllm_edge.bundle import Bundle
from mllm_edge.compare.cases import synthetic_cases
from mllm_edge.compare.compare import summarize
from mllm_edge.compare.outputs import LOGITS, Outputs, bundle_outputs
from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.backends.base import Backend
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.installed import engines
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.machine.hardware import read_machine
from mllm_edge.runtime.profiling.measure import synthetic_image
from mllm_edge.runtime.vlm import VLM

sys.path.insert(0, str(Path(__file__).parent))
from gpu_cuda import check_cuda
from gpu_watch import Seen, watching

SAMPLE = Path(__file__).parents[1] / "examples" / "sample_vlm" / "model"
# Half precision summed in another order; a wrong graph gives errors near 1.
TOLERANCE = 2e-2
WARMUP, CALLS, NEW_TOKENS = 2, 5, 32
STAGES = ("vision_encoder", "connector", "prefill", "ttft")
# What is run: a name, the target whose graphs it takes, and the module that executes them.
LINES = (
    ("TensorRT", "tensorrt", "tensorrt"),
    ("TensorRT", "tensorrt-10.3", "tensorrt"),
    ("TensorRT for RTX", "tensorrt", "tensorrt_rtx"),
    ("TensorRT for RTX", "tensorrt-10.3", "tensorrt_rtx"),
    ("ONNX Runtime CUDA", "cuda", "onnxruntime"),
)


@dataclass(frozen=True)
class Line:
    """`verdict`: agrees, disagrees, failed (while running) or not executed; `why` for all but the first. `errors` as in
    `Comparison`; `tokens`: how many of the CPU's greedy ones are the likeliest here too; `milliseconds`: medians
    of stages; `host_ms`: of a decode step, without the time that the host waits for the GPU, 0 where that is not known;
    `seen`: graphs, engines, calls and warnings."""

    engine: str
    target: str
    verdict: str
    why: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    tokens: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    host_ms: float = 0.0
    seen: dict[str, Any] = field(default_factory=dict)


def check(path: Path, say: Callable[[str], None]) -> list[Line]:
    """One line for each engine and target."""
    bundle = Bundle.load(path)
    lines = []
    for engine, target, module in LINES:
        say(f"{engine}, target {target} …")
        with watching() as seen:
            line = _line(bundle, engine, target, module, lambda text: say(f"  {text}"), seen)
        # Of ONNX Runtime's own calls nothing is seen.
        lines.append(replace(line, seen=seen.facts()) if seen.engines else line)
    return lines


def _line(bundle: Bundle, engine: str, target: str, module: str, say: Callable[[str], None], seen: Seen) -> Line:
    try:
        only = _only(bundle, target, module)
        vlm = VLM(only, open_backend(target, notice=say), notice=say)
    except MllmEdgeError as e:
        return Line(engine, target, "not executed", f"{e.message} ({e.fix})" if e.fix else e.message)
    with vlm:
        try:
            return _compared(vlm, bundle, engine, target, seen)
        except MllmEdgeError as e:
            return Line(engine, target, "failed", e.message)


def _only(bundle: Bundle, target: str, module: str) -> Bundle:
    """The bundle with the variants for one target, and of the modules that may execute them only this one: what these
    refuse fails, and runs nowhere else. Raises BundleError when it has none."""
    components = {}
    for name, component in bundle.manifest.components.items():
        variant = bundle.variant(name, target)
        minimum = {key: version for key, version in variant.minimum.items() if key == module}
        components[name] = replace(component, variants=(replace(variant, minimum=minimum),))
    return Bundle(bundle.path, replace(bundle.manifest, components=components))


def _compared(vlm: VLM, bundle: Bundle, engine: str, target: str, seen: Seen) -> Line:
    cases = synthetic_cases(vlm.spec.image is not None)
    expected = _outputs(bundle, OnnxRuntimeCpu(target=target))
    found = [bundle_outputs(vlm, case, e.tokens) for case, e in zip(cases, expected, strict=True)]
    result = summarize(str(bundle.path), engine, cases, expected, found, TOLERANCE, target)
    beyond = [f"{name} {error:.2g}" for name, error in result.errors.items() if not error <= TOLERANCE]
    agreed = round(result.greedy_agreement * result.greedy_tokens)
    line = Line(engine, target, "agrees", errors=dict(result.errors), tokens=f"{agreed}/{result.greedy_tokens}")
    if beyond:  # what is wrong is not measured
        return replace(line, verdict="disagrees", why=f"beyond {TOLERANCE:g}: {', '.join(beyond)}")
    return _measured(vlm, line, seen)


def _measured(vlm: VLM, line: Line, seen: Seen) -> Line:
    images = [synthetic_image()] if vlm.spec.image is not None else []
    options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    calls = [vlm.generate("Describe this.", images, **options).metrics for _ in range(WARMUP + CALLS)][WARMUP:]
    return replace(
        line,
        host_ms=_host_ms(vlm, images, seen),
        milliseconds={
            stage: 1e3 * float(np.median([{**call.stages, "ttft": call.ttft}[stage] for call in calls]))
            for stage in STAGES
        },
        tokens_per_second=float(np.median([call.tokens_per_second for call in calls])),
    )


def _host_ms(vlm: VLM, images: list[np.ndarray], seen: Seen) -> float:
    """The difference of a long answer and one of a single token."""

    def host(tokens: int) -> float:
        begin, waited = time.perf_counter(), seen.waited
        vlm.generate("Describe this.", images, max_new_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - begin - (seen.waited - waited)

    if not seen.engines:
        return 0.0
    long, short = (float(np.median([host(tokens) for _ in range(CALLS)])) for tokens in (NEW_TOKENS, 1))
    return 1e3 * max(0.0, long - short) / (NEW_TOKENS - 1)


def _outputs(bundle: Bundle, backend: Backend) -> list[Outputs]:
    with VLM(bundle, backend) as vlm:
        return [bundle_outputs(vlm, case) for case in synthetic_cases(vlm.spec.image is not None)]


def _sample(folder: Path, recipe: str) -> Path:
    from mllm_edge.export.pipeline import export

    export(str(SAMPLE), folder, targets=["cuda", "tensorrt", "tensorrt-10.3"], recipe_name=recipe, verify_mode="off")
    return folder


def _table(lines: list[Line]) -> str:
    rows = [["engine", "target", "verdict", "features", "logits", "tokens"]]
    rows[0] += [*(f"{s} ms" for s in STAGES), "tokens/s", "host ms", "graphs"]
    for line in lines:
        features = [error for name, error in line.errors.items() if name not in LOGITS]
        logits = [line.errors[name] for name in LOGITS if name in line.errors]
        times = [f"{line.milliseconds[s]:.1f}" if line.milliseconds else "" for s in STAGES]
        rate = f"{line.tokens_per_second:.1f}" if line.tokens_per_second else ""
        worst = [f"{max(errors):.1e}" if errors else "" for errors in (features, logits)]
        host = f"{line.host_ms:.2f}" if line.host_ms else ""
        rows.append([line.engine, line.target, line.verdict, *worst, line.tokens, *times, rate, host, _graphs(line)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    text += [f"{line.engine}, {line.target}: {line.verdict}: {line.why}" for line in lines if line.why]
    return "\n".join(text + [f"{line.engine}, {line.target}: {what}" for line in lines for what in _remarks(line)])


def _graphs(line: Line) -> str:
    """Recorded, replayed, failed."""
    return "/".join(str(number) for number in line.seen["graphs"].values()) if line.seen else ""


def _remarks(line: Line) -> list[str]:
    seen = line.seen
    found = [f"warns: {text}" for text in seen.get("warnings", ())]
    if seen.get("unknown_shapes"):
        found.append(f"TensorRT does not know the shapes of {', '.join(seen['unknown_shapes'])}")
    found += [f"{name} failed {count} times" for name, count in seen.get("failed_calls", {}).items() if count]
    return found


def _here() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "mllm_edge": __version__,
        "machine": dataclasses.asdict(read_machine(Path("/"), shutil.which("nvidia-smi"))),
        "engines": {name: dataclasses.asdict(engine) for name, engine in engines().items()},
    }


def _facts(path: Path, lines: list[Line]) -> dict[str, Any]:
    return _here() | {
        "recipe": Bundle.load(path).manifest.recipe.get("name"),
        "tolerance": TOLERANCE,
        "lines": [dataclasses.asdict(line) for line in lines],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", nargs="?", type=Path, help="default: the sample model, exported to a temporary place")
    parser.add_argument("--recipe", default="fp16", choices=["fp16", "int8", "int4"], help="of the sample model")
    parser.add_argument("--json", type=Path, help="write machine and lines to this file")
    parser.add_argument("--cuda-only", action="store_true", help="tell what CUDA does here, without TensorRT")
    options = parser.parse_args(arguments)
    if options.cuda_only:
        return _cuda_only(options.json)
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        try:
            path = options.bundle or _sample(Path(folder) / "sample", options.recipe)
            lines = check(path, lambda text: print(text, file=sys.stderr))
        except (MllmEdgeError, ImportError) as e:
            print(f"nothing was executed: {e}", file=sys.stderr)
            return 2
        print(_table(lines))
        if options.json:
            options.json.write_text(json.dumps(_facts(path, lines), indent=1) + "\n", encoding="utf-8")
    return 1 if any(line.verdict in ("disagrees", "failed") for line in lines) else 0


def _cuda_only(file: Path | None) -> int:
    try:
        found = check_cuda()
    except MllmEdgeError as e:
        print(f"nothing was executed: {e}", file=sys.stderr)
        return 2
    print("\n".join(f"{name}: {what}" for name, what in found.items()))
    if file:
        file.write_text(json.dumps(_here() | {"cuda": found}, indent=1) + "\n", encoding="utf-8")
    return 1 if any("WRONG" in what for what in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
