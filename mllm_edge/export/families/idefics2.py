"""Idefics2: SigLIP tower over pictures in their own size, Perceiver resampler, Mistral decoder.

An image is cut into quarters, with the whole behind them, or stays one picture; each is scaled between two bounds, and
becomes one token per latent. What is no whole patch is left out, as the reference's mask hides it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, load_processor, require_switched_on, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.masked_patches import of_pictures, patches_of, shown_pixels
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import cell_components
from mllm_edge.spec import FitPatches, ImagePrompt, ImageSpec, LearnedPositions, Patchify

if TYPE_CHECKING:
    from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = ["FAMILY"]

_VISION, _POSITIONS = "model.vision_model.", "vision_positions.npy"
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{{ 'Assistant:' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.modules import ACTIVATIONS
    from mllm_edge.export.vision.perceiver import PerceiverConfig, PerceiverConnector
    from mllm_edge.export.vision.siglip import SiglipConfig
    from mllm_edge.export.vision.siglip2 import Siglip2Tower

    weights, text_hidden, text = checkpoint.weights, checkpoint.decoder.hidden_size, checkpoint.config.text_config
    checkpoint.top.take("perceiver_config")
    settings, where = checkpoint.config.perceiver_config, checkpoint.source.folder / "config.json"
    reader = ConfigReader(f"{where} perceiver_config", settings.to_dict(), type(settings)().to_dict())
    tower = SiglipConfig.read(checkpoint.vision)
    if text.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"{where} text_config: hidden_act = {text.hidden_act!r}", f"supported: {ACTIVATIONS}")
    connector = PerceiverConfig.read(reader, tower.hidden_size, text.intermediate_size, text.hidden_act)
    reader.finish()
    image = _image_spec(checkpoint, tower, connector.latents)
    table = weights.use(f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, tower.hidden_size))
    name, shape = "embeddings.patch_embedding.weight", (tower.hidden_size, tower.channels, tower.patch, tower.patch)
    kernel = weights.use(f"{_VISION}{name}", shape)
    traced = cell_components(
        lambda: Siglip2Tower(tower, 1),
        lambda: PerceiverConnector(connector),
        image,
        (tower.hidden_size, text_hidden),
        (_VISION, "model.connector."),
        {name: lambda: kernel().reshape(tower.hidden_size, -1)},
    )
    return Parts(traced, image, markers=(image.prompt.border,), arrays={_POSITIONS: table})


def _load_processor(source: Source) -> Any:
    return load_processor(source, "Idefics2Processor", ("Idefics2ImageProcessor",), _TEMPLATE)


def _image_spec(checkpoint: Checkpoint, tower: "SiglipConfig", latents: int) -> ImageSpec:
    from mllm_edge.export.vision.siglip import bounds

    source, processor, settings = checkpoint.source, checkpoint.processor, checkpoint.processor.image_processor
    require_switched_on(source, settings, "do_convert_rgb", "do_resize", "do_pad")
    shortest, longest, patch = settings.size.shortest_edge, settings.size.longest_edge, tower.patch
    if not shortest or not longest or not patch <= shortest <= longest:
        raise ConfigError(
            f"{source.folder}: the image processor's size = {dict(settings.size)}, patches are of {patch} px",
            OWN_PROCESSOR,
        )
    require_tokens(source, f"image_seq_len = {processor.image_seq_len}", processor.image_seq_len, latents)
    fake = processor.fake_image_token
    prompt = ImagePrompt(
        processor.image_token,
        checkpoint.token_id,
        single=f"{fake}{{image}}{fake}",
        tile=f"{fake}{{image}}",
        overview=f"{fake}{{image}}{fake}",
        border=fake,
    )
    quarters = bool(settings.do_image_splitting)
    fitted = FitPatches(shortest, longest, patch, quarters, resample_name(settings.resample))
    positions = LearnedPositions(_POSITIONS, tower.grid, tower.hidden_size, bounds=bounds(tower.grid))
    transforms = (fitted, *value_transforms(settings), Patchify(patch, 1, 1))
    return ImageSpec(transforms, prompt, patch, patch, latents, tables=(positions,), resampled=True)


# ---------------------------------------------------------------- the reference
def _whole_patches(model: Any, mask: Any) -> Any:
    """Which patches [pictures, rows, columns] are a picture's, of a mask of pixels [1, pictures, height, width]."""
    return shown_pixels(mask[0], model.config.vision_config.patch_size).all(-1)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    mask = inputs["pixel_attention_mask"]
    found = model.model.get_image_features(inputs["pixel_values"], mask, return_dict=True)
    hidden = torch.cat([*of_pictures(found.last_hidden_state, _whole_patches(model, mask))])
    return hidden[:, None], torch.cat(list(found.pooler_output))


def _pixel_values(model: Any, inputs: Mapping[str, Any]) -> Any:
    import torch

    patches = patches_of(inputs["pixel_values"][0], model.config.vision_config.patch_size)
    return torch.cat([*of_pictures(patches, _whole_patches(model, inputs["pixel_attention_mask"]))])


FAMILY = Family(
    name="idefics2",
    model_types=("idefics2",),
    decoders=("mistral",),
    examples=("HuggingFaceM4/idefics2-8b",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    pixel_values=_pixel_values,
    text="model.text_model",
)
