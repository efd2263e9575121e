"""The whole path against transformers in float32: processor, vision features, every step's logits, greedy text.

Tolerances: vision features ‖a−b‖/‖b‖ ≤ 1e-4; logits max|a−b| ≤ 1e-3 of the reference's range; pixels within one grey
level of 255 and 0.05 on average; token ids and greedy tokens equal.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllm_edge import VLM
from mllm_edge.export.reference import load_processor

__all__ = ["check_parity", "make_image"]

FEATURES, LOGITS, GREEDY = 1e-4, 1e-3, 32


def make_image(height: int, width: int, seed: int) -> Image.Image:
    """A smooth random RGB picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def check_parity(bundle: Path, checkpoint: Path, model: Any, prompt: str, images: Sequence[Image.Image]) -> None:
    """Compare one prompt with its images, from messages to text."""
    processor = load_processor(checkpoint)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=rendered, images=list(images) or None, return_tensors="pt")
    with VLM.load(bundle) as vlm, torch.no_grad():
        ours = vlm.processor.process(prompt, images)
        assert ours.token_ids.tolist() == inputs["input_ids"][0].tolist()
        if images:
            _check_vision(vlm, model, ours.pixel_values, inputs)
        tokens, logits = _reference_steps(model, inputs)
        _check_logits(_our_steps(vlm, ours, tokens), logits)
        result = vlm.generate(prompt, images, max_new_tokens=GREEDY)
        stop = [i for i, token in enumerate(tokens) if token in vlm.stop_ids]
        expected = tokens[: stop[0]] if stop else tokens
        assert list(result.token_ids) == expected
        assert result.text == processor.tokenizer.decode(expected, skip_special_tokens=True)
        assert result.finish_reason == ("stop" if stop else "length")


def _check_vision(vlm: VLM, model: Any, pixel_values: np.ndarray, inputs: Any) -> None:
    difference = np.abs(pixel_values - inputs["pixel_values"][0].numpy()) * 127.5  # the std is 0.5
    assert difference.max() <= 1.0
    assert difference.mean() <= 0.05
    reference = model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"], return_dict=True)
    hidden = vlm.component("vision_encoder", {"pixel_values": pixel_values})["vision_hidden"]
    assert _relative(hidden, reference.last_hidden_state.numpy()) <= FEATURES
    features = vlm.image_features(pixel_values)
    assert _relative(features, torch.cat(list(reference.pooler_output)).numpy()) <= FEATURES


def _reference_steps(model: Any, inputs: Any) -> tuple[list[int], np.ndarray]:
    out = model(**inputs, use_cache=True)
    tokens, rows = [], []
    for _ in range(GREEDY):
        rows.append(out.logits[0, -1].numpy())
        tokens.append(int(rows[-1].argmax()))
        out = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return tokens, np.stack(rows)


def _our_steps(vlm: VLM, prompt: Any, tokens: Sequence[int]) -> np.ndarray:
    embeds = vlm.prompt_embeds(prompt)
    vlm.decoder.reset(len(embeds) + len(tokens))
    rows = [vlm.decoder.forward(embeds).copy()]
    rows += [vlm.decoder.forward(vlm.embed(np.array([token]))).copy() for token in tokens[:-1]]
    return np.stack(rows)


def _check_logits(ours: np.ndarray, reference: np.ndarray) -> None:
    for step, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert np.abs(a - b).max() <= LOGITS * np.ptp(b), f"step {step}"


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
