"""IDEFICS, the open Flamingo: a CLIP tower, a Perceiver resampler, and layers of cross-attention in a Llama decoder.

A token looks at the last image before it. (Behind the end of a document, which no prompt of a conversation has, the
reference lets it look at none.)
"""

from collections.abc import Mapping
from typing import Any

from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.image_settings import made_size, single_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_switched_on, require_tile
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent
from mllm_edge.export.reference import load_reference
from mllm_edge.graph.ranges import TILES
from mllm_edge.spec import ENCODED, PIXELS, ImagePrompt, ImageSpec, Stage, TensorSpec

__all__ = ["FAMILY"]

_VISION, _TOKEN, _FAKE, _END = "model.vision_model.", "<image>", "<fake_token_around_image>", "<end_of_utterance>"
# The form of the published instruct models, which come without a template; the others do not know the word at the end.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{{ 'Assistant:' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.clip import ClipFeatures
    from mllm_edge.export.vision.idefics import LatentsConfig, LatentsConnector
    from mllm_edge.export.vision.siglip import SiglipConfig, Taps

    top, settings = checkpoint.top, checkpoint.config.perceiver_config
    top.require("use_resampler", True)
    top.take("perceiver_config")
    where = f"{checkpoint.source.folder / 'config.json'} perceiver_config"
    reader = ConfigReader(where, settings.to_dict(), type(settings)().to_dict())
    tower = SiglipConfig.read(checkpoint.vision, size="embed_dim")
    resampler = LatentsConfig.read(reader, tower.hidden_size)
    reader.finish()
    places, width = 1 + tower.patches**2, tower.hidden_size
    image = _image_spec(checkpoint, tower.tile, resampler.latents)
    seen = TensorSpec("vision_hidden", "float32", ("tiles", places, width))
    positions = checkpoint.weights.with_row(
        f"{_VISION}embeddings.position_embedding.weight",
        (places, width),
        f"{_VISION}embeddings.class_embedding",
        (width,),
    )
    traced = (
        TracedComponent(
            Stage("vision_encoder", "vision", "slice"),
            lambda: ClipFeatures(tower, Taps((tower.layers,))),
            (TensorSpec(PIXELS, "float32", ("tiles", *image.shape)),),
            (seen,),
            _VISION,
            {"embeddings.positions": positions},
            {"tiles": TILES},
        ),
        TracedComponent(
            Stage("connector", "connector", "slice"),
            lambda: LatentsConnector(resampler),
            (seen,),
            (TensorSpec(ENCODED, "float32", ("tiles", resampler.latents, width)),),
            "model.perceiver_resampler.",
            ranges={"tiles": TILES},
        ),
    )
    return Parts(traced, image, (f"{_VISION}post_layernorm.",), (image.prompt.border,))


def _load_processor(source: Source) -> Any:
    from transformers import IdeficsProcessor

    class Written(IdeficsProcessor):
        """Takes a text with a placeholder for each image, which it hands on as texts and images in turn."""

        image_token = _TOKEN

        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            (written,) = (text,) if isinstance(text, str) else text
            texts = written.removeprefix(self.tokenizer.bos_token).split(_TOKEN)
            shown = [*(images or ())]
            shown = [*shown[0]] if shown and isinstance(shown[0], (list, tuple)) else shown
            parts = [texts[0], *(part for pair in zip(shown, texts[1:], strict=True) for part in pair)]
            kept = [part for part in parts if not isinstance(part, str) or part.strip(" ")]
            return super().__call__(text=[kept], **options)

    processor = load_processor(source, "IdeficsProcessor", ("IdeficsImageProcessor",), _TEMPLATE, cls=Written)
    if processor.chat_template == _TEMPLATE and _END not in processor.tokenizer.get_vocab():
        processor.chat_template = _TEMPLATE.replace(_END, "")
    return processor


def _image_spec(checkpoint: Checkpoint, tile: int, latents: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    require_switched_on(source, processor.image_processor, "do_convert_rgb")
    transforms = single_transforms(source, processor.image_processor)
    require_tile(source, made_size(transforms), tile)
    prompt = ImagePrompt(_TOKEN, processor.image_token_id, f"{_FAKE}{{image}}{_FAKE}", border=_FAKE, blank=False)
    return ImageSpec(transforms, prompt, tile, tile, latents, into="cross_attention")


# ---------------------------------------------------------------- the reference
def _load_model(source: Source, layers: int | None) -> Any:
    """`layers`: of ours, of which those of cross-attention are some."""
    import torch
    from transformers import IdeficsForVisionText2Text

    class TextAlone(IdeficsForVisionText2Text):
        """Takes prompts without images as well, and has a layer of cross-attention before its first one."""

        def __init__(self, config: Any):
            if config.num_hidden_layers % config.cross_layer_interval:
                config.cross_layer_interval = config.num_hidden_layers
            super().__init__(config)

        def forward(self, *given: Any, cache: Any = None, **options: Any) -> Any:
            if not {"pixel_values", "image_encoder_embeddings"} & set(options):
                ids = given[0] if given else options["input_ids"]
                nothing = torch.zeros(len(ids), 1, self.model.perceiver_resampler.embed_dim)
                hidden = torch.zeros(*ids.shape, 1, dtype=torch.bool)
                options |= {"image_encoder_embeddings": nothing, "image_attention_mask": hidden}
            return super().forward(*given, cache=cache, **options)

    every = source.config.get("cross_layer_interval", 1)
    return load_reference(source, layers and layers - -(-layers // (every + 1)), TextAlone)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    hidden = model.model.vision_model(inputs[PIXELS].flatten(0, 1)).last_hidden_state
    return hidden, model.model.perceiver_resampler(hidden).flatten(0, 1)


FAMILY = Family(
    name="idefics",
    model_types=("idefics",),
    decoders=("idefics",),
    examples=("HuggingFaceM4/idefics-9b-instruct", "HuggingFaceM4/idefics-9b"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    text="model",
    load_model=_load_model,
)
