"""The source model that a bundle is compared with, as transformers loads it from the checkpoint's folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.compare.cases import synthetic_cases
from mllm_edge.compare.outputs import Outputs, named_outputs
from mllm_edge.export.answers import References
from mllm_edge.export.checkpoint.quiet import quiet_transformers
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import family_for
from mllm_edge.export.reference import adapted, before, behind, forget_prompts
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.encode import FEATURES
from mllm_edge.spec import ENCODED

__all__ = ["Reference", "Scope", "source_outputs"]

_STEPS = 16
_SEED = 0


@dataclass(frozen=True)
class Scope:
    """How much of the decoder is compared: all of it (None) or its first layers with the head."""

    decoder_layers: int | None


class Reference:
    """The source model in float32 and its processor, as transformers loads them from the folder."""

    def __init__(self, source: Source, scope: Scope):
        import torch

        self.scope, self.cases = scope, tuple(synthetic_cases(True))
        self.references: References | None = None  # what it answers to the built-in questions, see `judge.py`
        self.encoded: dict[tuple[Any, ...], Encoded] = {}  # see `loss.encoded_once`
        self._runs: dict[tuple[Any, ...], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        torch.manual_seed(_SEED)
        self.torch, self.family = torch, family_for(source)
        with quiet_transformers():
            self.processor = self.family.load_processor(source)
            model, notes = adapted(self.family.load_model(source, scope.decoder_layers).eval(), source)
        self.model, self.notes = model, list(notes)
        if source.model_type in self.family.own_layouts:
            self._note("transformers has no class for this checkpoint: its reading is our own on both sides")
        if self.family.note:
            self._note(self.family.note)

    def run(self, prompt: str, images: tuple[Any, ...], rendered: str) -> dict[str, Any]:
        """The prompt's text, the inputs, vision outputs, greedy tokens and the logits they came from. `rendered`: our
        own text of the prompt, for templates that transformers cannot render with images. What was run once is kept."""
        key = (prompt, rendered, *map(id, images))
        if key not in self._runs:
            self._runs[key] = images, self._run(prompt, images, rendered)  # while they are kept, their ids are theirs
        return self._runs[key][1]

    def _run(self, prompt: str, images: tuple[Any, ...], rendered: str) -> dict[str, Any]:
        torch = self.torch
        text, inputs = self._inputs(prompt, [_opened(image) for image in images], rendered)
        forget_prompts(self.model)
        found: dict[str, Any] = {"text": text, "input_ids": inputs["input_ids"][0].numpy()}
        with torch.no_grad():
            if images:
                found["pixel_values"] = self.family.pixel_values(self.model, inputs).numpy()
                hidden, features = self.family.image_features(self.model, inputs)
                found["vision_hidden"] = hidden.numpy()
                found["image_features"] = found[ENCODED] = features.numpy()
            found.update(self._greedy(inputs))  # of an encoder-decoder what its cross-attention looks at, too
        return found

    def video(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        """What the stages for videos make of frames [frames, …], by the names of their outputs; nothing where videos
        have no stages of their own."""
        if self.family.video_features is None:
            return {}
        with self.torch.no_grad():
            hidden, features = self.family.video_features(self.model, self.torch.from_numpy(pixel_values))
        return {"vision_hidden": hidden.numpy(), FEATURES: features.numpy()}

    def _inputs(self, prompt: str, images: list[Any], rendered: str) -> tuple[str, Any]:
        """The rendered prompt and the model's inputs, by transformers' apply_chat_template alone where it can."""
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
        text = self._render(content, prompt, len(images))
        if text is not None:
            messages = [{"role": "user", "content": content if images or self._lists(prompt) else prompt}]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            with quiet_transformers():
                return text, self.processor.apply_chat_template(messages, **options)
        self._note("transformers cannot render this chat template with images: the prompt's text is our own")
        bos = self.processor.tokenizer.bos_token
        special = {"add_special_tokens": False} if bos and rendered.startswith(bos) else {}
        return rendered, self.processor(text=rendered, images=images or None, return_tensors="pt", **special)

    def _render(self, content: list[Any], prompt: str, images: int) -> str | None:
        """transformers' text of a question, None where its template has no place for images."""
        if images or self._lists(prompt):
            text = self._apply(content)
            return text if text is not None and text.count(self.processor.image_token) == images else None
        return self._apply(prompt)

    def _lists(self, prompt: str) -> bool:
        """Whether the template renders a list of entries, and not the list's own spelling."""
        text = self._apply([{"type": "text", "text": prompt}])
        return text is not None and prompt in text and "'type'" not in text

    def _apply(self, content: Any) -> str | None:
        try:
            with quiet_transformers():
                text = self.processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
        except Exception:  # a template can fail like any program
            return None
        return str(text)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _greedy(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        out = self.model(**inputs, **before(self.model), use_cache=True, logits_to_keep=1)
        read = getattr(out, "encoder_last_hidden_state", None)
        logits, tokens = list[np.ndarray](), list[int]()
        for _ in range(_STEPS):
            logits.append(out.logits[0, -1].numpy())
            tokens.append(int(out.logits[0, -1].argmax()))
            token = self.torch.tensor([[tokens[-1]]])
            out = self.model(**behind(self.model, inputs, out, token))
        found = {"logits": np.stack(logits), "tokens": np.array(tokens)}
        return found if read is None else {ENCODED: read.numpy(), **found}


def _opened(image: Any) -> Any:
    """A picture as transformers takes it: upright; its processors put transparent ones on white themselves. Of 16-bit
    samples Pillow would keep the lowest 255 levels and call the rest white: they come scaled, as the runtime does."""
    from PIL import Image, ImageOps

    from mllm_edge.runtime.prompt.image import load_image

    opened = image if isinstance(image, Image.Image) else ImageOps.exif_transpose(Image.open(image))
    return load_image(image) if opened.mode.startswith(("I", "F")) else opened


def source_outputs(bundle: Bundle, result: Mapping[str, Any]) -> Outputs:
    """What `Reference.run` gave, named as the components of `bundle`."""
    tensors = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
    return Outputs(result["input_ids"], result["logits"], result["tokens"], named_outputs(bundle, tensors))
