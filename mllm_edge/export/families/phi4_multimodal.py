"""Phi-4 multimodal: SigLIP over tiles that an image is fitted into, four patches a token, a Phi-4-mini decoder with the
adapter that was trained for images.

Features lose what shows padding and end each row with a learned one; the whole image comes last. The parts for speech
are left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.own_images import OWN_IMAGES, load_with_own_images
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, require_tile
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.export.reference import load_reference
from mllm_edge.runtime.prompt.layout import layout_of
from mllm_edge.runtime.prompt.shown_patches import shown_patches
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, cut_of
from mllm_edge.spec import (
    FitTiles,
    ImagePrompt,
    ImageSpec,
    RowEnd,
    ShownPatches,
    TensorSpec,
    Transform,
    Trim,
    WholeBefore,
    WholeLast,
)

if TYPE_CHECKING:
    from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = ["FAMILY", "look_both_ways"]

_EMBED = "model.embed_tokens_extend.image_embed."
_VISION, _SPEECH = f"{_EMBED}img_processor.", "model.embed_tokens_extend.audio_embed."
_LAYERS = {"linear_1": "img_projection_up", "linear_2": "img_projection_down"}
_ROW_END, _SEPARATOR = "image_row_end.npy", "image_separator.npy"
# Fixed in the reference: patches along a feature's side, and the least px of an image's shorter side.
_POOL, _LEAST = 2, 10
# Of transformers' class, for settings that the files leave out.
_DEFAULTS = {
    "size": {"height": 448, "width": 448},
    "patch_size": 14,
    "dynamic_hd": 36,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# For checkpoints that come without a template.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|endoftext10|>' }}"
    "{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.clip import MlpConnector
    from mllm_edge.export.vision.phi4 import Phi4Tower
    from mllm_edge.export.vision.siglip import SiglipConfig

    source, vision, hidden = checkpoint.source, checkpoint.vision, checkpoint.decoder.hidden_size
    checkpoint.top.take("audio_config")
    source.notices.add(f"{source.folder}: the parts for speech are left out: the bundle takes images and text")
    layers, stated = vision.positive("num_hidden_layers"), vision.take("feature_layer")
    if not isinstance(stated, int) or not -layers <= stated < 0:
        raise ConfigError(
            f"{source.folder / 'config.json'}: vision_config.feature_layer = {stated!r}",
            f"supported: counted from the end, -1 to {-layers}",
        )
    run = layers + 1 + stated
    tower = SiglipConfig.read(vision, layers=run)
    crop = vision.take("crop_size")
    if crop != tower.tile or tower.patches % _POOL:
        raise ConfigError(
            f"{source.folder / 'config.json'}: vision_config.crop_size = {crop} of images of {tower.tile} px and "
            f"{tower.patches} patches a side",
            f"supported: the size of images, and a multiple of {_POOL} patches",
        )
    image, width = _image_spec(checkpoint, tower), tower.hidden_size
    encoder, connector = tile_components(
        lambda: Phi4Tower(tower),
        lambda: MlpConnector(width, hidden, "gelu", bias=True, pool=_POOL),
        (tower.channels, tower.tile, tower.tile),
        (tower.patches**2, width),
        (image.features, hidden),
        (_VISION, _EMBED),
        {},
    )
    assert image.shown is not None
    places, bias = image.shown.names
    beside = (
        TensorSpec(places, "int64", ("tiles", *image.inputs[places])),
        TensorSpec(bias, "float32", ("tiles", *image.inputs[bias])),
    )
    projection = _projection(checkpoint, width)
    traced = (replace(encoder, inputs=(*encoder.inputs, *beside)), replace(connector, derived=projection))
    behind = ("post_layernorm.", "head.", *(f"encoder.layers.{i}." for i in range(run, layers)))
    left = (*(f"{_VISION}{part}" for part in behind), _SPEECH)
    return Parts(traced, image, left, arrays=_rows(checkpoint, projection, width))


def _projection(checkpoint: Checkpoint, width: int) -> dict[str, Callable[[], np.ndarray]]:
    """The connector's parameters, which the checkpoint calls otherwise."""
    hidden, found = checkpoint.decoder.hidden_size, dict[str, Callable[[], np.ndarray]]()
    for (name, stored), inputs in zip(_LAYERS.items(), (width, hidden), strict=True):
        found[f"{name}.weight"] = checkpoint.weights.use(f"{_EMBED}{stored}.weight", (hidden, inputs))
        found[f"{name}.bias"] = checkpoint.weights.use(f"{_EMBED}{stored}.bias", (hidden,))
    return found


def _rows(
    checkpoint: Checkpoint, projection: Mapping[str, Callable[[], np.ndarray]], width: int
) -> dict[str, Callable[[], np.ndarray]]:
    """The learned features among those of patches, behind the connector, [1, H], by file."""

    def projected(row: Callable[[], np.ndarray]) -> np.ndarray:
        import torch

        first, first_bias, second, second_bias = (torch.from_numpy(read()) for read in projection.values())
        linear, hidden = torch.nn.functional.linear, torch.from_numpy(row().reshape(1, width))
        return linear(torch.nn.functional.gelu(linear(hidden, first, first_bias)), second, second_bias).numpy()

    use = checkpoint.weights.use
    end = use(f"{_EMBED}sub_img_feature_extensor", (1, 1, 1, width))
    separator = use(f"{_EMBED}global_img_feature_extensor", (1, 1, width))
    return {_ROW_END: partial(projected, end), _SEPARATOR: partial(projected, separator)}


def _image_spec(checkpoint: Checkpoint, tower: "SiglipConfig") -> ImageSpec:
    from mllm_edge.export.vision.siglip import bounds

    source, processor = checkpoint.source, checkpoint.processor
    settings = processor.image_processor
    size = _size(source, settings)
    require_tile(source, (size, size), tower.tile)
    if settings.patch_size != tower.patch:
        raise ConfigError(
            f"{source.folder}: the image processor's patch_size is {settings.patch_size!r}, the vision tower's "
            f"{tower.patch}",
            OWN_PROCESSOR,
        )
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, "{image}", reserved=(processor.audio_token,))
    return ImageSpec(
        _transforms(source, settings),
        prompt,
        tower.tile,
        tower.tile,
        (tower.patches // _POOL) ** 2,
        pack=_PACK,
        shown=ShownPatches(tower.patch, tower.grid, bounds(tower.grid)),
    )


_PACK = (Trim(_POOL), RowEnd(_ROW_END), WholeLast(_SEPARATOR))


def _size(source: Source, settings: Any) -> int:
    """The side in px of the tiles."""
    height, width = (dict(settings.size).get(key) for key in ("height", "width"))
    if type(height) is not int or height < 1 or height != width:
        raise ConfigError(f"{source.folder}: the image processor's size is {settings.size!r}", "expected a square")
    return height


def _transforms(source: Source, settings: Any) -> tuple[Transform, ...]:
    """What the image processor does; raises ConfigError for settings that nothing can be made of."""
    if type(settings.dynamic_hd) is not int or settings.dynamic_hd < 1:
        raise ConfigError(
            f"{source.folder}: the image processor's dynamic_hd is {settings.dynamic_hd!r}", "expected a whole number"
        )
    if (resample := resample_name(settings.resample)) != "bicubic":
        raise ConfigError(f"{source.folder}: the image processor's resample is {resample}", "supported: 3, bicubic")
    split = FitTiles(_size(source, settings), settings.dynamic_hd, _LEAST, "bilinear")
    return (split, *value_transforms(settings), WholeBefore())


# ---------------------------------------------------------------- the reference
def look_both_ways(model: Any) -> Any:
    """transformers' model, whose tower 5.24 lets look back alone where an image leaves nothing of its tiles empty, as
    the tower was trained: at all patches."""
    for module in model.model.embed_tokens_extend.image_embed.img_processor.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model


def _load_model(source: Source, layers: int | None) -> Any:
    return look_both_ways(load_reference(source, layers))


def _load_processor(source: Source) -> Any:
    from transformers import Phi4MultimodalProcessor

    def inputs_of(settings: SimpleNamespace) -> Any:
        return partial(_model_inputs, transforms=_transforms(source, settings), patch=settings.patch_size)

    names = ("Phi4MultimodalProcessor", "Phi4MultimodalImageProcessor")
    return load_with_own_images(source, Phi4MultimodalProcessor, *names, _DEFAULTS, _TEMPLATE, inputs_of)


def _model_inputs(images: list[Any], transforms: tuple[Transform, ...], patch: int) -> dict[str, Any]:
    """The model's inputs of RGB images: the tiles of each [images, most tiles, 3, side, side], which patches of these
    show something, the size of the tiles together; for the text the number of tokens."""
    import torch

    tiles, masks, sizes, tokens = [], [], [], []
    for image in images:
        cut = cut_of(image.height, image.width, transforms)
        down, across = cut.height // patch, cut.width // patch
        rows, cols = shown_patches(cut, patch)
        whole = torch.zeros(cut.rows * down, cut.cols * across)
        whole[:rows, :cols] = 1
        parts = whole.reshape(cut.rows, down, cut.cols, across).swapaxes(1, 2).reshape(-1, down, across)
        tiles.append(torch.from_numpy(apply_transforms(image, transforms)))
        masks.append(torch.cat([torch.ones(1, down, across), parts]))
        sizes.append([cut.rows * cut.height, cut.cols * cut.width])
        # transformers' counts as if the overview always had 16 × 16 features, which the published model's has.
        features = (down // _POOL) * (across // _POOL)
        spec = ImageSpec(transforms, ImagePrompt("<", 0, "{image}"), cut.height, cut.width, features, pack=_PACK)
        tokens.append(layout_of(spec, image.height, image.width).tokens)
    padded = torch.nn.utils.rnn.pad_sequence
    return {
        "image_pixel_values": padded(tiles, batch_first=True),
        "image_attention_mask": padded(masks, batch_first=True, padding_value=1.0),
        "image_sizes": torch.tensor(sizes),
        "num_img_tokens": tokens,
    }


def _own(model: Any, inputs: Mapping[str, Any], name: str) -> Any:
    """Of an input of tiles those that the images have, [tiles, …]."""
    import torch

    grids = (inputs["image_sizes"] // model.config.vision_config.crop_size).prod(1).tolist()
    return torch.cat([image[: 1 + count] for image, count in zip(inputs[name], grids, strict=True)])


def _pixel_values(model: Any, inputs: Mapping[str, Any]) -> Any:
    return _own(model, inputs, "image_pixel_values")


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    embed, layer = model.model.embed_tokens_extend.image_embed, model.config.vision_config.feature_layer
    mask = _own(model, inputs, "image_attention_mask").bool()
    seen = embed.img_processor(_pixel_values(model, inputs), patch_attention_mask=mask, output_hidden_states=True)
    ids = inputs["input_ids"][inputs["input_ids"] == model.config.vision_config.image_token_id][None]
    given = {name: inputs[name] for name in ("image_pixel_values", "image_sizes", "image_attention_mask")}
    found = embed(ids, torch.zeros(1, ids.shape[1], model.config.hidden_size), **given)
    return seen.hidden_states[layer], found[0]


def _decoder_type(config: Any, weights: Any) -> str:
    return "phi3"


FAMILY = Family(
    name="phi4_multimodal",
    model_types=("phi4_multimodal",),
    decoders=("phi3",),
    examples=("microsoft/Phi-4-multimodal-instruct",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    pixel_values=_pixel_values,
    note=f"{OWN_IMAGES}; transformers' tower looks back alone where an image fills its tiles: it is told not to",
    load_model=_load_model,
    text="model",
    image_token="vision_config.image_token_id",
    decoder_type=_decoder_type,
)
