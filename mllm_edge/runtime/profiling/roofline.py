"""How near each stage comes to what the machine can do: measured limits, and the bytes and arithmetic of the graphs.

A stage cannot be faster than its bytes over the read bandwidth, nor than its arithmetic over the rate of products. The
larger of both, over the seconds that it took, is the percentage of the limit.
"""

import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.files import write_whole
from mllm_edge.runtime.backends.onnxruntime_cpu import import_onnxruntime
from mllm_edge.runtime.limits import PREFILL_CHUNK
from mllm_edge.runtime.machine.cpu import cpu_name
from mllm_edge.runtime.machine.threads import Threads
from mllm_edge.runtime.onnx_file.cost import GraphCost, graph_cost, read_graph
from mllm_edge.runtime.onnx_file.protobuf import encode_bytes, encode_number
from mllm_edge.runtime.planning.shapes import crossed, crossed_bytes, stage_runs
from mllm_edge.runtime.prompt.layout import Layout
from mllm_edge.spec import Variant, state_bytes

__all__ = ["MachineLimits", "StageRoof", "Workload", "limits_file", "machine_limits", "product_graph", "roofline"]

_READ = 256 << 20  # bytes, far more than caches hold
_SIZE = 1024  # rows and columns of the matrices
_SECONDS = 0.6  # for each of the limits
_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6  # TensorProto.DataType
_NEAR, _FAR = 75.0, 40.0  # percent of the limit


@dataclass(frozen=True)
class MachineLimits:
    """`read_bytes_per_second` from memory; `flops_per_second` of matrix products by the numbers' type, 2 for each
    multiplication and addition. `measured`: now, not in an earlier process."""

    read_bytes_per_second: float
    flops_per_second: Mapping[str, float]
    measured: bool = True

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Workload:
    """What a call does: tokens of the prompt, new tokens, images of these layouts, and the tokens that the decoder runs
    in a step, on average: more than one where guesses are checked."""

    prompt_tokens: int
    new_tokens: int
    images: tuple[Layout, ...] = ()
    step_tokens: float = 1.0


@dataclass(frozen=True)
class StageRoof:
    """A stage's `seconds`, the `bytes` that it must read and its `flops`, which of both bounds it, what it reaches of
    that limit, and what to do about it. `decode` is one step: one token, unless guesses are checked."""

    stage: str
    seconds: float
    bytes: float
    flops: float
    bound: str
    percent_of_limit: float
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


# ---------------------------------------------------------------- the machine
def limits_file() -> Path:
    """Where limits are kept: limits.json in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm-edge" / "limits.json"


def machine_limits(threads: int | None = None, cache: Path | None = None) -> MachineLimits:
    """The CPU's limits with so many threads (default: physical cores): measured in 2 s, or as kept in `cache`
    (default: `limits_file()`; a folder that cannot be written to is no error). Raises BackendError without ONNX
    Runtime."""
    ort, threads = import_onnxruntime(), Threads.of(threads).count
    place = cache or limits_file()
    key = ", ".join((cpu_name(), platform.machine(), f"onnxruntime {ort.__version__}", f"{threads} threads"))
    kept = _kept(place)
    with suppress(KeyError, TypeError, ValueError):
        rates = {name: float(rate) for name, rate in kept[key]["flops_per_second"].items()}
        return MachineLimits(float(kept[key]["read_bytes_per_second"]), rates, measured=False)
    rates = {name: _product_rate(ort, name, threads) for name in ("float32", "int8")}
    limits = MachineLimits(_read_rate(threads), rates)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps({**kept, key: limits.as_dict()}, indent=1) + "\n", durable=False)
    return limits


def _kept(place: Path) -> dict[str, Any]:
    """What the file holds; nothing when it is missing or damaged."""
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _read_rate(threads: int) -> float:
    """Bytes per second that all threads together read and add up."""
    parts = np.array_split(np.ones(_READ // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return _READ / _fastest(lambda: list(pool.map(np.add.reduce, parts)))


def _product_rate(ort: Any, kind: str, threads: int) -> float:
    """Operations per second of square matrices' product."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(product_graph(kind, _SIZE), options, providers=["CPUExecutionProvider"])
    rows = np.ones((_SIZE, _SIZE), np.uint8 if kind == "int8" else np.float32)
    return 2.0 * _SIZE**3 / _fastest(lambda: session.run(None, {"rows": rows}))


def _fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of several runs: others on the machine can only make one slower."""
    work()
    best, end = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < end or best == math.inf:
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


def product_graph(kind: str, size: int) -> bytes:
    """A serialized ONNX graph that multiplies `rows` [size, size] by as large a weight, float32 or int8 (uint8 · int8);
    numbers of fields are those of onnx.proto."""
    integers = kind == "int8"
    taken, stored, given = (_UINT8, _INT8, _INT32) if integers else (_FLOAT, _FLOAT, _FLOAT)
    content = np.ones((size, size), np.int8 if integers else np.float32).tobytes()
    weight = (
        encode_number(1, size) * 2 + encode_number(2, stored) + encode_bytes(8, "weight") + encode_bytes(9, content)
    )
    names = encode_bytes(1, "rows") + encode_bytes(1, "weight") + encode_bytes(2, "product")
    node = names + encode_bytes(4, "MatMulInteger" if integers else "MatMul")
    graph = encode_bytes(1, node) + encode_bytes(2, "product") + encode_bytes(5, weight)
    graph += encode_bytes(11, _value("rows", taken, size)) + encode_bytes(12, _value("product", given, size))
    return encode_number(1, 8) + encode_bytes(8, encode_number(2, 17)) + encode_bytes(7, graph)


def _value(name: str, dtype: int, size: int) -> bytes:
    shape = encode_bytes(1, encode_number(1, size)) * 2
    tensor = encode_number(1, dtype) + encode_bytes(2, shape)
    return encode_bytes(1, name) + encode_bytes(2, encode_bytes(1, tensor))


# ---------------------------------------------------------------- the stages
def roofline(
    bundle: Bundle, variants: Mapping[str, Variant], seconds: Mapping[str, float], work: Workload, limits: MachineLimits
) -> tuple[StageRoof, ...]:
    """What the stages reach of the machine's limits: those of the components, prefill and decode that have `seconds`;
    decode's are of ONE step. `variants`: the graph that each component runs. Raises BundleError.

    Bytes are lower bounds: weights once a run, the cache once a step. A window that keeps attention short is not
    subtracted.
    """
    found = []
    for stage, cost, state in _costs(bundle, variants, set(seconds), work):
        spent, nbytes, flops = seconds[stage], float(cost.weight_bytes + state), sum(cost.flops.values())
        rates = limits.flops_per_second
        # A type without kernels of its own is computed as float32.
        arithmetic = sum(n / rates.get(kind, rates["float32"]) for kind, n in cost.flops.items())
        reading = nbytes / limits.read_bytes_per_second
        if spent <= 0.0 or not max(reading, arithmetic):
            continue
        bound = "memory" if reading >= arithmetic else "compute"
        percent = 100.0 * max(reading, arithmetic) / spent
        advice = _advice(stage, bound, percent, variants)
        found.append(StageRoof(stage, spent, nbytes, flops, bound, percent, advice))
    return tuple(found)


def _costs(
    bundle: Bundle, variants: Mapping[str, Variant], stages: set[str], work: Workload
) -> list[tuple[str, GraphCost, int]]:
    """Each stage's cost, and bytes of the cache or of images beside the weights."""
    model = bundle.manifest.model
    found, looked_at = list[tuple[str, GraphCost, int]](), crossed(model, work.images, work.prompt_tokens)
    for stage in model.stages:
        sizes = stage_runs(model, stage, variants, work.images, work.prompt_tokens)
        if stage.component in stages & set(variants) and sizes:
            found.append((stage.component, _stage(bundle, variants[stage.component], sizes), 0))
    held = partial(state_bytes, model.state, {t.name: t.dtype for t in variants["decoder"].inputs})
    graph = read_graph(bundle.listed(variants["decoder"].file))
    tokens = model.begun(work.prompt_tokens)
    kept = crossed_bytes(model, variants, work.images, work.prompt_tokens)
    if "prefill" in stages:
        pairs = tokens * (tokens + 1) / 2
        cost = graph_cost(graph, {"batch": 1, "sequence": tokens, "rows": 1}, tokens, pairs, tokens * looked_at)
        runs = math.ceil(tokens / PREFILL_CHUNK)
        found.append(("prefill", GraphCost(runs * cost.weight_bytes, cost.flops), held(tokens) + kept))
    if "decode" in stages:
        context, width = tokens + work.new_tokens // 2, work.step_tokens
        cost = graph_cost(
            graph, {"batch": 1, "sequence": width, "rows": width}, width, width * context, width * looked_at
        )
        found.append(("decode", cost, held(context) + kept))
    return found


def _stage(bundle: Bundle, variant: Variant, runs: Sequence[tuple[Mapping[str, int], int]]) -> GraphCost:
    """Of all runs together; the weights are read in each."""
    graph, nbytes, flops = read_graph(bundle.listed(variant.file)), 0, Counter[str]()
    for symbols, sequences in runs:
        # Where the graph does not tell how many tokens a tile has, its outputs do.
        rows = math.prod(symbols.get(d, 1) if isinstance(d, str) else d for d in variant.outputs[0].shape[:-1])
        cost = graph_cost(graph, symbols, rows, rows**2 / max(1, sequences))
        nbytes += cost.weight_bytes
        flops.update(cost.flops)
    return GraphCost(nbytes, flops)


def _advice(stage: str, bound: str, percent: float, variants: Mapping[str, Variant]) -> str:
    """What helps: less work where the machine is at its limit, less waste where it is far from it."""
    name = "decoder" if stage in ("prefill", "decode") else stage
    precision = variants[name].precision
    if percent < _FAR:
        return "far from the limit: time goes into small operators, threads or waiting; look at --ops and --threads"
    near = "near the limit" if percent >= _NEAR else "within reach of the limit"
    if bound == "memory":
        if "int4" in precision:
            return f"{near} of reading 4-bit weights: nothing left to gain but by a smaller model: stop"
        return f"{near} of reading {precision} weights: quantize to fewer bits"
    if stage == "decode":
        return f"{near} of arithmetic: nothing left to gain but by a smaller model: stop"
    if stage == "prefill":
        return f"{near} of arithmetic: shorten the prompt, or shrink the image, which makes it fewer tokens"
    quantize = "" if precision.startswith("int") else ", or quantize to int8"
    return f"{near} of arithmetic: shrink the image or send fewer tiles{quantize}"
