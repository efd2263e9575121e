"""Granite 4 Vision: LLaVA-NeXT's images and tower, Q-Formers over windows of several layers' patches, whose features
are added before layers of a Granite decoder.

Features before layer 0 take the places of the image tokens; those before a later one are added behind the layer before.
"""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG, ConfigReader, load_config
from mllm_edge.export.checkpoint.processor import load_processor, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.llava_next import packed_tiles, pixel_values
from mllm_edge.export.families.llava_parts import (
    CLIP,
    drops_first,
    newline_array,
    read_vision,
    require_square,
    with_text_config,
)
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.reference import load_reference
from mllm_edge.spec import DEEPSTACK, TensorSpec

if TYPE_CHECKING:
    from mllm_edge.export.vision.granite4_vision import Projector

__all__ = ["FAMILY", "with_cache"]

_LAYERWISE, _SPATIAL = "layerwise_projectors", "spatial_projectors"
_STRATEGY = "vision_feature_select_strategy"
# For checkpoints that come without a template.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>\n' }}{% endfor %}"
    "{% endif %}{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from transformers import Blip2QFormerConfig

    from mllm_edge.export.vision.granite4_vision import QFormerConfig, WindowConfig, WindowConnector, window_derived

    top, decoder = checkpoint.top, checkpoint.decoder
    for unused in ("projector_dropout", "image_seq_length", "projector_hidden_act", "multimodal_projector_bias"):
        top.take(unused)  # of training; what LLaVA-NeXT has and this model has not
    seen = read_vision(checkpoint, drops_first(checkpoint))
    states, projectors = _projectors(checkpoint)
    seen = replace(seen, taps=replace(seen.taps, states=states), tower=replace(seen.tower, layers=max(states)))
    require_square(checkpoint, seen)
    stated = ConfigReader(
        f"{checkpoint.source.folder / 'config.json'} qformer_config",
        top.take("qformer_config"),
        Blip2QFormerConfig().to_dict(),
    )
    side, width = seen.tower.patches, seen.tower.hidden_size
    query, window = _rate(checkpoint, side)
    qformer = QFormerConfig.read(stated, width)
    stated.finish()
    config = WindowConfig(qformer, width, decoder.hidden_size, side, window, query, projectors)
    encoder, connector = seen.components(checkpoint)
    shape, names = ("tiles", config.features**2, decoder.hidden_size), [_output(p) for p in projectors]
    connector = replace(
        connector,
        module=lambda: WindowConnector(config),
        outputs=tuple(TensorSpec(name, "float32", shape) for name in names),
        prefix="model.",
        derived=window_derived(config, _SPATIAL),
    )
    _require_tokens(checkpoint, seen.tile, config.features**2)
    image = packed_tiles(checkpoint, seen.tile, config.features**2)
    return Parts((encoder, connector), image, seen.ignored(checkpoint), arrays=newline_array(checkpoint))


def _output(projector: "Projector") -> str:
    return f"{DEEPSTACK}{projector.layer - 1}" if projector.layer else "image_features"


def _projectors(checkpoint: Checkpoint) -> tuple[tuple[int, ...], tuple["Projector", ...]]:
    """The tower's states that are seen, and what looks at them, by the decoder's layers; raises ConfigError."""
    from mllm_edge.export.vision.granite4_vision import Projector

    top, layers = checkpoint.top, checkpoint.config.vision_config.num_hidden_layers
    pairs, targets = top.take("deepstack_layer_map") or [], list(top.take("spatial_target_layers"))
    spatial = top.take("spatial_vision_layer")
    chosen = [*(vision for vision, _ in pairs), spatial]
    if any(not -layers - 1 <= layer <= layers for layer in chosen):
        raise ConfigError(f"config.json: layers {chosen} of the tower, which has {layers}", OWN_CONFIG)
    behind = [*(layer for _, layer in pairs), *targets]
    if len(targets) != 4 or sorted(set(behind)) != sorted(behind) or min(behind) != 0:
        raise ConfigError(
            f"config.json: deepstack_layer_map = {pairs!r}, spatial_target_layers = {targets!r}",
            "supported: four spatial layers, each layer of the decoder once, layer 0 among them",
        )
    if max(behind) >= checkpoint.decoder.layers:
        raise ConfigError(f"config.json: features for layers {behind} of {checkpoint.decoder.layers}", OWN_CONFIG)
    counted = [layer % (layers + 1) for layer in chosen]
    states = tuple(dict.fromkeys(counted))
    taps = [states.index(layer) for layer in counted]
    found = [Projector(_LAYERWISE, i, taps[i], layer) for i, (_, layer) in enumerate(pairs)]
    found += [Projector(_SPATIAL, i, taps[-1], layer) for i, layer in enumerate(targets)]
    return states, tuple(sorted(found, key=lambda projector: projector.layer))


def _rate(checkpoint: Checkpoint, side: int) -> tuple[int, int]:
    """Sides of a window's features and of its patches; raises ConfigError where windows do not fit a tile of `side`
    patches, or where features are not half as many along a side, which spatial projectors make."""
    stated = checkpoint.top.take("downsample_rate")
    numbers = str(stated).split("/")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise ConfigError(f"config.json: downsample_rate = {stated!r}", 'such as "1/2" or "4/8"')
    query, window = map(int, numbers)
    if side % window or 2 * query != window:
        raise ConfigError(
            f"config.json: downsample_rate = {stated!r} for tiles of {side} patches along a side",
            "supported: windows that divide a tile, with half as many features along a side",
        )
    return query, window


def _require_tokens(checkpoint: Checkpoint, tile: int, tokens: int) -> None:
    processor = checkpoint.processor
    rate, side = Fraction(processor.downsample_rate or 1), tile // processor.patch_size
    less = processor.vision_feature_select_strategy == "default"
    stated = int(side * rate) ** 2 + processor.num_additional_image_tokens - less
    settings = f"patch_size, downsample_rate, num_additional_image_tokens and {_STRATEGY}"
    require_tokens(checkpoint.source, f"{settings} give {stated} tokens for an image", stated, tokens)


def _load_processor(source: Source) -> Any:
    config = load_config(source)
    of_model = {
        "patch_size": config.vision_config.patch_size,
        _STRATEGY: config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(config.vision_config.model_type == CLIP),
        "downsample_rate": config.downsample_rate,
    }
    return load_processor(
        source, "Granite4VisionProcessor", ("LlavaNextImageProcessor",), _TEMPLATE, lambda _: of_model
    )


def _load_model(source: Source, decoder_layers: int | None = None) -> Any:
    return with_cache(load_reference(source, decoder_layers))


def with_cache(model: Any) -> Any:
    """The reference with a cache wherever one is to be used: in transformers 5.24 this model alone makes none itself,
    and its second token would not see the first."""
    from transformers import DynamicCache

    def give(module: Any, inputs: Any, options: dict[str, Any]) -> Any:
        if options.get("use_cache") and options.get("cache") is None:
            return inputs, {**options, "cache": DynamicCache(config=module.config)}
        return None

    model.model.language_model.register_forward_pre_hook(give, with_kwargs=True)
    return model


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    config = model.config
    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    layers = config.vision_config.num_hidden_layers + 1
    chosen = [*(vision for vision, _ in config.deepstack_layer_map), config.spatial_vision_layer]
    skip = int(config.vision_feature_select_strategy == "default")
    states = [found.hidden_states[i][:, skip:] for i in dict.fromkeys(layer % layers for layer in chosen)]
    return torch.cat(states, -1), torch.cat(list(dict(found.deepstack_features)[0]))


FAMILY = Family(
    name="granite4_vision",
    model_types=("granite4_vision",),
    decoders=("granite",),
    examples=("ibm-granite/granite-4.0-3b-vision",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    load_model=_load_model,
    pixel_values=pixel_values,
    image_token="image_token_index",
    translated=with_text_config,
    decoder_type=lambda config, weights: "granite",
)
