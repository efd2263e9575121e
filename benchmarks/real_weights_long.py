"""What the cache in 8 bits, and recipes, cost behind long texts: the models and the measure of benchmarks.real_weights.

python -m benchmarks.real_weights_long [--model smollm2|gemma3] [--only RECIPE …] [--contexts N …] [--quick]
    [--json F] [--cache DIR]

The same questions stand behind the first N tokens of the same texts; the float bundle's greedy answers lead.
"""

import argparse
import inspect
import itertools
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer

from benchmarks.real_weights import MODELS, RECIPES, Question, answered, held_out, recipe_rows, reference
from benchmarks.report import Report

__all__ = ["long_prompts", "main"]

_CONTEXTS = (200, 1000, 2000, 4000)  # tokens of the text; the first shows what the question costs without much of it
_TOKENS = 64  # of each answer
_LINES = 600
_NAMES = ("Anna", "Bruno", "Carla", "David", "Elena", "Fritz", "Greta", "Hugo", "Ines", "Jonas", "Klara", "Luis")
_THINGS = ("kettle", "lamp", "tent", "guitar", "bicycle", "raincoat", "chair", "radio", "clock", "mirror", "knife")
_SENTENCES = (
    "{} wohnt seit {} Jahren in Zimmer {} und liest abends gern am Fenster.",
    "{} vive desde hace {} años en la habitación {} y por la noche escucha la radio.",
    "{} habite depuis {} ans dans la chambre {} et prépare le café pour tout le monde.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=["int8 cache", "int4"])
    parser.add_argument("--contexts", nargs="+", type=int, default=_CONTEXTS, help="tokens before the question")
    parser.add_argument("--quick", action="store_true", help="one question of each text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "mllm-edge")
    options = parser.parse_args()
    checkpoint, float_bundle = reference(MODELS[options.model], options.cache)
    groups = [_questions(float_bundle, context, options.quick) for context in options.contexts]
    report = Report(f"Recipes behind long texts: {options.model}, texts of Python {platform.python_version()}")
    for name in options.only:
        rows = recipe_rows(RECIPES[name], checkpoint, float_bundle, groups)
        for context, questions, row in zip(options.contexts, groups, rows, strict=True):
            tokens = sum(len(answer) for _, answer in questions)
            report.row({"recipe": name, "context": context, "tokens": tokens, **row})
            print(report.rows[-1], flush=True)
            if options.json:
                report.write(options.json)
    report.print()


def _questions(float_bundle: Path, context: int, quick: bool) -> list[Question]:
    tokenizer = Tokenizer.from_file(str(float_bundle / "tokenizer.json"))
    talk = "\n\n".join(f"{q}\n{tokenizer.decode(a.tolist())}" for q, a in held_out(float_bundle, quick=False))
    texts = {text: asked[: 1 if quick else None] for text, asked in _texts(talk).items()}
    prompts = long_prompts(tokenizer, texts, context)
    return answered(float_bundle, prompts, _TOKENS, float_bundle.with_name("long.json"))


def long_prompts(tokenizer: Tokenizer, texts: Mapping[str, tuple[str, ...]], context: int) -> list[str]:
    """Each text's first `context` tokens with each of its questions behind them; raises SystemExit where it has
    fewer."""
    prompts = []
    for text, questions in texts.items():
        ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
        if len(ends) < context:
            raise SystemExit(f"--contexts {context}: the text that begins with {text[:40]!r} has {len(ends)} tokens")
        prompts += [f"{text[: ends[context - 1]]}\n\n{question}" for question in questions]
    return prompts


def _texts(talk: str) -> dict[str, tuple[str, ...]]:
    """Prose and code that come with Python, data and sentences in three languages made here, and `talk` → questions."""
    return {
        topics["specialnames"]: ("Summarize the text above in three sentences.", "Which methods does it name first?"),
        inspect.getsource(argparse): ("What is this module for?", "Write a short example that uses the code above."),
        _stock(): ("Which of these things are cheap, and which are expensive?", "Return the first two again as JSON."),
        _residents(): ("Wer wohnt in diesem Haus? Antworte in drei Sätzen.", "Où habite Anna, et depuis quand ?"),
        talk: ("Which questions were answered above?", "Write one more question of this kind and its answer."),
    }


def _stock() -> str:
    random = np.random.default_rng(0)
    lines = zip(itertools.cycle(_THINGS), random.integers(1, 500, _LINES), random.integers(0, 40, _LINES), strict=False)
    return "\n".join(json.dumps({"name": name, "price": int(p), "in_stock": int(n)}) for name, p, n in lines)


def _residents() -> str:
    random = np.random.default_rng(1)
    who = zip(itertools.cycle(_NAMES), random.integers(2, 40, _LINES), random.integers(1, 300, _LINES), strict=False)
    return " ".join(sentence.format(*them) for sentence, them in zip(itertools.cycle(_SENTENCES), who, strict=False))


if __name__ == "__main__":
    main()
