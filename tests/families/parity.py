"""The whole path, for every target, against transformers in float32: processor, features, logits, greedy text.

Tolerances: vision features ‖a−b‖/‖b‖ ≤ 1e-4; logits max|a−b| ≤ 1e-3 of the reference's range; pixels within one grey
level of 255 and 0.05 on average; token ids and greedy tokens equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.export.families import family_for
from mllm_edge.export.pipeline import export
from mllm_edge.export.source import open_source
from mllm_edge.export.targets import TARGETS
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu

__all__ = ["PROMPTS", "Exported", "check_parity", "export_tiny", "make_image"]

FEATURES, LOGITS, GREEDY = 1e-4, 1e-3, 32


def make_image(height: int, width: int, seed: int) -> Image.Image:
    """A smooth random RGB picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Exported:
    """A checkpoint, its model and its float32 bundle for all targets."""

    checkpoint: Path
    bundle: Path
    model: Any = field(repr=False)


def export_tiny(folder: Path, save: Callable[..., Any], **config: Any) -> Exported:
    """Save a tiny checkpoint with `save` under `folder` and export it."""
    model = save(folder / "checkpoint", **config)
    export(str(folder / "checkpoint"), folder / "bundle", targets=tuple(TARGETS), recipe_name="fp32", verify_mode="off")
    return Exported(folder / "checkpoint", folder / "bundle", model)


# Prompt and image sizes (height, width), by the name of the case.
PROMPTS: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "text": ("Hello.", []),
    "square": ("What is in the picture, and where does it stand? Answer in a word or two.", [(64, 64)]),
    "wide": ("Describe.", [(53, 211)]),
    "two_images": ("Which of the pictures is brighter?", [(97, 41), (30, 88)]),
}


def check_parity(exported: Exported, case: str) -> None:
    """Compare one of PROMPTS, from messages to text."""
    prompt, sizes = PROMPTS[case]
    images = [make_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    source, model = open_source(str(exported.checkpoint)), exported.model
    family = family_for(source)
    processor = family.load_processor(source)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=rendered, images=list(images) or None, return_tensors="pt")
    with torch.no_grad():
        features = family.image_features(model, inputs) if images else None
        steps = _reference_steps(model, inputs)
    for target in TARGETS:
        with VLM(Bundle.load(exported.bundle), OnnxRuntimeCpu(target=target)) as vlm:
            ours = vlm.processor.process(prompt, images)
            assert ours.token_ids.tolist() == inputs["input_ids"][0].tolist()
            if features is not None:
                _check_vision(vlm, features, ours.pixel_values, inputs)
            _check_steps(vlm, ours, *steps)
            _check_text(vlm, processor.tokenizer, vlm.generate(prompt, images, max_new_tokens=GREEDY), steps[0])


def _check_text(vlm: VLM, tokenizer: Any, result: Any, tokens: list[int]) -> None:
    """The answer is the reference's greedy `tokens`, up to a stop token."""
    stop = [i for i, token in enumerate(tokens) if token in vlm.stop_ids]
    expected = tokens[: stop[0]] if stop else tokens
    assert list(result.token_ids) == expected
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert result.finish_reason == ("stop" if stop else "length")


def _check_vision(vlm: VLM, reference: tuple[Any, Any], pixel_values: np.ndarray, inputs: Any) -> None:
    std = next(t.std for t in vlm.spec.image.transforms if t.op == "normalize")
    difference = np.abs(pixel_values - inputs["pixel_values"].flatten(0, -4).numpy()) * 255 * max(std)
    assert difference.max() <= 1.0
    assert difference.mean() <= 0.05
    hidden = vlm.component("vision_encoder", {"pixel_values": pixel_values})["vision_hidden"]
    assert _relative(hidden, reference[0].numpy()) <= FEATURES
    assert _relative(vlm.image_features(pixel_values), reference[1].numpy()) <= FEATURES


def _reference_steps(model: Any, inputs: Any) -> tuple[list[int], np.ndarray]:
    out = model(**inputs, use_cache=True)
    tokens, rows = [], []
    for _ in range(GREEDY):
        rows.append(out.logits[0, -1].numpy())
        tokens.append(int(rows[-1].argmax()))
        out = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return tokens, np.stack(rows)


def _check_steps(vlm: VLM, prompt: Any, tokens: Sequence[int], reference: np.ndarray) -> None:
    for step, (a, b) in enumerate(zip(_our_steps(vlm, prompt, tokens), reference, strict=True)):
        assert np.abs(a - b).max() <= LOGITS * np.ptp(b), f"{vlm.backend.target}, step {step}"


def _our_steps(vlm: VLM, prompt: Any, tokens: Sequence[int]) -> np.ndarray:
    embeds = vlm.prompt_embeds(prompt)
    vlm.decoder.reset(len(embeds) + len(tokens))
    rows = [vlm.decoder.forward(embeds).copy()]
    rows += [vlm.decoder.forward(vlm.embed(np.array([token]))).copy() for token in tokens[:-1]]
    return np.stack(rows)


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
