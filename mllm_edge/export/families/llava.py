"""LLaVA 1.5 and its relatives: CLIP or SigLIP tower, hidden states from inside it, two-layer connector.

An image is one square tile; in the prompt its placeholder is repeated once per feature. The decoder is a Llama,
Mistral, Qwen2 or Gemma 3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import ConfigError, WeightsError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.config import ConfigReader, load_config, model_readers
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processing import (
    processor_class,
    read_image_processor,
    read_processor,
    read_tokenizer,
)
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import read_texts
from mllm_edge.export.checkpoint.vocabulary import check_vocabulary
from mllm_edge.export.decoders.gemma import gemma_spec
from mllm_edge.export.decoders.llama import llama_spec
from mllm_edge.export.plan import Plan, TracedComponent
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.spec import (
    CenterCrop,
    EmbeddingSpec,
    ImagePrompt,
    ImageSpec,
    ModelSpec,
    PadToSquare,
    Resize,
    ResizeShortestEdge,
    TensorSpec,
    Transform,
)

if TYPE_CHECKING:
    from mllm_edge.export.vision.siglip import SiglipConfig, Taps

__all__ = ["MODEL_TYPES", "SUMMARY", "image_features", "load_processor", "plan"]

MODEL_TYPES = ("llava",)

_GEMMA_3 = "gemma3_text"
_DECODERS = ("llama", "mistral", "qwen2", _GEMMA_3)
SUMMARY = {"decoders": list(_DECODERS), "examples": ["llava-hf/llava-1.5-7b-hf"]}
_CLIP, _SIGLIP = "clip_vision_model", "siglip_vision_model"
_PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
# Vicuna's form, for checkpoints that come without a template: images first, then the text.
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper + ': ' if message['role'] != 'system' else '' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


@dataclass(frozen=True)
class _Names:
    """Where the parts stand in a checkpoint; `text` and `head` without a final dot."""

    text: str
    head: str
    vision: str
    connector: str


# The hub's checkpoints and what transformers saves look like the first, a state dictionary like the second.
_LAYOUTS = (
    _Names("language_model.model", "language_model.lm_head", "vision_tower.", "multi_modal_projector."),
    _Names("model.language_model", "lm_head", "model.vision_tower.", "model.multi_modal_projector."),
)


@dataclass(frozen=True)
class _Vision:
    """The tower, what is taken from it, and the tokens that an image becomes."""

    kind: str
    config: "SiglipConfig"
    taps: "Taps"

    @property
    def tokens(self) -> int:
        return self.config.patches**2 + (self.kind == _CLIP) - self.taps.skip


def plan(source: Source, weights: Weights) -> Plan:
    """Understand the checkpoint; raises ConfigError, WeightsError or SourceError that names what does not fit."""
    config = _config(source)
    top, text, vision_reader = model_readers(source, config)
    names = _names(source, weights)
    image_token_id = top.take("image_token_index")
    decoder = _decoder(text, weights, names, config.text_config.model_type, bool(top.take("tie_word_embeddings")))
    context = text.take("max_position_embeddings")
    vision = _vision(top, vision_reader, config.vision_config.model_type)
    traced = _traced(vision, top, names, decoder.hidden_size, weights)
    top.take("image_seq_length")  # neither the reference's model nor its processor reads it
    for reader in (top, text, vision_reader):
        reader.finish()
    processor = load_processor(source)
    image = _image_spec(source, processor, vision, image_token_id)
    check_vocabulary(source, {image.prompt.token: image_token_id}, (), decoder.vocab_size)
    embedding = f"{names.text}.embed_tokens.weight"
    # Image features come as they are: only rows of the table are scaled.
    scale = decoder.hidden_size**0.5 if config.text_config.model_type == _GEMMA_3 else 1.0
    model = ModelSpec(
        family="llava",
        model_type=source.model_type,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        context_length=context,
        parameters=weights.parameters,
        embedding=EmbeddingSpec("embed_tokens.npy", rows=weights.shape(embedding)[0], scale=scale),
        positions=decoder.position_spec(),
        cache=decoder.cache_spec(),
        image=image,
    )
    return Plan(
        model=model,
        decoder=decoder,
        traced=traced,
        embedding=embedding,
        texts=read_texts(source, processor, config.text_config.to_dict()),
        ignored=tuple(name for name in weights if _ignored(name, names, vision.config.layers)),
    )


def load_processor(source: Source) -> Any:
    """What transformers loads from the folder: LlavaProcessor over the image processor that the folder names; settings
    that older files leave out are the model's."""
    from transformers import LlavaProcessor

    processor_class(source, "LlavaProcessor", ("LlavaProcessor",))
    image_processor, tokenizer = read_image_processor(source, _PROCESSORS), read_tokenizer(source)
    config = _config(source)
    processor = read_processor(
        source,
        LlavaProcessor,
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type == _CLIP),
    )
    processor.chat_template = chat_template(source, _TEMPLATE, tokenizer)
    return processor


def image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The reference's tensors behind `vision_hidden` [N, S, D · taps] and `image_features` [N · S, H]."""
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    layers = model.config.vision_feature_layer
    states = [found.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
    skip = int(model.config.vision_feature_select_strategy == "default")
    return torch.cat([state[:, skip:] for state in states], -1), torch.cat(list(found.pooler_output))


# ---------------------------------------------------------------- configuration and weights
def _config(source: Source) -> Any:
    where = source.folder / "config.json"
    if "text_config" not in source.config:
        raise ConfigError(
            f"{where}: no text_config: this is not a checkpoint of LlavaForConditionalGeneration",
            "checkpoints of the original LLaVA code have conversions on the hub, such as llava-hf/llava-1.5-7b-hf",
        )
    config = load_config(source)
    for part, allowed in (("text_config", _DECODERS), ("vision_config", (_CLIP, _SIGLIP))):
        kind = getattr(config, part).model_type
        if kind not in allowed:
            raise ConfigError(f"{where}: {part}.model_type = {kind!r}", f"supported: {', '.join(allowed)}")
    return config


def _names(source: Source, weights: Weights) -> _Names:
    for names in _LAYOUTS:
        if f"{names.text}.embed_tokens.weight" in weights:
            # transformers 4 kept the tower one level deeper.
            deeper = f"{names.vision}vision_model."
            inside = f"{deeper}embeddings.patch_embedding.weight" in weights
            return replace(names, vision=deeper) if inside else names
    raise WeightsError(
        f"{source.folder}: the checkpoint has no tensor {_LAYOUTS[0].text}.embed_tokens.weight",
        "the weights are not those of LlavaForConditionalGeneration, or a shard is missing",
    )


def _ignored(name: str, names: _Names, layers: int) -> bool:
    """Whether the model never uses a tensor: layers behind the last tap, the tower's own last norm and head, tables."""
    if name.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids")):
        return True
    inside = name.removeprefix(names.vision)
    if inside == name:
        return False
    if inside.startswith("encoder.layers."):
        return int(inside.split(".")[2]) >= layers
    return inside.startswith(("post_layernorm.", "head."))


def _decoder(text: ConfigReader, weights: Weights, names: _Names, model_type: str, tied: bool) -> DecoderSpec:
    if model_type == _GEMMA_3:
        return gemma_spec(text, weights, names.text, model_type, tied=tied, head=names.head)
    decoder = llama_spec(text, weights, names.text, tied, model_type)
    stored = f"{names.head}.weight" in weights
    head = names.head if stored or not tied else f"{names.text}.embed_tokens"
    return replace(decoder, names=replace(decoder.names, lm_head=head))


# ---------------------------------------------------------------- vision
def _vision(top: ConfigReader, vision: ConfigReader, kind: str) -> _Vision:
    from mllm_edge.export.vision.modules import ACTIVATIONS
    from mllm_edge.export.vision.siglip import SiglipConfig, Taps

    sizes = {key: vision.take(key) for key in ("image_size", "patch_size")}
    for key, value in sizes.items():
        if not isinstance(value, int):
            raise ConfigError(f"vision_config: {key} = {value!r}", "only square images and patches are supported")
    hidden, heads = vision.take("hidden_size"), vision.take("num_attention_heads")
    if hidden % heads:
        raise ConfigError(
            f"vision_config: hidden_size {hidden} is no multiple of num_attention_heads {heads}",
            "use the config.json that belongs to these weights",
        )
    for unused in ("projection_dim", "vision_use_head", "initializer_factor"):  # of the tower's other uses
        vision.take(unused)
    states = _states(top.take("vision_feature_layer"), vision.take("num_hidden_layers"))
    skip = top.require("vision_feature_select_strategy", "default", "full") == "default"
    config = SiglipConfig(
        hidden_size=hidden,
        intermediate_size=vision.take("intermediate_size"),
        layers=max(states),
        heads=heads,
        channels=vision.require("num_channels", 3),
        patch=sizes["patch_size"],
        tile=sizes["image_size"],
        grid=sizes["image_size"] // sizes["patch_size"],
        norm_eps=vision.take("layer_norm_eps"),
        activation=vision.require("hidden_act", *ACTIVATIONS),
    )
    return _Vision(kind, config, Taps(states, int(skip)))


def _states(feature_layer: Any, layers: int) -> tuple[int, ...]:
    """`vision_feature_layer` as indices from 0: the input of the first layer, then the output of each."""
    chosen = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    for layer in chosen:
        if not -layers - 1 <= layer <= layers:
            raise ConfigError(
                f"config.json: vision_feature_layer = {feature_layer!r}, but the tower has {layers} layers",
                f"choose from {-layers - 1} to {layers}",
            )
    if not chosen or feature_layer == 0:  # the reference takes a plain 0 for none
        raise ConfigError(f"config.json: vision_feature_layer = {feature_layer!r} names no layer", "such as -2, or [0]")
    return tuple(layer % (layers + 1) for layer in chosen)


def _traced(
    vision: _Vision, top: ConfigReader, names: _Names, text_hidden: int, weights: Weights
) -> tuple[TracedComponent, TracedComponent]:
    from mllm_edge.export.vision.clip import ClipFeatures, MlpConnector
    from mllm_edge.export.vision.modules import ACTIVATIONS
    from mllm_edge.export.vision.siglip import SiglipFeatures

    activation = top.require("projector_hidden_act", *ACTIVATIONS)
    bias = bool(top.take("multimodal_projector_bias"))
    tower, tile = vision.config, vision.config.tile
    width = tower.hidden_size * len(vision.taps.states)
    hidden = TensorSpec("vision_hidden", "float32", ("tiles", vision.tokens, width))
    features = TensorSpec("image_features", "float32", ("tiles", vision.tokens, text_hidden))
    module = ClipFeatures if vision.kind == _CLIP else SiglipFeatures
    encoder = TracedComponent(
        "vision_encoder",
        lambda: module(tower, vision.taps),
        (TensorSpec("pixel_values", "float32", ("tiles", tower.channels, tile, tile)),),
        (hidden,),
        names.vision,
        {"embeddings.positions": _positions(vision, names, weights)},
    )
    connector = TracedComponent(
        "connector",
        lambda: MlpConnector(width, text_hidden, activation, bias),
        (hidden,),
        (features,),
        names.connector,
    )
    return encoder, connector


def _positions(vision: _Vision, names: _Names, weights: Weights) -> Callable[[], np.ndarray]:
    """Position embeddings; CLIP's class token is the same for all images, so it joins its own position."""
    tower, table = vision.config, f"{names.vision}embeddings.position_embedding.weight"
    if vision.kind == _SIGLIP:
        return weights.use(table, (tower.grid**2, tower.hidden_size))
    read = weights.use(table, (1 + tower.grid**2, tower.hidden_size))
    token = weights.use(f"{names.vision}embeddings.class_embedding", (tower.hidden_size,))

    def compute() -> np.ndarray:
        positions = read()
        positions[0] += token()
        return positions

    return compute


# ---------------------------------------------------------------- processor
def _image_spec(source: Source, processor: Any, vision: _Vision, token_id: int) -> ImageSpec:
    tile = vision.config.tile
    transforms = _transforms(processor.image_processor, source)
    size = next((t for t in reversed(transforms) if isinstance(t, (CenterCrop, Resize))), None)
    if size is None or (size.height, size.width) != (tile, tile):
        made = "images of any size" if size is None else f"{size.height}×{size.width} px"
        raise ConfigError(
            f"{source.folder}: the image processor makes {made}, the vision tower takes {tile}×{tile} px",
            "use the preprocessor_config.json that belongs to this model",
        )
    _check_tokens(source, processor, vision)
    return ImageSpec(transforms, ImagePrompt(processor.image_token, token_id, vision.tokens, "{image}"), tile, tile)


def _transforms(processor: Any, source: Source) -> tuple[Transform, ...]:
    resample, size, crop = resample_name(processor.resample), processor.size, processor.crop_size
    transforms: list[Transform] = []
    if getattr(processor, "do_pad", False):
        if not hasattr(processor, "pad_to_square"):
            raise ConfigError(f"{source.folder}: do_pad = True", "only LlavaImageProcessor pads")
        transforms.append(PadToSquare(tuple(int(value * 255) for value in processor.image_mean)))
    if processor.do_resize and size.height and size.width:
        transforms.append(Resize(size.height, size.width, resample))
    elif processor.do_resize and size.shortest_edge and not size.longest_edge:
        transforms.append(ResizeShortestEdge(size.shortest_edge, resample))
    elif processor.do_resize:
        raise ConfigError(
            f"{source.folder}: the image processor's size = {dict(size)}",
            "supported: shortest_edge, or height and width",
        )
    if processor.do_center_crop:
        transforms.append(CenterCrop(crop.height, crop.width))
    return (*transforms, *value_transforms(processor))


def _check_tokens(source: Source, processor: Any, vision: _Vision) -> None:
    """What the processor's file states must give the features' number; the reference fails otherwise, when it runs."""
    patches = (vision.config.tile // processor.patch_size) ** 2
    less = processor.vision_feature_select_strategy == "default"
    tokens = patches + processor.num_additional_image_tokens - less
    if tokens != vision.tokens:
        raise ConfigError(
            f"{source.folder / 'processor_config.json'}: patch_size, num_additional_image_tokens and "
            f"vision_feature_select_strategy give {tokens} tokens for an image, the model makes {vision.tokens}",
            "use the processor files that belong to this model",
        )
