"""GLM-4V (GLM-4.1V): images of any size as cells of patches, as Qwen2-VL has them, and GLM-4's decoder."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.processor import load_processor
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.families.qwen_images import (
    VISION,
    grid_rope,
    image_spec,
    patch_weights,
    read_patches,
    video_spec,
)
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import cell_components
from mllm_edge.spec import LearnedPositions, Patchify, VideoSpec

__all__ = ["FAMILY"]

_POSITIONS = "vision_positions.npy"
_START, _END = "<|begin_of_image|>", "<|end_of_image|>"
_IDS = tuple(f"{kind}_{end}_token_id" for kind in ("image", "video") for end in ("start", "end"))
# For checkpoints that come without a template.
_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|begin_of_video|><|video|><|end_of_video|>' "
    "if part['type'] == 'video' else '<|begin_of_image|><|image|><|end_of_image|>' }}"
    "{% endfor %}{% endif %}{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.glm4v import Glm4vConfig, Glm4vMerger, Glm4vTower, downsample_derived

    vision, weights, outputs = checkpoint.vision, checkpoint.weights, checkpoint.decoder.hidden_size
    patches, stated = read_patches(vision), vision.take("out_hidden_size")
    if stated != outputs:
        raise ConfigError(f"vision_config: out_hidden_size {stated}, but the text model's is {outputs}", OWN_CONFIG)
    tower = Glm4vConfig.read(vision, patches, outputs)
    hidden, grid = tower.sizes.hidden_size, tower.grid
    tables = (grid_rope(vision, hidden // tower.sizes.heads), LearnedPositions(_POSITIONS, grid, hidden, cubic=True))
    image = image_spec(checkpoint, patches, tables, (*_IDS, "video_token_id"), (_START, _END), whole=True)
    image = replace(image, video=_video_spec(checkpoint, patches))
    encoder, connector = cell_components(
        lambda: Glm4vTower(tower),
        lambda: Glm4vMerger(tower, outputs),
        image,
        (hidden, outputs),
        (VISION, VISION),
        patch_weights(checkpoint, patches, hidden),
        of_connector=downsample_derived(tower, weights, f"{VISION}downsample.weight", outputs),
    )
    positions = weights.use(f"{VISION}embeddings.position_embedding.weight", (grid**2, hidden))
    markers = (_START, _END)
    return Parts((encoder, connector), image, markers=markers, images="grid", arrays={_POSITIONS: positions})


def _video_spec(checkpoint: Checkpoint, patches: Patchify) -> VideoSpec | None:
    """Each two frames as an image of their own, with the first's time behind it, all of them between two words."""
    processor = checkpoint.processor
    return video_spec(
        checkpoint,
        patches,
        "Glm4vVideoProcessor",
        {"patch_size": 14, "size": {"shortest_edge": 112**2, "longest_edge": 60_000 * 28**2}},
        "steps",
        token=processor.image_token,
        token_id=checkpoint.token_id,
        placeholder=processor.video_token,
        frame=f"{_START}{{image}}{_END}{{second}}",
        together=True,
    )


def _load_processor(source: Source) -> Any:
    return load_processor(source, "Glm4vProcessor", ("Glm4vImageProcessor",), _TEMPLATE)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The reference's patches behind its tower's last norm, by cells, and their features."""
    import torch

    kept: list[Any] = []
    tower, cell = model.model.visual, model.config.vision_config.spatial_merge_size**2
    hook = tower.post_layernorm.register_forward_hook(lambda module, given, out: kept.append(out))
    try:
        found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    finally:
        hook.remove()
    return kept[0].unflatten(0, (-1, cell)), torch.cat(list(found.pooler_output))


FAMILY = Family(
    name="glm4v",
    model_types=("glm4v",),
    decoders=("glm4v_text",),
    examples=("zai-org/GLM-4.1V-9B-Thinking",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
)
