"""The whole path, for every target, against transformers in float32: processor, features, logits, greedy text.

Tolerances: vision features ‖a−b‖/‖b‖ ≤ 1e-4; logits max|a−b| ≤ 1e-3 of the reference's range; pixels within one grey
level of 255 and 0.05 on average; token ids and greedy tokens equal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllm_edge import VLM
from mllm_edge.bundle import Bundle
from mllm_edge.compare.metrics import logits_errors
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.family import family_for
from mllm_edge.export.pipeline import export
from mllm_edge.export.reference import before, behind, forget_prompts
from mllm_edge.export.targets import TARGETS
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.prompt.processor import Prompt

__all__ = [
    "FLOAT32_TARGETS",
    "PROMPTS",
    "Exported",
    "check_comparison",
    "check_messages",
    "check_parity",
    "export_tiny",
    "make_image",
]

FEATURES, LOGITS, GREEDY = 1e-4, 1e-3, 32
# Those that the recipe fp32 has a form for: attention of ONNX Runtime's CUDA provider has none.
FLOAT32_TARGETS = tuple(target for target in TARGETS if target != "cuda")


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
    _opened: dict[str, VLM] = field(default_factory=dict, repr=False)

    @cached_property
    def processor(self) -> Any:
        """transformers' own."""
        source = open_source(str(self.checkpoint))
        return family_for(source).load_processor(source)

    def vlm(self, target: str) -> VLM:
        """The bundle opened for a target, once."""
        if target not in self._opened:
            self._opened[target] = VLM(Bundle.load(self.bundle), OnnxRuntimeCpu(target=target))
        return self._opened[target]

    def __enter__(self) -> "Exported":
        return self

    def __exit__(self, *_: object) -> None:
        for vlm in self._opened.values():
            vlm.close()


def export_tiny(folder: Path, save: Callable[..., Any], **config: Any) -> Exported:
    """Save a tiny checkpoint with `save` under `folder` and export it."""
    model = save(folder / "checkpoint", **config)
    export(
        str(folder / "checkpoint"), folder / "bundle", targets=FLOAT32_TARGETS, recipe_name="fp32", verify_mode="off"
    )
    return Exported(folder / "checkpoint", folder / "bundle", model)


# Prompt and image sizes (height, width), by the name of the case.
PROMPTS: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "text": ("Hello.", []),
    "square": ("What is in the picture, and where does it stand? Answer in a word or two.", [(64, 64)]),
    "wide": ("Describe.", [(53, 211)]),
    "two_images": ("Which of the pictures is brighter?", [(97, 41), (30, 88)]),
}


def check_parity(
    exported: Exported, case: str, prompts: Mapping[str, tuple[str, list[tuple[int, int]]]] = PROMPTS
) -> None:
    """Compare one of `prompts`, from a question to text."""
    prompt, sizes = prompts[case]
    content = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": prompt}]
    check_messages(exported, [{"role": "user", "content": content}], sizes, prompt)


def check_comparison(report: Any, bundle: Bundle) -> None:
    """What an export that was compared with its source says of it: all questions, and no error above its limit."""
    image = bundle.manifest.model.image
    assert image is not None
    assert report.parity["samples"] == (2 if image.most_images == 1 else 3)  # the third question has two pictures
    assert report.parity["pixel_values"] <= 1.0
    limits = report.parity["limits"]
    assert all(error <= limits.get(name, float("inf")) for name, error in report.parity["errors"].items())


def check_messages(
    exported: Exported, messages: list[dict[str, Any]], sizes: Sequence[tuple[int, int]], prompt: str | None = None
) -> None:
    """Compare the answer to messages with images of these (height, width), from messages to text. `prompt`: what the
    runtime is asked instead of the messages, which must come to the same."""
    images = [make_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    family, model, processor = family_for(open_source(str(exported.checkpoint))), exported.model, exported.processor
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=rendered, images=[list(images)] if images else None, return_tensors="pt")
    with torch.no_grad():
        features = family.image_features(model, inputs) if images else None
        steps = _reference_steps(model, inputs)
    asked = messages if prompt is None else prompt
    for target in FLOAT32_TARGETS:
        vlm = exported.vlm(target)
        ours = vlm.processor.process(asked, images)
        assert ours.token_ids.tolist() == inputs["input_ids"][0].tolist()
        assert vlm.count_tokens(asked, sizes) == len(ours.token_ids)
        if features is not None:
            _check_vision(vlm, features, ours, family.pixel_values(model, inputs).numpy())
        _check_steps(vlm, ours, *steps)
        _check_text(vlm, processor.tokenizer, vlm.generate(asked, images, max_new_tokens=GREEDY), steps[0])


def _check_text(vlm: VLM, tokenizer: Any, result: Any, tokens: list[int]) -> None:
    """The answer is the reference's greedy `tokens`, up to a stop token."""
    stop = [i for i, token in enumerate(tokens) if token in vlm.stop_ids]
    expected = tokens[: stop[0]] if stop else tokens
    assert list(result.token_ids) == expected
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True).lstrip()
    assert result.finish_reason == ("stop" if stop else "length")


def _check_vision(vlm: VLM, reference: tuple[Any, Any], prompt: Prompt, expected: np.ndarray) -> None:
    pixel_values = prompt.pixel_values
    std = next(t.std for t in vlm.spec.image.transforms if t.op == "normalize")
    # The reference has a batch axis more, or none for cells; the order of the values is the same.
    assert expected.size == pixel_values.size
    difference = np.abs(pixel_values - expected.reshape(pixel_values.shape)) * 255 * max(std)
    assert difference.max() <= 1.0
    assert difference.mean() <= 0.05
    hidden = vlm.stage_outputs(prompt)[vlm.spec.stages[0].component].get("vision_hidden")
    assert hidden is None or _relative(hidden, reference[0].numpy()) <= FEATURES  # None: one stage makes the features
    assert _relative(vlm.image_features(prompt), reference[1].numpy()) <= FEATURES


def _reference_steps(model: Any, inputs: Any) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and the logits they came from; the model makes its positions itself."""
    forget_prompts(model)
    out = model(**inputs, **before(model), use_cache=True)
    tokens, rows = [], []
    for _ in range(GREEDY):
        rows.append(out.logits[0, -1].numpy())
        tokens.append(int(rows[-1].argmax()))
        token = torch.tensor([[tokens[-1]]])
        out = model(**behind(model, inputs, out, token))
    return tokens, np.stack(rows)


def _check_steps(vlm: VLM, prompt: Any, tokens: Sequence[int], reference: np.ndarray) -> None:
    for step, (a, b) in enumerate(zip(_our_steps(vlm, prompt, tokens), reference, strict=True)):
        assert logits_errors(b[None], a[None])[0] <= LOGITS, f"{vlm.backend.target}, step {step}"


def _our_steps(vlm: VLM, prompt: Any, tokens: Sequence[int]) -> np.ndarray:
    return vlm.steps(vlm.encode(prompt), np.array(tokens))


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
