"""GOT-OCR 2: Segment Anything's encoder over one square tile, two convolutions, Qwen2.

Several images are the pages of one document, and stand one behind the other.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.export.checkpoint.image_settings import made_size, single_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_tile
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import Texts, read_texts
from mllm_edge.export.checkpoint.vocabulary import vocabulary
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent
from mllm_edge.spec import PIXELS, ImagePrompt, ImageSpec, Stage, TensorSpec

__all__ = ["FAMILY"]

_VISION, _END = "model.vision_tower.", "<|im_end|>"
# The form that the processor gives a prompt of an image alone, whose question is " OCR: ".
_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou should follow the instructions carefully and "
    "explain your answers in detail.<|im_end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% set pages = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{{ '<img>' + '<imgpad>' * (pages | length) + '</img>\n' if pages else '' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.got_ocr2 import Projector, halved
    from mllm_edge.export.vision.sam import SamConfig, SamTower, sam_derived

    tower, text_hidden = SamConfig.read(checkpoint.vision), checkpoint.decoder.hidden_size
    checkpoint.vision.take("attention_dropout")
    checkpoint.top.take("image_seq_length")  # nothing looks at it
    tokens = halved(tower.patches) ** 2
    seen = TensorSpec("vision_hidden", "float32", (1, tower.outputs, tower.patches, tower.patches))
    traced = (
        TracedComponent(
            Stage("vision_encoder", "vision", "image"),
            lambda: SamTower(tower),
            (TensorSpec(PIXELS, "float32", (1, tower.channels, tower.tile, tower.tile)),),
            (seen,),
            _VISION,
            sam_derived(tower, checkpoint.weights, _VISION),
        ),
        TracedComponent(
            Stage("connector", "connector", "image"),
            lambda: Projector(tower.outputs, text_hidden),
            (seen,),
            (TensorSpec("image_features", "float32", (1, tokens, text_hidden)),),
            "model.multi_modal_projector.",
        ),
    )
    return Parts(traced, _image_spec(checkpoint, tower.tile, tokens), markers=("<img>", "</img>"))


def _load_processor(source: Source) -> Any:
    from transformers import GotOcr2Processor

    class Complete(GotOcr2Processor):
        """Takes text alone, too, and makes as many tokens of an image as the model does."""

        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            if images is None:
                return self.tokenizer(text, **options)
            pages = [page for group in images for page in (group if isinstance(group, list) else [group])]
            return super().__call__(images=pages, text=text, **options)

    processor = load_processor(source, "GotOcr2Processor", ("GotOcr2ImageProcessor",), _TEMPLATE, cls=Complete)
    vision = source.config.get("vision_config") or {}
    patches = vision.get("image_size", 1024) // vision.get("patch_size", 16)
    processor.num_image_tokens = (-(-patches // 4)) ** 2
    return processor


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs[PIXELS], return_dict=True)
    return found.last_hidden_state, found.pooler_output.flatten(0, 1)


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    processor = checkpoint.processor
    # transformers' processor never cuts unless a call asks for it, whatever crop_to_patches says.
    transforms = single_transforms(checkpoint.source, processor.image_processor)
    require_tile(checkpoint.source, made_size(transforms), tile)
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, "{image}")
    return ImageSpec(transforms, prompt, tile, tile, tokens)


def _texts(checkpoint: Checkpoint) -> Texts:
    """With the token that ends a turn, which callers of transformers name each time."""
    texts = read_texts(checkpoint.source, checkpoint.processor, checkpoint.config.text_config.to_dict())
    end, generation = vocabulary(checkpoint.source).get(_END), texts.generation
    if end is None or end in generation.eos_token_ids:
        return texts
    return replace(texts, generation=replace(generation, eos_token_ids=(*generation.eos_token_ids, end)))


FAMILY = Family(
    name="got_ocr2",
    model_types=("got_ocr2",),
    decoders=("qwen2",),
    examples=("stepfun-ai/GOT-OCR-2.0-hf",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    image_token="image_token_index",
    texts=_texts,
)
