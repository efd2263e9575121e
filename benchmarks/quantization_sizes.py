"""Real sizes: the vision encoder in INT8, the time and memory of a calibration, layers of a large model."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llava_checkpoint import write_llava
from benchmarks.measure import in_process
from benchmarks.quantization_cost import pictures
from benchmarks.report import Report
from benchmarks.vlm_checkpoints import smolvlm_256m
from mllm_edge.bundle import Bundle
from mllm_edge.calibration.recipes import CALIBRATED, Recipe
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import quantize
from mllm_edge.graph.precision import FLOAT16, Precision
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.vlm import VLM
from mllm_edge.spec import is_state

__all__ = ["add_cost", "add_large", "add_vision"]

_ROUNDS = 15
_COST_SAMPLES, _LARGE_SAMPLES, _LARGE_TOKENS, _LARGE_LAYERS, _ALL_LAYERS = 128, 32, 512, 4, 32


def add_vision(report: Report, folder: Path, questions: int) -> None:
    """SigLIP-B/16 at 512 px: float32 and calibrated INT8 by turns, one tile."""
    source = _smolvlm(folder, "fp32")
    out = folder / "vision-int8"
    recipe = Recipe("vision", CALIBRATED["int8"].vision, CALIBRATED["int8"].connector, FLOAT16, FLOAT16)
    quantize(source, out, recipe=recipe, data=pictures(20), held_back=4, allow_loss=True)
    bundles = [Bundle.load(source), Bundle.load(out)]
    with VLM(bundles[0], OnnxRuntimeCpu()) as one, VLM(bundles[1], OnnxRuntimeCpu()) as other:
        seconds: list[list[float]] = [[], []]
        cosines = []
        for i in range(_ROUNDS):
            pixels = one.processor.process("x", pictures(1, i + 100)[0]["images"]).pixel_values
            assert pixels is not None
            outputs = []
            for vlm, times in zip((one, other), seconds, strict=True):
                begin = time.perf_counter()
                outputs.append(vlm.component("vision_encoder", {"pixel_values": pixels[:1]})["vision_hidden"].ravel())
                times.append(time.perf_counter() - begin)
            a, b = outputs
            cosines.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    medians = [1000 * statistics.median(times) for times in seconds]
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    report.row({"SigLIP-B/16, 512 px": "ms", "fp32": medians[0], "int8": medians[1], "cosine": min(cosines)})
    report.at_least("vision_int8_speed: fp32 over int8", ratio, 2.0)
    report.at_least("vision_int8_cosine: the worst image", min(cosines), 0.995)


def add_cost(report: Report, folder: Path, questions: int) -> None:
    """All of a calibration at SmolVLM-256M's sizes: recording, statistics, methods, writing, proof."""
    source = _smolvlm(folder, "fp16")
    done = in_process(_calibrate, source, folder / "cost", _COST_SAMPLES)
    minutes = done.seconds / 60
    report.row({"SmolVLM-256M": "int4", "samples": _COST_SAMPLES, "minutes": minutes, "peak GB": done.peak})
    report.at_most("calibration_cost: minutes", minutes, 10)
    report.at_most("calibration_cost: peak RSS, GB", done.peak, 3)


def add_large(report: Report, folder: Path, questions: int) -> None:
    """Four layers of LLaVA-1.5-7B's decoder: AWQ and GPTQ, piece by piece."""
    write_llava(folder / "llava", layers=_LARGE_LAYERS)
    export(str(folder / "llava"), folder / "llava-fp16", recipe_name="fp16", verify_mode="off")
    for method in ("awq", "gptq"):
        done = in_process(_calibrate_layers, folder / "llava-fp16", folder / method, method)
        hours = done.seconds * _ALL_LAYERS / _LARGE_LAYERS / 3600
        report.row({"7B layers": method, "seconds": done.seconds, "peak GB": done.peak, "hours for 32": hours})
        report.at_most(f"large_model: {method}, peak RSS, GB", done.peak, 8)


def _smolvlm(folder: Path, recipe: str) -> Path:
    out = folder / f"smolvlm-{recipe}"
    if not out.exists():
        smolvlm_256m(folder / "smolvlm", longest_edge=512)
        export(str(folder / "smolvlm"), out, recipe_name=recipe, verify_mode="off")
    return out


def _calibrate(source: Path, out: Path, samples: int) -> None:
    quantize(source, out, recipe="int4", data=pictures(samples + 8), held_back=8, allow_loss=True)


def _calibrate_layers(source: Path, folder: Path, method: Any) -> None:
    """The decoder alone, on random embeddings."""
    from functools import partial

    from mllm_edge.calibration.calibrate import calibrate
    from mllm_edge.calibration.collect import Feeds
    from mllm_edge.calibration.recipes import precision_of

    bundle = Bundle.load(source)
    variant = bundle.variant("decoder", "cpu")
    feeds, model = Feeds(folder / "feeds"), bundle.manifest.model
    ((heads, head_dim),) = (spec.shape for spec in model.state)
    half = head_dim // 2
    for i in range(_LARGE_SAMPLES):
        random = np.random.default_rng(i)
        angles = np.outer(np.arange(_LARGE_TOKENS), 1e4 ** -(np.arange(half) / half)).astype(np.float32)
        cache = np.zeros((1, heads, _LARGE_TOKENS, head_dim), np.float32)
        feeds.add(
            {
                "inputs_embeds": random.standard_normal((1, _LARGE_TOKENS, model.hidden_size), np.float32) * 0.02,
                "logits_indices": np.array([[_LARGE_TOKENS - 1]]),
                "seqlens_k": np.array([_LARGE_TOKENS - 1], np.int32),
                "total_sequence_length": np.array([_LARGE_TOKENS], np.int32),
                "cos": np.cos(angles),
                "sin": np.sin(angles),
                **{t.name: cache for t in variant.inputs if is_state(t.name)},
            }
        )
    part = Precision("blocks", 4, method=method)
    recipe = Recipe("large", FLOAT16, FLOAT16, part, FLOAT16)
    precision = partial(precision_of, recipe, "decoder")
    calibrate(bundle.listed(variant.file), variant, OnnxRuntimeCpu(), feeds, precision, folder / "work")
