"""Qianfan-OCR: InternVL's tower, connector and images, a Qwen3 decoder.

In a rendered text `<image>` stands for an image, which becomes all its tiles' features between two words.
"""

from dataclasses import replace
from typing import Any, Literal

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.processing import (
    processor_class,
    read_image_processor,
    read_processor,
    read_tokenizer,
)
from mllm_edge.export.checkpoint.processor import require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.internvl import TOWER, internvl_components, internvl_features, internvl_transforms
from mllm_edge.export.families.internvl_chat import IMAGE_TOKENS, chatml, cut_vision_qkv
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.spec import ImagePrompt, ImageSpec

__all__ = ["FAMILY"]

_PLACEHOLDER, _FUSED = "<image>", "attn.qkv"
_STACK: Literal["layers"] = "layers"


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.internvit import InternVitConfig

    vision, weights = checkpoint.config.vision_config, checkpoint.weights
    checkpoint.vision.take("drop_path_rate")  # only for training
    tower = InternVitConfig.read(checkpoint.vision, checkpoint.top)
    # Behind the last layer the norm comes whichever way that is chosen.
    last = tower.layers == vision.num_hidden_layers and not vision.use_mean_pooling
    tower = replace(tower, stack="layers", final_norm=last)
    if f"{TOWER}{_STACK}.0.{_FUSED}.weight" in weights:
        cut_vision_qkv(weights, vision, _STACK, _FUSED)
    traced, ignored, tokens = internvl_components(checkpoint, tower)
    image = _image_spec(checkpoint, tower.tile, tokens)
    processor = checkpoint.processor
    return Parts(traced, image, ignored, (processor.start_image_token, processor.end_image_token))


def _load_processor(source: Source) -> Any:
    from transformers import QianfanOCRProcessor

    processor_class(source, "QianfanOCRProcessor", ("QianfanOCRProcessor",))
    images, tokenizer = read_image_processor(source, ("GotOcr2ImageProcessor",)), read_tokenizer(source)
    if not hasattr(tokenizer, "context_image_token"):
        names = (f"{place}_image_token" for place in ("start", "context", "end"))
        tokenizer = read_tokenizer(source, extra_special_tokens=dict(zip(names, IMAGE_TOKENS, strict=True)))
    processor = read_processor(source, QianfanOCRProcessor, images, tokenizer)
    processor.chat_template = chat_template(source, chatml("", "\n", _PLACEHOLDER), tokenizer)
    return processor


def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    start, end, written = processor.start_image_token, processor.end_image_token, processor.image_placeholder_token
    stated = processor.image_seq_length
    require_tokens(source, f"image_seq_length = {stated} (256 if it is not given)", stated, tokens)
    if not written:
        raise ConfigError(
            f"{source.folder / 'processor_config.json'}: image_placeholder_token is empty", f"such as {_PLACEHOLDER}"
        )
    prompt = ImagePrompt(
        processor.image_token,
        checkpoint.token_id,
        single=f"{start}{{image}}{end}",
        begin=start,
        tile="{image}",
        overview=f"{{image}}{end}",
        placeholder=written,
    )
    return ImageSpec(internvl_transforms(source, processor.image_processor, tile, True), prompt, tile, tile, tokens)


FAMILY = Family(
    name="qianfan_ocr",
    model_types=("qianfan_ocr",),
    decoders=("qwen3",),
    examples=("baidu/Qianfan-OCR",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=internvl_features,
)
