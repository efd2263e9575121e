"""What LLaVA and its successors share: a CLIP or SigLIP tower, hidden states from inside it, a connector of two layers.

Those that fit an image into the best of many resolutions share these, and the learned feature that ends a row, too.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import load_config
from mllm_edge.export.checkpoint.image_settings import made_size, single_transforms
from mllm_edge.export.checkpoint.processing import read_video_settings
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, load_processor, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.video_settings import frame_sampling
from mllm_edge.export.family import Checkpoint
from mllm_edge.export.plan import TracedComponent, tile_components
from mllm_edge.spec import ImagePrompt, ImageSpec, VideoSpec

if TYPE_CHECKING:
    from mllm_edge.export.vision.siglip import SiglipConfig, Taps

__all__ = [
    "CLIP",
    "NEWLINE",
    "SIGLIP",
    "SINGLE",
    "TEMPLATE",
    "VIDEO_NOTE",
    "LlavaVision",
    "clip_like",
    "drops_first",
    "newline_array",
    "read_llava_processor",
    "read_resolutions",
    "read_video_spec",
    "read_vision",
    "require_square",
    "single_image_spec",
    "stated_tokens",
    "tapped_states",
    "with_text_config",
]

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
NEWLINE = "image_newline.npy"
# Image processors that make one tile of an image.
SINGLE = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
_VISION, _CONNECTOR = "model.vision_tower.", "model.multi_modal_projector."
_STRATEGY = "vision_feature_select_strategy"
VIDEO_NOTE = (
    "videos are compared from their frames' pixels on: transformers' video processor, which needs torchvision, is not"
)
# What CLIP's image processor has settings for.
_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
# Vicuna's form, for checkpoints that come without a template: images first, then videos, then the text.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper + ': ' if message['role'] != 'system' else '' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


# ---------------------------------------------------------------- tower and connector
@dataclass(frozen=True)
class LlavaVision:
    """Which states of which tower go through which connector. Each tile of `tile` px becomes `tokens` features."""

    tower: "SiglipConfig"
    taps: "Taps"
    clip: bool
    hidden: int
    activation: str
    bias: bool
    norm_eps: float | None

    @property
    def tile(self) -> int:
        """The side in px of the images that the tower sees."""
        return self.tower.tile

    @property
    def tokens(self) -> int:
        """Features of a tile."""
        return self.tower.patches**2 + self.clip - self.taps.skip

    def components(
        self,
        checkpoint: Checkpoint,
        shows: Literal["image", "video"] | None = None,
        tower: str = _VISION,
        pool: int = 1,
    ) -> tuple[TracedComponent, TracedComponent]:
        """The tower at `tower` and the connector, to be traced: for images, for videos, or for both; `pool`: see
        `MlpConnector`."""
        from mllm_edge.export.vision.clip import ClipFeatures, MlpConnector
        from mllm_edge.export.vision.siglip import SiglipFeatures

        config, taps, hidden = self.tower, self.taps, self.hidden
        activation, bias, norm_eps = self.activation, self.bias, self.norm_eps
        module, width = ClipFeatures if self.clip else SiglipFeatures, config.hidden_size * len(taps.states)
        traced = tile_components(
            lambda: module(config, taps),
            lambda: MlpConnector(width, hidden, activation, bias, norm_eps, pool),
            (config.channels, config.tile, config.tile),
            (self.tokens, width),
            (self.tokens // pool**2, hidden),
            (tower, _CONNECTOR),
            {"embeddings.positions": self._positions(checkpoint, tower)},
        )
        names = ("video_encoder", "video_connector") if shows == "video" else ("vision_encoder", "connector")
        encoder, connector = (
            replace(part, stage=replace(part.stage, component=name, shows=shows))
            for part, name in zip(traced, names, strict=True)
        )
        return encoder, connector

    def ignored(self, checkpoint: Checkpoint, tower: str = _VISION) -> tuple[str, ...]:
        """Layers behind the last tap, the tower's own last norm and its head."""
        behind = range(self.tower.layers, checkpoint.config.vision_config.num_hidden_layers)
        parts = (*(f"encoder.layers.{i}." for i in behind), "post_layernorm.", "head.")
        return tuple(tower + part for part in parts)

    def _positions(self, checkpoint: Checkpoint, tower: str) -> Callable[[], np.ndarray]:
        """Position embeddings; CLIP's class token is the same for all images, so it joins its own position."""
        table, size = f"{tower}embeddings.position_embedding.weight", self.tower.hidden_size
        if not self.clip:
            return checkpoint.weights.use(table, (self.tower.grid**2, size))
        token = f"{tower}embeddings.class_embedding"
        return checkpoint.weights.with_row(table, (1 + self.tower.grid**2, size), token, (size,))


def read_vision(
    checkpoint: Checkpoint,
    skip: bool,
    towers: Collection[str] = (CLIP, SIGLIP),
    bias: bool = True,
    norm_eps: float | None = None,
) -> LlavaVision:
    """Tower and connector; `skip`: without the first position of a tile, `norm_eps`: of the connector's own norm, where
    it has one. Raises ConfigError for a tower that is none of `towers`, and for values that nobody handles."""
    from mllm_edge.export.vision.modules import ACTIVATIONS
    from mllm_edge.export.vision.siglip import SiglipConfig, Taps

    top, vision, kind = checkpoint.top, checkpoint.vision, checkpoint.config.vision_config.model_type
    if kind not in towers:
        where = checkpoint.source.folder / "config.json"
        raise ConfigError(f"{where}: vision_config.model_type = {kind!r}", f"supported: {', '.join(towers)}")
    taps = Taps.read(top, vision.take("num_hidden_layers"), int(skip))
    tower = SiglipConfig.read(vision, layers=max(taps.states))
    for unused in ("projection_dim", "vision_use_head", "initializer_factor"):  # of the tower's other uses
        vision.take(unused)
    activation = top.require("projector_hidden_act", *ACTIVATIONS)
    return LlavaVision(tower, taps, kind == CLIP, checkpoint.decoder.hidden_size, activation, bias, norm_eps)


def drops_first(checkpoint: Checkpoint) -> bool:
    """Whether the model leaves out the first position of a tile."""
    return bool(checkpoint.top.require(_STRATEGY, "default", "full") == "default")


def tapped_states(model: Any, found: Any, skip: bool) -> Any:
    """Of the reference's outputs of a tower the states that its connector gets, [N, S, D · taps]."""
    import torch

    layers = model.config.vision_feature_layer
    states = [found.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
    return torch.cat([state[:, int(skip) :] for state in states], -1)


# ---------------------------------------------------------------- processor
def with_text_config(source: Source) -> Source:
    """The source as it is; raises ConfigError for a checkpoint of the original LLaVA code."""
    if "text_config" not in source.config:
        raise ConfigError(
            f"{source.folder / 'config.json'}: no text_config: this is not a checkpoint of transformers' own classes",
            "checkpoints of the original LLaVA code have conversions on the hub, such as llava-hf/llava-1.5-7b-hf",
        )
    return source


def read_llava_processor(source: Source, name: str, images: Collection[str], template: str) -> Any:
    """transformers' processor of class `name` over an image processor out of `images`."""
    config = load_config(source)
    return load_processor(
        source,
        name,
        images,
        template,
        lambda _: {
            "patch_size": config.vision_config.patch_size,
            _STRATEGY: getattr(config, _STRATEGY, "default"),
            "num_additional_image_tokens": int(config.vision_config.model_type == CLIP),
        },
    )


def stated_tokens(checkpoint: Checkpoint, tile: int, tokens: int) -> None:
    """Raise ConfigError unless what the processor's file states gives the features' number of a tile; the reference
    fails otherwise, when it runs."""
    processor = checkpoint.processor
    less = processor.vision_feature_select_strategy == "default"
    stated = (tile // processor.patch_size) ** 2 + processor.num_additional_image_tokens - less
    settings = f"patch_size, num_additional_image_tokens and {_STRATEGY}"
    require_tokens(checkpoint.source, f"{settings} give {stated} tokens for an image", stated, tokens)


def clip_like(settings: Mapping[str, Any]) -> Any:
    """transformers' image processor of CLIP with the settings of another that does the same."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**{key: value for key, value in settings.items() if key in _SETTINGS})


def single_image_spec(checkpoint: Checkpoint, tile: int, tokens: int, images: Any = None, *reserved: str) -> ImageSpec:
    """Each image is one tile, its placeholder repeated once per feature. `images`: the image processor, where it is not
    the processor's; `reserved`: see `ImagePrompt`."""
    source, processor = checkpoint.source, checkpoint.processor
    transforms = single_transforms(source, processor.image_processor if images is None else images)
    require_tile(source, made_size(transforms), tile)
    stated_tokens(checkpoint, tile, tokens)
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, "{image}", reserved=reserved)
    return ImageSpec(transforms, prompt, tile, tile, tokens)


# ---------------------------------------------------------------- videos
def read_video_spec(
    checkpoint: Checkpoint,
    processor: str,
    tile: int,
    features: int,
    key: str = "video_token_index",
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> VideoSpec | None:
    """Videos whose frames become so many tokens each, by the settings of a video `processor` that sees them as CLIP's
    sees images; `defaults` are its own, where they differ from CLIP's. `key`: what config.json calls the placeholder.
    None for a folder without such settings, which transformers does not open for videos either."""
    source, token_id = checkpoint.source, checkpoint.top.take(key)
    stated = read_video_settings(source, processor)
    if stated is None:
        return None
    token, found = checkpoint.processor.video_token, checkpoint.processor.video_token_id
    if found != token_id:
        raise ConfigError(
            f"{source.folder / 'config.json'}: {key} = {token_id}, the tokenizer has {found} for {token}",
            "use the config.json and the tokenizer that belong to this model",
        )
    transforms = single_transforms(source, clip_like({**defaults, **stated}))
    require_tile(source, made_size(transforms), tile)
    sampling = frame_sampling(source, SimpleNamespace(**stated))
    return VideoSpec(transforms, token, token_id, features=features, sampling=sampling)


# ---------------------------------------------------------------- images of many resolutions
def read_resolutions(checkpoint: Checkpoint, tile: int) -> tuple[tuple[int, int], ...]:
    """The resolutions (height, width) that images are fitted into, whole tiles each; raises ConfigError where model and
    image processor do not agree about them."""
    source, settings = checkpoint.source, checkpoint.processor.image_processor
    resolutions = tuple((height, width) for height, width in settings.image_grid_pinpoints)
    if list(resolutions) != [tuple(size) for size in checkpoint.top.take("image_grid_pinpoints")]:
        raise ConfigError(f"{source.folder}: image_grid_pinpoints of model and image processor differ", OWN_PROCESSOR)
    if not resolutions or any(height % tile or width % tile for height, width in resolutions):
        raise ConfigError(
            f"{source.folder}: image_grid_pinpoints are no multiples of the vision tower's {tile} px", OWN_PROCESSOR
        )
    return resolutions


def require_square(checkpoint: Checkpoint, seen: LlavaVision) -> None:
    """Raise ConfigError unless a tile's features are a square, as its patches: the reference fails otherwise."""
    if seen.tokens != seen.tower.patches**2:
        stated = getattr(checkpoint.config, _STRATEGY)
        kind, wanted = (CLIP, "default") if seen.clip else (SIGLIP, "full")
        raise ConfigError(
            f"config.json: {_STRATEGY} = {stated!r} makes {seen.tokens} features of a tile, no square",
            f"supported: {wanted!r} with a {kind}",
        )


def newline_array(checkpoint: Checkpoint) -> Mapping[str, Callable[[], np.ndarray]]:
    """The feature that ends a row, [1, H], by its file."""
    row = checkpoint.weights.use("model.image_newline", (checkpoint.decoder.hidden_size,))
    return {NEWLINE: lambda: row()[None]}
