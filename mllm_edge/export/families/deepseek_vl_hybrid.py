"""DeepSeek-VL 7B: each image is seen by SigLIP in small and by Segment Anything's encoder in large; Llama decoder.

The small image is made of the large one, both padded to squares; an aligner joins the two towers' features, place by
place.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from mllm_edge.export.checkpoint.config import ConfigReader, load_config
from mllm_edge.export.checkpoint.processor import load_processor, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.deepseek_images import TEMPLATE, fitted, require_siglip
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import TracedComponent
from mllm_edge.spec import PIXELS, ImagePrompt, ImageSpec, Stage, TensorSpec, View

__all__ = ["FAMILY"]

_HIGH = "high_res_pixel_values"


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.deepseek import HybridAligner, HybridTowers, hybrid_derived
    from mllm_edge.export.vision.sam import SamConfig
    from mllm_edge.export.vision.siglip import SiglipConfig

    require_siglip(checkpoint)
    vision, high_res = checkpoint.vision, _high_res(checkpoint)
    tower, sam, text_hidden = SiglipConfig.read(vision), SamConfig.read(high_res), checkpoint.decoder.hidden_size
    vision.take("vision_use_head")  # nothing here looks at what it pools
    high_res.finish()
    tokens, wide = tower.patches**2, 4 * sam.outputs
    seen, high = _tensor("vision_hidden", tokens, tower.hidden_size), _tensor("high_res_hidden", tokens, wide)
    traced = (
        TracedComponent(
            Stage("vision_encoder", "vision", "image"),
            lambda: HybridTowers(tower, sam),
            (_tensor(PIXELS, 3, tower.tile, tower.tile), _tensor(_HIGH, 3, sam.tile, sam.tile)),
            (seen, high),
            "model.",
            hybrid_derived(tower, sam, checkpoint.weights, "model."),
        ),
        TracedComponent(
            Stage("connector", "connector", "image"),
            lambda: HybridAligner(tower.hidden_size, wide, text_hidden),
            (seen, high),
            (_tensor("image_features", tokens, text_hidden),),
            "model.aligner.",
        ),
    )
    return Parts(traced, _image_spec(checkpoint, tower.tile, sam.tile, tokens), ("model.vision_model.head.",))


def _high_res(checkpoint: Checkpoint) -> ConfigReader:
    """The settings of the encoder of large images."""
    settings, where = checkpoint.config.high_res_vision_config, checkpoint.source.folder / "config.json"
    checkpoint.top.take("high_res_vision_config")
    return ConfigReader(f"{where} high_res_vision_config", settings.to_dict(), type(settings)().to_dict())


def _tensor(name: str, *shape: int) -> TensorSpec:
    """Of one image."""
    return TensorSpec(name, "float32", (1, *shape))


def _load_processor(source: Source) -> Any:
    vision = load_config(source).vision_config
    patches = vision.image_size // vision.patch_size
    return load_processor(
        source,
        "DeepseekVLHybridProcessor",
        ("DeepseekVLHybridImageProcessor",),
        TEMPLATE,
        lambda _: {"num_image_tokens": patches**2},
    )


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs[PIXELS], inputs[_HIGH], return_dict=True)
    return found.last_hidden_state, torch.cat(list(found.pooler_output))


def _image_spec(checkpoint: Checkpoint, tile: int, large: int, tokens: int) -> ImageSpec:
    source, processor = checkpoint.source, checkpoint.processor
    low, high = processor.image_processor, _of_large(processor.image_processor)
    require_tile(source, (low.size.height, low.size.width), tile)
    require_tile(source, (high.size.height, high.size.width), large)
    require_tokens(source, f"num_image_tokens = {processor.num_image_tokens}", processor.num_image_tokens, tokens)
    of_large = fitted(source, high)
    prompt = ImagePrompt(processor.image_token, checkpoint.token_id, "{image}")
    # The small image is made of the large one, before values are computed.
    transforms = *of_large[:-2], *fitted(source, low)
    return ImageSpec(transforms, prompt, tile, tile, tokens, views=(View(_HIGH, of_large, large, large),))


def _of_large(settings: Any) -> Any:
    """An image processor's settings (transformers' object) for large images, under the names of those for small."""
    shared = ("do_resize", "do_pad", "min_size", "do_rescale", "rescale_factor", "do_normalize")
    own = ("size", "resample", "image_mean", "image_std", "background_color")
    return SimpleNamespace(
        **{key: getattr(settings, key) for key in shared}, **{key: getattr(settings, f"high_res_{key}") for key in own}
    )


FAMILY = Family(
    name="deepseek_vl_hybrid",
    model_types=("deepseek_vl_hybrid",),
    decoders=("llama",),
    examples=("deepseek-community/deepseek-vl-7b-chat",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
)
