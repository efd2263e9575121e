"""Checkpoints as people leave them: are they read as transformers reads them?

python -m benchmarks.reading [--json F] [--family NAME]

Every family × files of several ages × keys that are null, absent or contradict each other. transformers loads each
folder by itself; the exporter reads it, and what a device would make of it is compared: the prompt's text, its ids, the
pixel values, the stop ids. A folder is alike, refused by name, or different; `different` must be none.
"""

import argparse
import contextlib
import json
import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reading_folders import FAMILIES, Folder, folders, make, save_base
from benchmarks.report import Report

__all__ = ["main", "read_all"]

PROMPT = "How many <new> circles?"
LEAST_ALIKE, LEAST_FOLDERS = 0.95, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--family", choices=FAMILIES)
    options = parser.parse_args()
    results = read_all(options.family)
    rows = [_row(family, results) for family in FAMILIES if any(r["family"] == family for r in results)]
    report = Report("Checkpoints read as transformers reads them", rows)
    loaded = [r for r in results if r["verdict"] != "transformers refuses"]
    for result in results:
        if result["verdict"] in ("different", "error"):
            print(f"{result['family']}: {result['folder']}: {result['verdict']}: {result['why']}")
    if options.family is None:
        report.at_least("folders", len(results), LEAST_FOLDERS)
    report.at_least("alike, of those that transformers loads", _share(loaded, "alike"), LEAST_ALIKE)
    report.at_most(
        "different or failing without a name", sum(r["verdict"] in ("different", "error") for r in results), 0
    )
    report.print()
    if options.json:
        report.write(options.json)
        options.json.with_suffix(".folders.json").write_text(json.dumps(results, indent=1))


def read_all(only: str | None = None) -> list[dict[str, str]]:
    """The verdict on each folder."""
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as name, _quiet():
        root, results = Path(name), []
        for family in FAMILIES:
            if only in (None, family):
                save_base(family, root / family)
        for i, folder in enumerate(folders()):
            if only in (None, folder.family):
                results.append(_read(folder, root / folder.family, root / str(i)))
        return results


def _read(folder: Folder, base: Path, place: Path) -> dict[str, str]:
    from mllm_edge.errors import MllmEdgeError

    make(base, place, folder.change)
    found = {"family": folder.family, "folder": folder.name, "why": ""}
    try:
        expected = _by_transformers(place, folder.family)
    except Exception as e:  # whatever it raises: this folder has no reference
        expected, found["why"] = None, f"{type(e).__name__}: {e}".splitlines()[0]
    try:
        ours = _by_us(place)
    except MllmEdgeError as e:
        return {**found, "verdict": "refused" if expected else "transformers refuses", "why": e.message}
    except Exception as e:
        return {**found, "verdict": "error", "why": f"{type(e).__name__}: {e}".splitlines()[0]}
    if expected is None:
        return {**found, "verdict": "transformers refuses"}
    different = [name for name in expected if not _alike(name, expected[name], ours[name])]
    return {**found, "verdict": "different" if different else "alike", "why": ", ".join(different)}


# ---------------------------------------------------------------- two readers
def _by_transformers(folder: Path, family: str) -> dict[str, Any]:
    """By from_pretrained alone; only the part for video, which needs torchvision, is left out."""
    import torch
    import transformers
    from transformers.models.smolvlm import processing_smolvlm

    from mllm_edge.export.checkpoint.processing import for_images

    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    names = {
        "idefics3": "Idefics3Processor",
        "smolvlm": "SmolVLMProcessor",
        "llava": "LlavaProcessor",
        "qwen2_vl": "Qwen2VLProcessor",
        "internvl": "InternVLProcessor",
    }
    cls = for_images(getattr(transformers, names[family]))
    processor = _smolvlm(cls, folder) if family == "smolvlm" else cls.from_pretrained(folder)
    processor.tokenizer.backend_tokenizer.no_truncation()
    processor.tokenizer.backend_tokenizer.no_padding()
    if processor.chat_template is None and processor.tokenizer.chat_template is not None:
        processor.chat_template = processor.tokenizer.chat_template
    content = [{"type": "image", "image": _picture()}, {"type": "text", "text": PROMPT}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"truncation": False, "padding": False},
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        model(**inputs)  # a folder whose prompt and features do not fit together has no answer
    stops = model.generation_config.eos_token_id
    return {
        "text": text,
        "ids": inputs["input_ids"][0].tolist(),
        "pixels": inputs["pixel_values"].numpy().ravel(),
        "stop ids": sorted([stops] if isinstance(stops, int) else stops or []),
    }


def _smolvlm(cls: Any, folder: Path) -> Any:
    """Its __init__ demands the part for video by position."""
    from transformers import AutoImageProcessor, AutoTokenizer

    settings, _ = cls.get_processor_dict(folder)
    known = {k: settings[k] for k in ("image_seq_len", "chat_template") if k in settings}
    return cls(AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), None, **known)


def _by_us(folder: Path) -> dict[str, Any]:
    """By the exporter's reading, and the runtime's processor over the texts that it would write."""
    from tokenizers import Tokenizer as Core

    from mllm_edge.export.checkpoint.source import open_source
    from mllm_edge.export.checkpoint.vocabulary import check_generation
    from mllm_edge.export.family import open_weights, reading, understand
    from mllm_edge.json_form import from_json, to_json
    from mllm_edge.runtime.prompt.processor import Processor
    from mllm_edge.runtime.prompt.tokenizer import ChatTemplate, Tokenizer
    from mllm_edge.spec import GenerationSpec

    source = open_source(str(folder))
    with reading(source):
        plan = understand(source, open_weights(source))
        check_generation(source, plan.texts.generation, plan.model)
    generation = from_json(GenerationSpec, json.loads(json.dumps(to_json(plan.texts.generation))))
    tokenizer = Tokenizer(Core.from_str(plan.texts.tokenizer.to_str()), generation)
    template = ChatTemplate(plan.texts.chat_template, generation.special_tokens)
    prompt = Processor(plan.model, tokenizer, template).process(PROMPT, _picture())
    assert prompt.pixel_values is not None
    return {
        "text": prompt.text,
        "ids": prompt.token_ids.tolist(),
        "pixels": prompt.pixel_values.ravel(),
        "stop ids": sorted(generation.eos_token_ids),
    }


def _alike(name: str, expected: Any, ours: Any) -> bool:
    if name == "stop ids" and not expected:
        return True  # transformers would not stop; what the exporter finds beyond it is told in a notice
    if name != "pixels":
        return bool(expected == ours)
    # A grey level of 255, where values are divided by a standard deviation of 0.2 at least.
    return bool(expected.size == ours.size and np.abs(expected - ours).max() <= 1 / 255 / 0.2)


def _picture() -> Any:
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((131, 97), Image.Resampling.BICUBIC)


@contextlib.contextmanager
def _quiet() -> Any:
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


# ---------------------------------------------------------------- figures
def _row(family: str, results: list[dict[str, str]]) -> dict[str, Any]:
    counts = Counter(r["verdict"] for r in results if r["family"] == family)
    verdicts = ("alike", "refused", "different", "error", "transformers refuses")
    return {"family": family, "folders": sum(counts.values()), **{v: counts[v] for v in verdicts}}


def _share(results: list[dict[str, str]], verdict: str) -> float:
    return round(sum(r["verdict"] == verdict for r in results) / max(len(results), 1), 4)


if __name__ == "__main__":
    main()
