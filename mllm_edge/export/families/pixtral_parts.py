"""What the successors of Pixtral share: its tower, a connector that merges patches, images that keep their shape."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, require_switched_on
from mllm_edge.export.family import Checkpoint
from mllm_edge.export.plan import TracedComponent, cell_components
from mllm_edge.spec import GridMerge, ImagePrompt, ImageSpec, Patchify, ResizeWithin

if TYPE_CHECKING:
    from mllm_edge.export.vision.pixtral import PixtralConfig

__all__ = ["pixtral_components", "pixtral_image", "pixtral_pixels", "read_pixtral"]

_PIXTRAL = "pixtral"


def read_pixtral(checkpoint: Checkpoint) -> "PixtralConfig":
    """The tower; raises ConfigError for another one."""
    from mllm_edge.export.vision.pixtral import PixtralConfig

    kind, where = checkpoint.config.vision_config.model_type, checkpoint.source.folder / "config.json"
    if kind != _PIXTRAL:
        raise ConfigError(f"{where}: vision_config.model_type = {kind!r}", f"supported: {_PIXTRAL}")
    return PixtralConfig.read(checkpoint.vision)


def pixtral_components(
    checkpoint: Checkpoint,
    tower: "PixtralConfig",
    image: ImageSpec,
    prefixes: tuple[str, str],
    activation: str,
    bias: bool,
) -> tuple[TracedComponent, TracedComponent]:
    """Tower and connector, which stand under `prefixes`; `activation` and `bias` are the connector's."""
    from mllm_edge.export.vision.pixtral import MergingConnector, PixtralTower, merger_derived, pixtral_derived

    weights, side, size = checkpoint.weights, image.merged, tower.hidden_size
    text_hidden, eps = checkpoint.decoder.hidden_size, checkpoint.decoder.norm.eps
    encoder, connector = cell_components(
        lambda: PixtralTower(tower),
        lambda: MergingConnector(side, size, text_hidden, activation, bias, eps),
        image,
        (size, text_hidden),
        prefixes,
        pixtral_derived(tower, weights, prefixes[0]),
    )
    return encoder, replace(connector, derived=merger_derived(weights, prefixes[1], side, size))


def pixtral_image(checkpoint: Checkpoint, tower: "PixtralConfig", prompt: ImagePrompt, multiple: int) -> ImageSpec:
    """Images as patches, of which `spatial_merge_size`² become one feature; both sides are multiples of `multiple` px.
    Raises ConfigError where the image processor makes others."""
    source, processor, images = checkpoint.source, checkpoint.processor, checkpoint.processor.image_processor
    side = checkpoint.top.positive("spatial_merge_size")
    for key, value in (("patch_size", tower.patch), ("spatial_merge_size", side)):
        stated = getattr(processor, key)
        if stated != value:
            raise ConfigError(
                f"{source.folder / 'processor_config.json'}: {key} = {stated!r}, the model's is {value}", OWN_CONFIG
            )
    require_switched_on(source, images, "do_convert_rgb", "do_resize")
    longest = dict(images.size).get("longest_edge")
    if images.do_center_crop or not isinstance(longest, int) or longest < multiple:
        raise ConfigError(
            f"{source.folder}: the image processor's size is {dict(images.size)}, do_center_crop "
            f"{images.do_center_crop}",
            f"supported: a longest_edge of {multiple} px at least, and no crop",
        )
    if multiple % tower.patch:
        raise ConfigError(
            f"{source.folder}: the image processor makes multiples of {multiple} px, patches have {tower.patch}",
            OWN_PROCESSOR,
        )
    transforms = (
        ResizeWithin(multiple, longest, resample_name(images.resample)),
        *value_transforms(images),
        Patchify(tower.patch, 1, 1),
    )
    return ImageSpec(transforms, prompt, tower.patch, tower.patch, features=1, tables=(tower.rope, GridMerge(side)))


def pixtral_pixels(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Without what fills smaller images up to the largest: patches [patches, 1, C · patch²] of all images."""
    import torch

    patch, found = model.config.vision_config.patch_size, []
    for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
        height, width = map(int, size)
        rows = pixels[:, :height, :width].unflatten(2, (-1, patch)).unflatten(1, (-1, patch))
        found.append(rows.permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1))
    return torch.cat(found).unsqueeze(1)
