"""Aria: SigLIP tower over an image in its own aspect ratio, queries that look at its patches, a decoder of experts.

An image's longer side is always 980 px. The reference fills it up to a square and hides the patches that lie beyond it
altogether; here they are left out.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, load_processor, require_switched_on, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.masked_patches import of_pictures, patches_of, shown_pixels
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import cell_components
from mllm_edge.spec import ImagePrompt, ImageSpec, LearnedPositions, PadToMultiple, Patchify, ResizeToSide

if TYPE_CHECKING:
    from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = ["FAMILY"]

_VISION, _CONNECTOR, _POSITIONS = "model.vision_tower.", "model.multi_modal_projector.", "vision_positions.npy"
_AROUND = ("<fim_prefix>", "<fim_suffix>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<fim_prefix><|img|><fim_suffix>' }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.aria import AriaConnector, aria_derived
    from mllm_edge.export.vision.siglip import SiglipConfig
    from mllm_edge.export.vision.siglip2 import Siglip2Tower

    weights, text_hidden = checkpoint.weights, checkpoint.decoder.hidden_size
    side = _side(checkpoint)
    checkpoint.top.require("vision_feature_layer", -1)
    tower = SiglipConfig.read(checkpoint.vision, side)
    width, patches = tower.hidden_size, tower.patches**2
    queries = checkpoint.top.take("projector_patch_to_query_dict")
    if patches not in queries:
        raise ConfigError(
            f"{checkpoint.source.folder / 'config.json'}: projector_patch_to_query_dict = {queries!r} has no number of "
            f"queries for {patches} patches, those of images of {side} px",
            OWN_CONFIG,
        )
    checkpoint.top.take("max_value_projector_patch_to_query_dict")
    tokens, stored = queries[patches], max(queries.values())
    image = _image_spec(checkpoint, tower, tokens)
    table = weights.use(f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, width))
    name, shape = "embeddings.patch_embedding.weight", (width, tower.channels, tower.patch, tower.patch)
    kernel = weights.use(f"{_VISION}{name}", shape)
    traced = cell_components(
        lambda: Siglip2Tower(tower, 1, normed=False),
        lambda: AriaConnector(width, tower.heads, tokens, text_hidden),
        image,
        (width, text_hidden),
        (_VISION, _CONNECTOR),
        {name: lambda: kernel().reshape(width, -1)},
        of_connector=aria_derived(weights, _CONNECTOR, width, stored, tokens),
    )
    return Parts(traced, image, (f"{_VISION}post_layernorm.",), arrays={_POSITIONS: table})


def _load_processor(source: Source) -> Any:
    return load_processor(source, "AriaProcessor", ("AriaImageProcessor",), _TEMPLATE)


def _side(checkpoint: Checkpoint) -> int:
    """The longer side of every image in px. transformers' processor goes by settings of its own, whatever those of the
    image processor are."""
    source, processor = checkpoint.source, checkpoint.processor
    for key, used in processor.images_kwargs.items():
        stated = getattr(processor.image_processor, key)
        if stated != used:
            raise ConfigError(
                f"{source.folder}: the image processor's {key} is {stated!r}, and transformers uses {used!r} all the "
                "same",
                f"set {key} to {used!r}",
            )
    return int(processor.images_kwargs["max_image_size"])


def _image_spec(checkpoint: Checkpoint, tower: "SiglipConfig", tokens: int) -> ImageSpec:
    from mllm_edge.export.vision.siglip import bounds

    source, processor, settings = checkpoint.source, checkpoint.processor, checkpoint.processor.image_processor
    require_switched_on(source, settings, "do_convert_rgb")
    least, sizes = settings.min_image_size, processor.size_conversion
    if not isinstance(least, int) or not 1 <= least <= tower.tile:
        raise ConfigError(f"{source.folder}: the image processor's min_image_size is {least!r}", OWN_PROCESSOR)
    require_tokens(source, f"size_conversion = {sizes}", sizes.get(tower.tile, 0), tokens)
    transforms = (
        ResizeToSide(tower.tile, least, resample_name(settings.resample), truncated=True),
        PadToMultiple(tower.patch, (0,) * 3),
        *value_transforms(settings),
        Patchify(tower.patch, 1, 1),
    )
    before, behind = _AROUND
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, "{image}", inline=f"{before}{{image}}{behind}")
    positions = LearnedPositions(_POSITIONS, tower.grid, tower.hidden_size, bounds=bounds(tower.grid))
    return ImageSpec(transforms, prompt, tower.patch, tower.patch, tokens, tables=(positions,), resampled=True)


# ---------------------------------------------------------------- the reference
def _shown(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Which patches [pictures, rows, columns] show anything of a picture."""
    return shown_pixels(inputs["pixel_mask"], model.config.vision_config.patch_size).any(-1)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"], return_dict=True)
    hidden = torch.cat([*of_pictures(found.hidden_states[-1], _shown(model, inputs))])
    return hidden[:, None], found.pooler_output.flatten(0, 1)


def _pixel_values(model: Any, inputs: Mapping[str, Any]) -> Any:
    import torch

    patches = patches_of(inputs["pixel_values"], model.config.vision_config.patch_size)
    return torch.cat([*of_pictures(patches, _shown(model, inputs))])


FAMILY = Family(
    name="aria",
    model_types=("aria",),
    decoders=("aria_text",),
    examples=("rhymes-ai/Aria",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    pixel_values=_pixel_values,
    image_token="image_token_index",
)
