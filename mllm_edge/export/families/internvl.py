"""InternVL 2.5 and 3: InternViT tower, pixel shuffle, two-layer connector, and a Qwen2, Qwen3, Llama or InternLM2.

An image is stretched to the grid of tiles that suits its shape; in the prompt all tiles stand in one row between two
words, the whole image last. Both layouts are read: transformers' own (`internvl`) and the original (`internvl_chat`).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.config import ConfigReader, model_readers
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processing import (
    for_images,
    processor_class,
    read_image_processor,
    read_processor,
    read_tokenizer,
)
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.source_weights import source_weights
from mllm_edge.export.checkpoint.texts import Texts, read_texts
from mllm_edge.export.checkpoint.vocabulary import check_vocabulary, vocabulary
from mllm_edge.export.decoders.internlm2 import internlm2_spec
from mllm_edge.export.decoders.llama import llama_spec
from mllm_edge.export.families.internvl_layouts import Checkpoint, Names, cut_vision_qkv, read_checkpoint
from mllm_edge.export.plan import Plan, TracedComponent
from mllm_edge.export.reference import load_reference
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.spec import (
    EmbeddingSpec,
    ImagePrompt,
    ImageSpec,
    ModelSpec,
    Resize,
    SelectTiles,
    TensorSpec,
    Transform,
)

if TYPE_CHECKING:
    from torch import nn

    from mllm_edge.export.vision.internvit import InternVitConfig

__all__ = ["MODEL_TYPES", "OWN_READING", "SUMMARY", "image_features", "load_model", "load_processor", "plan"]

MODEL_TYPES = ("internvl", "internvl_chat")
OWN_READING = ("internvl_chat",)
SUMMARY = {
    "decoders": ["internlm2", "llama", "qwen2", "qwen3"],
    "examples": ["OpenGVLab/InternVL2_5-1B", "OpenGVLab/InternVL3-1B-hf"],
}

_TOWER = "model.vision_tower."
_CONNECTOR = "model.multi_modal_projector."
_EMBEDDING = "model.language_model.embed_tokens.weight"


def plan(source: Source, weights: Weights) -> Plan:
    """Understand the checkpoint; raises ConfigError, WeightsError or SourceError that names what does not fit."""
    checkpoint = read_checkpoint(source, weights)
    top, text, vision = model_readers(checkpoint.source, checkpoint.config)
    image_token_id = top.take("image_token_id")
    decoder = _decoder(checkpoint, text, weights, bool(top.take("tie_word_embeddings")))
    context = text.take("max_position_embeddings")
    tower = _tower(top, vision)
    scale = _scale(top.take("downsample_ratio"), tower.patches)
    tokens = (tower.patches // scale) ** 2
    traced = _traced(checkpoint, tower, scale, tokens, top, decoder.hidden_size, weights)
    top.take("image_seq_length")  # of the processor, which states it again
    for reader in (top, text, vision):
        reader.finish()
    start, context_token, end = checkpoint.image_tokens
    check_vocabulary(source, {}, checkpoint.image_tokens, decoder.vocab_size)
    processor = _load_processor(checkpoint)
    image = _image_spec(checkpoint, processor, tower.tile, tokens, image_token_id)
    check_vocabulary(source, {context_token: image_token_id}, (start, end), decoder.vocab_size)
    embedding = checkpoint.names.stored(_EMBEDDING)
    model = ModelSpec(
        family="internvl",
        model_type=source.model_type,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        context_length=context,
        parameters=weights.parameters,
        embedding=EmbeddingSpec("embed_tokens.npy", rows=weights.shape(embedding)[0]),
        positions=decoder.position_spec(),
        cache=decoder.cache_spec(),
        image=image,
    )
    return Plan(
        model=model,
        decoder=decoder,
        traced=traced,
        embedding=embedding,
        texts=_texts(checkpoint, processor),
        ignored=_ignored(checkpoint, tower, weights),
    )


def load_processor(source: Source) -> Any:
    """What transformers loads from the folder: InternVLProcessor, for images and text. Of the original layout, which
    transformers does not know, the same class with what the original code has built in."""
    return _load_processor(read_checkpoint(source, source_weights(source)))


def _load_processor(checkpoint: Checkpoint) -> Any:
    from transformers import InternVLProcessor, PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    source = checkpoint.source
    if not checkpoint.original:
        processor_class(source, "InternVLProcessor", ("InternVLProcessor",))
        image_processor, tokenizer = read_image_processor(source, ("GotOcr2ImageProcessor",)), read_tokenizer(source)
        if not hasattr(tokenizer, "context_image_token"):
            tokenizer = read_tokenizer(source, extra_special_tokens=_names(checkpoint))
        processor = read_processor(source, InternVLProcessor, image_processor, tokenizer)
        processor.chat_template = _template(checkpoint, tokenizer)
        return processor

    class ImageProcessor(GotOcr2ImageProcessorPil):
        def crop_image_to_patches(self, *args: Any, **kwargs: Any) -> Any:
            return super().crop_image_to_patches(*args, **{**kwargs, "use_thumbnail": checkpoint.overview})

    # A checkpoint may name a tokenizer class of its own code; tokenizer.json is the same without it.
    tokenizer = read_tokenizer(source, PreTrainedTokenizerFast, extra_special_tokens=_names(checkpoint))
    processor = for_images(InternVLProcessor)(
        ImageProcessor(**checkpoint.images),
        tokenizer,
        None,
        image_seq_length=_tokens_per_tile(checkpoint.config),
    )
    processor.chat_template = _template(checkpoint, tokenizer)
    return processor


def _names(checkpoint: Checkpoint) -> dict[str, str]:
    start, context, end = checkpoint.image_tokens
    return {
        "start_image_token": start,
        "end_image_token": end,
        "context_image_token": context,
        "video_token": "<video>",
    }


def load_model(source: Source, decoder_layers: int | None = None) -> Any:
    """InternVLForConditionalGeneration in float32; the original layout is translated tensor by tensor."""
    import torch
    from transformers import InternVLForConditionalGeneration

    weights = source_weights(source)
    checkpoint = read_checkpoint(source, weights)
    if not checkpoint.original:
        return load_reference(source, decoder_layers)
    config, names = checkpoint.config, checkpoint.names
    cut_vision_qkv(checkpoint, weights)
    _decoder(checkpoint, model_readers(checkpoint.source, config)[1], weights, tied=False)  # cuts InternLM2's
    if decoder_layers is not None:
        config.text_config.num_hidden_layers = min(decoder_layers, config.text_config.num_hidden_layers)
    config.tie_word_embeddings &= names.stored("lm_head.weight") not in weights
    with torch.device("meta"):
        parameters = set(InternVLForConditionalGeneration(config).state_dict())
    if config.tie_word_embeddings:
        parameters.discard("lm_head.weight")
    state = {name: torch.from_numpy(weights.read(names.stored(name))) for name in parameters}
    return InternVLForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The reference's tensors behind `vision_hidden` [tiles, patches², D] and `image_features` [tokens, H]."""
    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    layer = model.config.vision_feature_layer
    hidden = found.last_hidden_state if layer == -1 else found.hidden_states[layer]
    return hidden[:, 1:], found.pooler_output.flatten(0, 1)


# ---------------------------------------------------------------- decoder and text
def _decoder(checkpoint: Checkpoint, text: ConfigReader, weights: Weights, tied: bool) -> DecoderSpec:
    prefix, head = (checkpoint.names.stored(name) for name in ("model.language_model", "lm_head"))
    embedding = checkpoint.names.stored(_EMBEDDING).removesuffix(".weight")
    if f"{head}.weight" not in weights and tied:
        head = embedding
    if checkpoint.internlm2:
        return internlm2_spec(text, weights, prefix, head)
    return llama_spec(text, weights, prefix, False, checkpoint.config.text_config.model_type, head)


def _texts(checkpoint: Checkpoint, processor: Any) -> Texts:
    """With the token that ends a turn, which the original code knows by the prompt's form alone."""
    texts = read_texts(checkpoint.source, processor, checkpoint.config.text_config.to_dict())
    number, generation = vocabulary(checkpoint.source).get(checkpoint.stop or ""), texts.generation
    if number is None or number in generation.eos_token_ids:
        return texts
    return replace(texts, generation=replace(generation, eos_token_ids=(*generation.eos_token_ids, number)))


def _template(checkpoint: Checkpoint, tokenizer: Any) -> str:
    """What the original code would build comes before the tokenizer's template, which is often the bare decoder's."""
    folder, known = checkpoint.source.folder, checkpoint.template or ""
    if checkpoint.original and known and not (folder / "chat_template.jinja").is_file():
        return known
    template = chat_template(checkpoint.source, known, tokenizer)
    if not template:
        raise ConfigError(
            f"{folder}: no chat template, and config.json names none that is known here",
            "put the model's template into chat_template.jinja beside config.json",
        )
    return template


# ---------------------------------------------------------------- vision
def _tower(top: ConfigReader, vision: ConfigReader) -> "InternVitConfig":
    from mllm_edge.export.vision.internvit import InternVitConfig
    from mllm_edge.export.vision.modules import ACTIVATIONS

    tile, patch = (_square(vision, key) for key in ("image_size", "patch_size"))
    hidden, heads = vision.take("hidden_size"), vision.take("num_attention_heads")
    if hidden % heads or tile % patch:
        raise ConfigError(
            f"vision_config: hidden_size {hidden} is no multiple of num_attention_heads {heads}, "
            f"or image_size {tile} none of patch_size {patch}",
            "use the config.json that belongs to these weights",
        )
    vision.require("use_absolute_position_embeddings", True)
    for unused in ("layer_scale_init_value", "use_mask_token", "hidden_dropout_prob", "projection_dropout"):
        vision.take(unused)  # only for training
    top.require("vision_feature_select_strategy", "default")
    layers, chosen = vision.take("num_hidden_layers"), top.take("vision_feature_layer")
    pooled = vision.take("use_mean_pooling")
    return InternVitConfig(
        hidden_size=hidden,
        intermediate_size=vision.take("intermediate_size"),
        layers=_layers(chosen, layers),
        heads=heads,
        channels=vision.require("num_channels", 3),
        patch=patch,
        tile=tile,
        norm=vision.require("norm_type", "layer_norm", "rms_norm"),
        norm_eps=vision.take("layer_norm_eps"),
        activation=vision.require("hidden_act", *ACTIVATIONS),
        qkv_bias=bool(vision.take("attention_bias")),
        qk_norm=bool(vision.take("use_qk_norm")),
        final_norm=chosen == -1 and not pooled,
    )


def _square(vision: ConfigReader, key: str) -> int:
    value = vision.take(key)
    sides = [value, value] if isinstance(value, int) else list(value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ConfigError(f"vision_config: {key} = {value!r}", "only square images and patches are supported")
    return int(sides[0])


def _layers(chosen: Any, layers: int) -> int:
    """How many layers come before the hidden state that the connector takes."""
    if not isinstance(chosen, int) or not -layers <= chosen <= layers or chosen == 0:
        raise ConfigError(
            f"config.json: the layer of the image features is {chosen!r}, but the tower has {layers} layers",
            f"choose from {-layers} to {layers}, but not 0",
        )
    return chosen % (layers + 1)


def _scale(ratio: float, patches: int) -> int:
    """Patches along one side of a token."""
    scale = round(1 / ratio) if ratio else 0
    if not scale or scale * ratio != 1 or patches % scale:
        raise ConfigError(
            f"config.json: downsample_ratio = {ratio!r} does not divide the {patches} patches of a tile's side",
            "use the config.json that belongs to these weights",
        )
    return scale


def _traced(
    checkpoint: Checkpoint,
    tower: "InternVitConfig",
    scale: int,
    tokens: int,
    top: ConfigReader,
    text_hidden: int,
    weights: Weights,
) -> tuple[TracedComponent, TracedComponent]:
    from mllm_edge.export.vision.internvit import InternVit, ShuffleConnector
    from mllm_edge.export.vision.modules import ACTIVATIONS

    if checkpoint.original:
        cut_vision_qkv(checkpoint, weights)
    activation = top.require("projector_hidden_act", *ACTIVATIONS)
    pixels = TensorSpec("pixel_values", "float32", ("tiles", tower.channels, tower.tile, tower.tile))
    hidden = TensorSpec("vision_hidden", "float32", ("tiles", tower.patches**2, tower.hidden_size))
    features = TensorSpec("image_features", "float32", ("tiles", tokens, text_hidden))
    encoder = partial(InternVit, tower)
    connector = partial(ShuffleConnector, tower.patches, scale, tower.hidden_size, text_hidden, activation)
    positions = {"embeddings.positions": _positions(tower, checkpoint.names, weights)}
    of_tower = _readers(encoder, _TOWER, checkpoint.names, weights, positions)
    of_connector = _readers(connector, _CONNECTOR, checkpoint.names, weights, {})
    return (
        TracedComponent("vision_encoder", encoder, (pixels,), (hidden,), "", of_tower),
        TracedComponent("connector", connector, (hidden,), (features,), "", of_connector),
    )


def _readers(
    module: "Callable[[], nn.Module]",
    prefix: str,
    names: Names,
    weights: Weights,
    derived: Mapping[str, Callable[[], np.ndarray]],
) -> dict[str, Callable[[], np.ndarray]]:
    """A reader for every parameter, whatever the checkpoint calls it."""
    import torch

    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in module().named_parameters()}
    stored = {name: names.stored(prefix + name) for name in shapes if name not in derived}
    return {**derived, **{name: weights.use(tensor, shapes[name]) for name, tensor in stored.items()}}


def _positions(tower: "InternVitConfig", names: Names, weights: Weights) -> Callable[[], np.ndarray]:
    """Position embeddings; the class token is the same for all images, so it joins its own position."""
    places, size = 1 + tower.patches**2, tower.hidden_size
    read = weights.use(names.stored(f"{_TOWER}embeddings.position_embeddings"), (1, places, size))
    token = weights.use(names.stored(f"{_TOWER}embeddings.cls_token"), (1, 1, size))

    def compute() -> np.ndarray:
        positions = read()[0]
        positions[0] += token()[0, 0]
        return positions

    return compute


def _ignored(checkpoint: Checkpoint, tower: "InternVitConfig", weights: Weights) -> tuple[str, ...]:
    """Tensors that the model has and never uses: what is behind the chosen layer, what only training needs, tables."""
    vision, stored = checkpoint.config.vision_config, checkpoint.names.stored
    parts = [f"encoder.layer.{i}." for i in range(tower.layers, vision.num_hidden_layers)]
    parts += [] if vision.use_mean_pooling else ["layernorm."]
    parts += ["embeddings.mask_token"] if vision.use_mask_token else []
    unused = tuple(stored(_TOWER + part) for part in parts)
    return tuple(name for name in weights if name.startswith(unused) or name.endswith(".rotary_emb.inv_freq"))


# ---------------------------------------------------------------- processor
def _tokens_per_tile(config: Any) -> int:
    size, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    return int(size // patch * config.downsample_ratio) ** 2


def _image_spec(checkpoint: Checkpoint, processor: Any, tile: int, tokens: int, token_id: int) -> ImageSpec:
    start, context, end = processor.start_image_token, processor.image_token, processor.end_image_token
    if processor.image_seq_length != tokens:
        raise ConfigError(
            f"{checkpoint.source.folder / 'processor_config.json'}: image_seq_length = {processor.image_seq_length} "
            f"(256 if it is not given), but the model makes {tokens} tokens of a tile",
            "use the processor files that belong to this model",
        )
    overview = checkpoint.overview
    prompt = ImagePrompt(
        token=context,
        token_id=token_id,
        tokens_per_tile=tokens,
        single=f"{start}{{image}}{end}",
        begin=start,
        tile="{image}",
        overview=f"{{image}}{end}" if overview else end,
        reserved=(processor.video_token,),
    )
    return ImageSpec(_transforms(checkpoint, processor.image_processor, tile), prompt, tile, tile)


def _transforms(checkpoint: Checkpoint, settings: Any, tile: int) -> tuple[Transform, ...]:
    where = checkpoint.source.folder
    for key in ("do_convert_rgb", "do_resize"):
        if not getattr(settings, key):
            raise ConfigError(f"{where}: the image processor's {key} = False", "only true is supported")
    height, width = settings.size.height, settings.size.width
    if (height, width) != (tile, tile):
        raise ConfigError(
            f"{where}: the image processor makes tiles of {height}×{width} px, the vision tower takes {tile}×{tile} px",
            "use the preprocessor_config.json that belongs to this model",
        )
    least, most = settings.min_patches, settings.max_patches
    if not 1 <= least <= most:
        raise ConfigError(
            f"{where}: an image becomes at least {least} and at most {most} tiles", "use this model's own files"
        )
    resample = resample_name(settings.resample)
    # transformers' processor always selects tiles, whatever crop_to_patches says.
    split = SelectTiles(tile, least, most, checkpoint.overview, resample) if most > 1 else Resize(tile, tile, resample)
    return (split, *value_transforms(settings))
