"""What recipes cost on really trained weights: SmolLM2-135M in SmolVLM's architecture, or Gemma 3 270M in LLaVA's,
against its float bundle.

python -m benchmarks.real_weights [--model smollm2|gemma3] [--only RECIPE …] [--quick] [--json F] [--cache DIR]

The reference is the model with other columns and a little noise (see real_weights_source.py): its own greedy answers
are the tokens on which every recipe's distribution is compared with it, and so is llama.cpp's (real_weights_llama.py).
Needs the package gguf.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import real_weights_llama as llama
from benchmarks.real_weights_checkpoint import write_smolvlm
from benchmarks.real_weights_gemma import write_llava
from benchmarks.real_weights_source import Source, gemma3, rescaled, smollm2
from benchmarks.real_weights_texts import calibration_prompts, held_out_prompts
from benchmarks.report import Report
from mllm_edge.bundle import MANIFEST, Bundle
from mllm_edge.calibration.evaluate import divergence
from mllm_edge.calibration.recipes import CALIBRATED, Recipe
from mllm_edge.export.pipeline import export
from mllm_edge.export.quantize import quantize
from mllm_edge.graph.precision import BLOCKS_4, BLOCKS_8, CALIBRATED_4, FLOAT16, FLOAT32, Precision
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.vlm import VLM

__all__ = [
    "MODELS",
    "RECIPES",
    "Question",
    "answered",
    "compared",
    "held_out",
    "main",
    "recipe_rows",
    "reference",
    "scored",
]

_TOKENS = 110  # of each answer
Make = Callable[[Path, Path, Path], None]  # (checkpoint, float bundle, where the quantized one goes)
Question = tuple[str, np.ndarray]  # and the ids of its answer
Score = Callable[[Prompt, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Model:
    """Where a model comes from (`source` of the cache), how it becomes a checkpoint, its folder in the cache."""

    source: Callable[[Path], Source]
    write: Callable[[Source, dict[str, np.ndarray], Path], None]
    folder: str


MODELS: Mapping[str, Model] = {
    "smollm2": Model(smollm2, write_smolvlm, "real_weights"),
    "gemma3": Model(gemma3, write_llava, "real_weights_gemma3"),
}


def _exported(name: str, checkpoint: Path, float_bundle: Path, out: Path) -> None:
    export(str(checkpoint), out, recipe_name=name, targets=("cpu",), allow_loss=True)


def _calibrated(
    recipe: Recipe,
    samples: int,
    checkpoint: Path,
    float_bundle: Path,
    out: Path,
    builtin: bool = False,
    most_bits: float | None = None,
) -> None:
    """`samples` questions for calibration, none: the built-in text alone; four more prove the result within `quantize`,
    as it demands. `builtin`: with the built-in text beside them."""
    data = [{"prompt": prompt} for prompt in calibration_prompts(samples + 4)] if samples else None
    builtin = builtin or not samples
    quantize(
        float_bundle, out, recipe=recipe, data=data, held_back=4, builtin=builtin, most_bits=most_bits, allow_loss=True
    )


def _decoder(precision: Precision, more_bits: bool = False) -> Recipe:
    """The tower is random: only the decoder is quantized. `more_bits`: where the recipe wants them."""
    recipe = replace(CALIBRATED["int4"], vision=FLOAT16, connector=FLOAT16, decoder=precision)
    return recipe if more_bits else replace(recipe, more_bits_above=None)


_Q4_0 = 5.31  # in a file of no more than 5.35, as each array begins on a page and norms stay float
INT4 = _decoder(CALIBRATED_4, more_bits=True)
RECIPES: Mapping[str, Make] = {
    "int4": partial(_exported, "int4"),
    "int8": partial(_exported, "int8"),
    "4 bits, rounded": partial(_calibrated, _decoder(BLOCKS_4), 4),
    **{f"4 bits, {n} samples": partial(_calibrated, _decoder(CALIBRATED_4), n) for n in (4, 16, 48, 128)},
    "4 bits, built-in text": partial(_calibrated, _decoder(CALIBRATED_4), 0),
    **{f"int4, {n} samples": partial(_calibrated, INT4, n, builtin=True) for n in (16, 128)},
    "int4, 16 samples alone": partial(_calibrated, INT4, 16),
    "int4, 128 samples, 5.35 bits": partial(_calibrated, INT4, 128, builtin=True, most_bits=_Q4_0),
    "int4, built-in text": partial(_calibrated, INT4, 0),
    "int4, built-in text, 5.35 bits": partial(_calibrated, INT4, 0, most_bits=_Q4_0),
    "awq, 48 samples": partial(_calibrated, _decoder(replace(BLOCKS_4, method="awq")), 48),
    "gptq, 48 samples": partial(_calibrated, _decoder(replace(BLOCKS_4, method="gptq")), 48),
    "8-bit blocks": partial(_calibrated, _decoder(replace(BLOCKS_8, largest_block=64)), 4),
    **{f"int8 W8A8, {n} samples": partial(_calibrated, _decoder(CALIBRATED["int8"].decoder), n) for n in (48, 128)},
    "int8 cache": partial(_calibrated, replace(_decoder(FLOAT32), head=FLOAT32, kv="int8"), 48),
}


def main() -> None:
    names = [*RECIPES, *llama.TYPES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "mllm-edge")
    options = parser.parse_args()
    model = MODELS[options.model]
    checkpoint, float_bundle = reference(model, options.cache)
    questions = held_out(float_bundle, options.quick)
    report = Report(f"Recipes on trained weights: {options.model}")
    for name in options.only:
        begin = time.perf_counter()
        try:
            if name in RECIPES:
                (row,) = recipe_rows(RECIPES[name], checkpoint, float_bundle, [questions])
            else:
                row = _llama_row(name, model, options.cache, float_bundle, questions)
        except llama.Unavailable as e:
            print(f"{name}: left out, for llama.cpp cannot be had here ({e})", flush=True)
            continue
        report.row({"recipe": name, **row, "seconds": round(time.perf_counter() - begin)})
        print(report.rows[-1], flush=True)
        if options.json:
            report.write(options.json)
    report.print()


def reference(model: Model, cache: Path) -> tuple[Path, Path]:
    """The checkpoint, made where it is not in the cache, and its float bundle, as this version exports it."""
    folder = cache / model.folder
    checkpoint, float_bundle = folder / "checkpoint", folder / "float"
    if not (float_bundle / MANIFEST).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        source = model.source(cache)
        model.write(source, rescaled(source), checkpoint)
    export(str(checkpoint), float_bundle, recipe_name="fp32", targets=("cpu",), verify_mode="off", force=True)
    return checkpoint, float_bundle


def held_out(float_bundle: Path, quick: bool) -> list[Question]:
    """The questions on which recipes are compared."""
    path = float_bundle.with_name("quick.json" if quick else "answers.json")
    return answered(float_bundle, held_out_prompts(quick), _TOKENS // (2 if quick else 1), path)


def answered(float_bundle: Path, prompts: Iterable[str], tokens: int, kept: Path) -> list[Question]:
    """`prompts` and the float bundle's greedy answers of up to `tokens`; the file `kept` holds those that are known."""
    answers = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    prompts = list(prompts)
    missing = [prompt for prompt in prompts if prompt not in answers]
    if missing:
        with VLM.load(float_bundle) as vlm:
            for prompt in missing:
                encoded = vlm.encode(vlm.processor.process(prompt))
                answers[prompt] = vlm.greedy([encoded], tokens)[0].tolist()
        kept.write_text(json.dumps(answers), encoding="utf-8")
    return [(prompt, np.array(answers[prompt], np.int64)) for prompt in prompts]


def recipe_rows(
    make: Make, checkpoint: Path, float_bundle: Path, groups: Iterable[list[Question]]
) -> Iterator[dict[str, float]]:
    """Of each group of questions: bits of the decoder's weights (norms and head included) for each parameter, and how
    far from float."""
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder:
        out = Path(folder) / "out"
        make(checkpoint, float_bundle, out)
        bits = 32 * _weight_bytes(out) / _weight_bytes(float_bundle)
        with VLM.load(out) as vlm:
            for questions in groups:
                yield {"bits": round(bits, 2), **_compared(float_bundle, partial(scored, vlm), questions)}


def _llama_row(name: str, model: Model, cache: Path, float_bundle: Path, questions: list[Question]) -> dict[str, float]:
    """The same of llama.cpp's; its embeddings are its head, and counted once."""
    python = llama.environment(cache)
    reference = float_bundle.with_name("reference.gguf")
    if not reference.is_file():
        source = model.source(cache)
        llama.write_gguf(source, rescaled(source), np.load(float_bundle / "embed_tokens.npy"), reference)
    with llama.opened(python, reference, name) as opened:

        def logits(prompt: Prompt, answer: np.ndarray) -> np.ndarray:
            return opened.score(prompt.token_ids.tolist(), answer.tolist())

        return {"bits": round(opened.bits, 2), **_compared(float_bundle, logits, questions)}


def _compared(float_bundle: Path, other: Score, questions: list[Question]) -> dict[str, float]:
    with VLM.load(float_bundle) as vlm:
        prompts = ((vlm.processor.process(question), answer) for question, answer in questions)
        return compared((scored(vlm, prompt, answer), other(prompt, answer)) for prompt, answer in prompts)


def scored(vlm: VLM, prompt: Prompt, answer: np.ndarray) -> np.ndarray:
    """Logits [n, V] along an answer [n]."""
    return vlm.score(vlm.encode(prompt), answer)


def compared(logits: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Of the float model's logits and another's along each answer: mean KL in nats, agreement of the likeliest token in
    percent."""
    divergences, same = [], []
    for first, second in logits:
        divergences.append(divergence(first, second))
        same.append(first.argmax(axis=1) == second.argmax(axis=1))
    kl, agreement = float(np.concatenate(divergences).mean()), float(np.concatenate(same).mean())
    return {"KL": round(kl, 5), "agrees %": round(100 * agreement, 1)}


def _weight_bytes(path: Path) -> int:
    bundle = Bundle.load(path)
    return bundle.manifest.files[f"{bundle.variant('decoder', 'cpu').file}.data"].nbytes


if __name__ == "__main__":
    main()
