"""PerceptionLM: the Perception Encoder over a grid of tiles and the whole image, a Llama decoder.

transformers takes the tower from timm. Of a video each frame is one tile.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.own_images import OWN_IMAGES, load_with_own_images
from mllm_edge.export.checkpoint.processor import require_switched_on, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.llava_parts import VIDEO_NOTE, read_video_spec
from mllm_edge.export.families.timm_parts import require_wrapper, with_timm
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms
from mllm_edge.spec import FillTiles, ImagePrompt, ImageSpec, Resize, Transform

if TYPE_CHECKING:
    from mllm_edge.export.vision.perception import PerceptionConfig

__all__ = ["FAMILY"]

_VISION, _TILED, _SINGLE = "model.vision_tower.timm_model.", "thumb+tile", "vanilla"
# Of transformers' class, for settings that the files leave out.
_DEFAULTS = {
    "vision_input_type": _TILED,
    "tile_size": 448,
    "max_num_tiles": 36,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Of its video processor.
_FRAMES = {
    **{key: value for key, value in _DEFAULTS.items() if key.startswith(("do_", "image_", "re"))},
    "do_center_crop": False,
    "size": {"height": 448, "width": 448},
}
# For checkpoints that come without a template: in a message images first, then videos, then the text.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<|image|>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<|video|>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] | trim }}{% endfor %}"
    "{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.clip import MlpConnector
    from mllm_edge.export.vision.perception import PerceptionConfig, PerceptionEncoder, perception_derived

    require_wrapper(checkpoint)
    tower, pool = PerceptionConfig.read(checkpoint.vision), checkpoint.top.positive("projector_pooling_ratio")
    width, text_hidden = tower.sizes.hidden_size, checkpoint.decoder.hidden_size
    where = checkpoint.source.folder / "config.json"
    if bool(checkpoint.top.take("vision_use_cls_token")) != tower.token:
        raise ConfigError(
            f"{where}: vision_use_cls_token = {not tower.token}, and the tower has {'a' if tower.token else 'no'} "
            "class token",
            OWN_CONFIG,
        )
    if tower.patches % pool:
        raise ConfigError(f"{where}: projector_pooling_ratio = {pool} of {tower.patches} patches a side", OWN_CONFIG)
    tokens = (tower.patches // pool) ** 2
    traced = tile_components(
        lambda: PerceptionEncoder(tower),
        lambda: MlpConnector(width, text_hidden, "gelu", bias=True, pool=pool, late=True),
        (3, tower.tile, tower.tile),
        (tower.patches**2, width),
        (tokens, text_hidden),
        (_VISION, "model.multi_modal_projector."),
        perception_derived(tower, checkpoint.weights, _VISION),
    )
    return Parts(traced, _image_spec(checkpoint, tower, tokens))


def _image_spec(checkpoint: Checkpoint, tower: "PerceptionConfig", tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    settings = processor.image_processor
    require_tile(source, (settings.tile_size,) * 2, tower.tile)
    side = tower.tile // processor.patch_size // processor.pooling_ratio
    require_tokens(source, f"patch_size and pooling_ratio give {side**2} tokens", side**2, tokens)
    tiled = settings.vision_input_type == _TILED
    prompt = ImagePrompt(
        processor.image_token,
        checkpoint.token_id,
        single="{image}",
        begin="{image}" if tiled else "",
        tile="{image}" if tiled else "",
        reserved=(processor.video_token,),
    )
    image = ImageSpec(_transforms(source, settings), prompt, tower.tile, tower.tile, tokens)
    video = read_video_spec(checkpoint, "PerceptionLMVideoProcessor", tower.tile, tokens, "video_token_id", _FRAMES)
    return replace(image, video=video)


def _transforms(source: Source, settings: Any) -> tuple[Transform, ...]:
    """What the image processor does; raises ConfigError for settings that nothing can be made of."""
    for key in ("tile_size", "max_num_tiles"):
        if type(value := getattr(settings, key)) is not int or value < 1:
            raise ConfigError(f"{source.folder}: the image processor's {key} is {value!r}", "expected a whole number")
    kind, tile = settings.vision_input_type, settings.tile_size
    if kind not in (_TILED, _SINGLE):
        raise ConfigError(
            f"{source.folder}: the image processor's vision_input_type is {kind!r}", f"supported: {_TILED}, {_SINGLE}"
        )
    require_switched_on(source, settings, "do_resize")
    resample = resample_name(settings.resample)
    first = FillTiles(tile, settings.max_num_tiles, resample) if kind == _TILED else Resize(tile, tile, resample)
    return (first, *value_transforms(settings))


# ---------------------------------------------------------------- the reference
def _load_processor(source: Source) -> Any:
    import torch
    from transformers import PerceptionLMProcessor

    class Complete(PerceptionLMProcessor):
        """Takes images of different numbers of tiles, too."""

        skip_tensor_conversion: Any = ("pixel_values",)

        def __call__(self, **options: Any) -> Any:
            inputs = super().__call__(**options)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = torch.cat(inputs["pixel_values"])[None]
            return inputs

    def inputs_of(settings: SimpleNamespace) -> Any:
        return partial(_model_inputs, transforms=_transforms(source, settings))

    names = ("PerceptionLMProcessor", "PerceptionLMImageProcessor")
    ratio = source.config.get("projector_pooling_ratio", 1)
    gaps = {"patch_size": 14, "pooling_ratio": ratio}
    return load_with_own_images(source, Complete, *names, _DEFAULTS, _TEMPLATE, inputs_of, **gaps)


def _model_inputs(images: list[Any], transforms: tuple[Transform, ...]) -> dict[str, Any]:
    """Of RGB images the tiles [tiles, 3, side, side] of each."""
    import torch

    return {"pixel_values": [torch.from_numpy(apply_transforms(image, transforms)) for image in images]}


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    patches = found.last_hidden_state[:, int(model.config.vision_use_cls_token) :]
    return patches, found.pooler_output.flatten(0, 1)


FAMILY = Family(
    name="perception_lm",
    model_types=("perception_lm",),
    decoders=("llama",),
    examples=("facebook/Perception-LM-1B",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    note=f"{OWN_IMAGES}; {VIDEO_NOTE}",
    translated=with_timm,
)
