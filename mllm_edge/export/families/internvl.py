"""InternVL 2.5, 3, 3.5: InternViT tower, pixel shuffle, two-layer connector, and a Qwen2, Qwen3, Llama or InternLM2.

An image is stretched to the grid of tiles that suits its shape; in the prompt all tiles stand in one row between two
words, the whole image last. Both layouts are read: transformers' own (`internvl`) and the original (`internvl_chat`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.config import load_config
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processing import (
    for_images,
    processor_class,
    read_image_processor,
    read_processor,
    read_tokenizer,
)
from mllm_edge.export.checkpoint.processor import require_switched_on, require_tile, require_tokens
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import Texts, read_texts
from mllm_edge.export.checkpoint.video_settings import frame_sampling, frame_tiles, video_settings
from mllm_edge.export.checkpoint.vocabulary import check_vocabulary, vocabulary
from mllm_edge.export.families import internvl_chat
from mllm_edge.export.families.internvl_chat import MODEL_TYPE as CHAT
from mllm_edge.export.family import Checkpoint, Family, Parts, open_weights, understand
from mllm_edge.export.plan import TracedComponent, tile_components
from mllm_edge.export.reference import load_reference
from mllm_edge.spec import ImagePrompt, ImageSpec, Resize, SelectTiles, Transform, VideoSpec

if TYPE_CHECKING:
    from mllm_edge.export.vision.internvit import InternVitConfig

__all__ = ["FAMILY", "TOWER", "internvl_components", "internvl_features", "internvl_transforms"]

TOWER = "model.vision_tower."


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.internvit import InternVitConfig

    source, vision = checkpoint.source, checkpoint.config.vision_config
    tower = InternVitConfig.read(checkpoint.vision, checkpoint.top)
    if source.model_type == CHAT:
        internvl_chat.cut_vision_qkv(checkpoint.weights, vision, "encoder.layer")
    traced, ignored, tokens = internvl_components(checkpoint, tower)
    start, _, end = words = _image_tokens(source)
    check_vocabulary(source, {}, words, checkpoint.decoder.vocab_size)
    return Parts(traced, _image_spec(checkpoint, tower.tile, tokens), ignored, (start, end))


def internvl_components(
    checkpoint: Checkpoint, tower: "InternVitConfig"
) -> tuple[tuple[TracedComponent, ...], tuple[str, ...], int]:
    """Tower and connector, tensors that begin so and are rightly left out, and a tile's tokens; raises ConfigError."""
    from mllm_edge.export.vision.internvit import InternVit, ShuffleConnector, shuffled
    from mllm_edge.export.vision.modules import ACTIVATIONS

    top, text_hidden = checkpoint.top, checkpoint.decoder.hidden_size
    scale = shuffled(top.take("downsample_ratio"), tower.patches)
    tokens, size = (tower.patches // scale) ** 2, tower.hidden_size
    activation = top.require("projector_hidden_act", *ACTIVATIONS)
    top.take("image_seq_length")  # of the processor, which states it again
    positions = checkpoint.weights.with_row(
        *(f"{TOWER}embeddings.position_embeddings", (1, 1 + tower.patches**2, size)),
        *(f"{TOWER}embeddings.cls_token", (1, 1, size)),
    )
    traced = tile_components(
        lambda: InternVit(tower),
        lambda: ShuffleConnector(tower.patches, scale, size, text_hidden, activation),
        (tower.channels, tower.tile, tower.tile),
        (tower.patches**2, size),
        (tokens, text_hidden),
        (TOWER, "model.multi_modal_projector."),
        {"embeddings.positions": positions},
    )
    # What the model has and never uses: layers behind the chosen one, what only training needs.
    vision = checkpoint.config.vision_config
    unused = [f"{tower.stack}.{i}." for i in range(tower.layers, vision.num_hidden_layers)]
    unused += [] if vision.use_mean_pooling else ["layernorm."]
    unused += ["embeddings.mask_token"] if vision.use_mask_token else []
    return traced, tuple(TOWER + part for part in unused), tokens


def _image_tokens(source: Source) -> tuple[str, str, str]:
    """The words before an image, for each of its features, and after it."""
    if source.model_type == CHAT:
        return internvl_chat.IMAGE_TOKENS
    tokenizer = source.json("tokenizer_config.json")
    extra = tokenizer.get("extra_special_tokens")
    named = {**tokenizer, **(extra if isinstance(extra, Mapping) else {})}
    words = zip(("start", "context", "end"), internvl_chat.IMAGE_TOKENS, strict=True)
    start, context, end = (str(named.get(f"{place}_image_token", default)) for place, default in words)
    return start, context, end


# ---------------------------------------------------------------- the reference
def _load_processor(source: Source) -> Any:
    from transformers import InternVLProcessor, PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    start, context, end = _image_tokens(source)
    names = {"start_image_token": start, "end_image_token": end, "context_image_token": context}
    names |= {"video_token": "<video>"}
    if source.model_type != CHAT:
        processor_class(source, "InternVLProcessor", ("InternVLProcessor",))
        image_processor, tokenizer = read_image_processor(source, ("GotOcr2ImageProcessor",)), read_tokenizer(source)
        if not hasattr(tokenizer, "context_image_token"):
            tokenizer = read_tokenizer(source, extra_special_tokens=names)
        processor = read_processor(source, InternVLProcessor, image_processor, tokenizer)
        processor.chat_template = _template(source, tokenizer, internvl_chat.chatml("", "\n", context))
        return processor
    chat = internvl_chat.read_chat(source)

    class ImageProcessor(GotOcr2ImageProcessorPil):
        def crop_image_to_patches(self, *args: Any, **kwargs: Any) -> Any:
            return super().crop_image_to_patches(*args, **{**kwargs, "use_thumbnail": chat.overview})

    # A checkpoint may name a tokenizer class of its own code; tokenizer.json is the same without it.
    tokenizer = read_tokenizer(source, PreTrainedTokenizerFast, extra_special_tokens=names)
    vision, ratio = chat.config["vision_config"], chat.config["downsample_ratio"]
    tokens = int(vision["image_size"] // vision["patch_size"] * ratio) ** 2
    parts = ImageProcessor(**chat.images), tokenizer, None
    processor = for_images(InternVLProcessor)(*parts, image_seq_length=tokens)
    processor.chat_template = _template(source, tokenizer, chat.template or "")
    return processor


def _template(source: Source, tokenizer: Any, known: str) -> str:
    """What the original code would build comes before the tokenizer's template, which is often the bare decoder's."""
    if source.model_type == CHAT and known and not (source.folder / "chat_template.jinja").is_file():
        return known
    template = chat_template(source, known, tokenizer)
    if not template:
        raise ConfigError(
            f"{source.folder}: no chat template, and config.json names none that is known here",
            "put the model's template into chat_template.jinja beside config.json",
        )
    return template


def _texts(checkpoint: Checkpoint) -> Texts:
    """With the token that ends a turn, which the original code knows by the prompt's form alone."""
    source = checkpoint.source
    texts = read_texts(source, checkpoint.processor, checkpoint.config.text_config.to_dict())
    stop = internvl_chat.read_chat(source).stop if source.model_type == CHAT else None
    number, generation = vocabulary(source).get(stop or ""), texts.generation
    if number is None or number in generation.eos_token_ids:
        return texts
    return replace(texts, generation=replace(generation, eos_token_ids=(*generation.eos_token_ids, number)))


def _load_model(source: Source, decoder_layers: int | None = None) -> Any:
    """InternVLForConditionalGeneration in float32; the original layout is translated tensor by tensor."""
    if source.model_type != CHAT:
        return load_reference(source, decoder_layers)
    import torch
    from transformers import InternVLForConditionalGeneration

    weights = open_weights(source)
    understand(source, weights)  # cuts fused projections
    config = load_config(internvl_chat.translated(source))
    if decoder_layers is not None:
        config.text_config.num_hidden_layers = min(decoder_layers, config.text_config.num_hidden_layers)
    config.tie_word_embeddings &= "lm_head.weight" not in weights
    with torch.device("meta"):
        parameters = set(InternVLForConditionalGeneration(config).state_dict())
    if config.tie_word_embeddings:
        parameters.discard("lm_head.weight")
    state = {name: torch.from_numpy(weights.read(name)) for name in parameters}
    return InternVLForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def internvl_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """See `Family`."""
    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    layer = model.config.vision_feature_layer
    hidden = found.last_hidden_state if layer == -1 else found.hidden_states[layer]
    return hidden[:, 1:], found.pooler_output.flatten(0, 1)


def _decoder_type(config: Any, weights: Weights) -> str:
    fused = "model.language_model.layers.0.self_attn.qkv_proj.weight" in weights
    return "internlm2" if fused else str(config.text_config.model_type)


# ---------------------------------------------------------------- processor
def _image_spec(checkpoint: Checkpoint, tile: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    start, context, end = processor.start_image_token, processor.image_token, processor.end_image_token
    stated = processor.image_seq_length
    require_tokens(source, f"image_seq_length = {stated} (256 if it is not given)", stated, tokens)
    overview = source.model_type != CHAT or internvl_chat.read_chat(source).overview
    prompt = ImagePrompt(
        context,
        checkpoint.token_id,
        single=f"{start}{{image}}{end}",
        begin=start,
        tile="{image}",
        overview=f"{{image}}{end}" if overview else end,
        reserved=(processor.video_token,),
    )
    transforms = internvl_transforms(source, processor.image_processor, tile, overview)
    return ImageSpec(transforms, prompt, tile, tile, tokens, video=_video_spec(checkpoint, tile, tokens, prompt))


def _video_spec(checkpoint: Checkpoint, tile: int, tokens: int, prompt: ImagePrompt) -> VideoSpec | None:
    """Each frame is one tile behind its number. None as of `video_settings`; the original layout has no such files."""
    source = checkpoint.source
    if source.model_type == CHAT:
        return None
    settings = video_settings(source, "InternVLVideoProcessor", size={"height": 384, "width": 384})
    if settings is None:
        return None
    shift = getattr(settings, "initial_shift", True)  # in frames; true: half of what lies between two
    sampling = frame_sampling(source, settings, "stride", shift=None if shift is True else shift or 0.0)
    return VideoSpec(
        frame_tiles(source, settings, tile),
        prompt.token,
        prompt.token_id,
        features=tokens,
        placeholder=checkpoint.processor.video_token,
        frame=f"Frame{{number}}: {prompt.single}",
        between="\n",
        sampling=sampling,
    )


def internvl_transforms(source: Source, settings: Any, tile: int, overview: bool) -> tuple[Transform, ...]:
    """What the image processor does; `overview`: several tiles are followed by the whole image. Raises ConfigError."""
    require_switched_on(source, settings, "do_convert_rgb", "do_resize")
    require_tile(source, (settings.size.height, settings.size.width), tile)
    least, most = settings.min_patches, settings.max_patches
    if not 1 <= least <= most:
        raise ConfigError(
            f"{source.folder}: an image becomes at least {least} and at most {most} tiles", "use this model's own files"
        )
    resample = resample_name(settings.resample)
    # transformers' processor always selects tiles, whatever crop_to_patches says.
    split = SelectTiles(tile, least, most, overview, resample) if most > 1 else Resize(tile, tile, resample)
    return (split, *value_transforms(settings))


FAMILY = Family(
    name="internvl",
    model_types=("internvl", CHAT),
    decoders=("internlm2", "llama", "qwen2", "qwen3"),
    examples=("OpenGVLab/InternVL2_5-1B", "OpenGVLab/InternVL3-1B-hf"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=internvl_features,
    load_model=_load_model,
    own_layouts=(CHAT,),
    renames=internvl_chat.RENAMES,
    translated=internvl_chat.translated,
    texts=_texts,
    decoder_type=_decoder_type,
)
