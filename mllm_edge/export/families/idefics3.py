"""SmolVLM and Idefics3: SigLIP tower, pixel-shuffle connector, Llama decoder, images as tiles.

The image processor resizes to a longest edge, stretches to whole tiles and cuts them, row by row, with the whole image
as the last tile; in the prompt each tile is announced by its row and column. Without splitting an image is one tile.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import OWN_CONFIG
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processing import processor_class
from mllm_edge.export.checkpoint.processor import load_processor, require_switched_on, require_tile, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.video_settings import frame_sampling, video_settings
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import (
    FrameSampling,
    ImagePrompt,
    ImageSpec,
    Resize,
    ResizeLongestEdge,
    ResizeToMultiple,
    SplitTiles,
    Transform,
    VideoSpec,
)

if TYPE_CHECKING:
    from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = ["FAMILY"]

_VISION = "model.vision_model."
_SIDE_LIMIT = 4096  # px; the processor's absolute maximum
_PROCESSORS = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
_CLASS = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}
_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<video>' if part['type'] == 'video' else '<image>' }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{{ 'Assistant:' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.siglip import PixelShuffleConnector, SiglipConfig, SiglipTower, position_ids

    source, weights = checkpoint.source, checkpoint.weights
    # Values that older remote code knew and the reference ignores: they must not promise another model.
    stated = source.config.get("text_config") or {}
    for key in ("qk_layer_norms", "use_resampler", "rope_interleaved"):
        if stated.get(key):
            where = f"{source.folder / 'config.json'} text_config"
            raise ConfigError(f"{where}: {key} = {stated[key]!r} is not supported", "only false is supported")
    tile = _longest_edge(checkpoint.processor.image_processor, "max_image_size")
    tower, scale = SiglipConfig.read(checkpoint.vision, tile), checkpoint.top.take("scale_factor")
    tokens = _tokens_per_tile(source, checkpoint.processor, tower.patches, scale)
    text_hidden = checkpoint.decoder.hidden_size
    table = weights.use(f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, tower.hidden_size))
    ids = position_ids(tower.patches, tower.grid)
    traced = tile_components(
        lambda: SiglipTower(tower),
        lambda: PixelShuffleConnector(tower.patches, scale, tower.hidden_size, text_hidden),
        (tower.channels, tile, tile),
        (tower.patches**2, tower.hidden_size),
        (tokens, text_hidden),
        (_VISION, "model.connector."),
        {"embeddings.positions": lambda: table()[ids]},
    )
    return Parts(traced, _image_spec(checkpoint, tower, tokens))


def _load_processor(source: Source) -> Any:
    from transformers import Idefics3Processor
    from transformers.models.smolvlm import processing_smolvlm

    classes = {cls.__name__: cls for cls in (Idefics3Processor, processing_smolvlm.SmolVLMProcessor)}
    name = processor_class(source, _CLASS[source.model_type], classes)
    vision = source.config.get("vision_config") or {}

    def of_model(image_processor: Any) -> dict[str, Any]:
        patches = image_processor.max_image_size["longest_edge"] // (vision.get("patch_size") or 32)
        return {"image_seq_len": (patches // (source.config.get("scale_factor") or 2)) ** 2}

    # The package num2words, which spells the number of a video's frames, is asked for even where there is no video.
    with patch.object(processing_smolvlm, "num2words", processing_smolvlm.num2words or str):
        return load_processor(source, name, _PROCESSORS, _TEMPLATE, of_model, classes[name])


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"], return_dict=True)
    return found.last_hidden_state, torch.cat(list(found.pooler_output))


def _longest_edge(settings: Any, key: str) -> int:
    value = dict(getattr(settings, key) or {})
    if not isinstance(value.get("longest_edge"), int) or value["longest_edge"] <= 0:
        raise ConfigError(f"preprocessor_config.json: {key} = {value!r}", 'expected {"longest_edge": pixels}')
    return value["longest_edge"]


def _tokens_per_tile(source: Source, processor: Any, patches: int, scale: int) -> int:
    if patches % scale:
        raise ConfigError(f"scale_factor {scale} does not divide the {patches} patches of a tile's side", OWN_CONFIG)
    tokens = (patches // scale) ** 2
    require_tokens(source, f"image_seq_len = {processor.image_seq_len}", processor.image_seq_len, tokens)
    return tokens


def _image_spec(checkpoint: Checkpoint, tower: "SiglipConfig", tokens: int) -> ImageSpec:
    processor, settings = checkpoint.processor, checkpoint.processor.image_processor
    require_switched_on(checkpoint.source, settings, "do_convert_rgb")
    resample = resample_name(settings.resample)
    transforms: list[Transform] = []
    if settings.do_resize:
        transforms.append(ResizeLongestEdge(_longest_edge(settings, "size"), resample, _SIDE_LIMIT))
    if settings.do_image_splitting:
        transforms += [ResizeToMultiple(tower.tile, resample), SplitTiles(tower.tile, resample)]
    else:
        transforms.append(Resize(tower.tile, tower.tile, resample))
    # Words that are not in the vocabulary are text like any other, as in the first Idefics3.
    fake = processor.fake_image_token
    whole = getattr(processor, "global_image_tag", None) or processor.global_image_token
    prompt = ImagePrompt(
        processor.image_token,
        checkpoint.token_id,
        single=f"{fake}{whole}{{image}}{fake}",
        tile=f"{fake}<row_{{row}}_col_{{col}}>{{image}}",
        row_end="\n",
        overview=f"\n{fake}{whole}{{image}}{fake}",
        reserved=tuple(filter(None, [getattr(processor, "video_token", None)])),
    )
    made = (*transforms, *value_transforms(settings))
    video = _video_spec(checkpoint, tower.tile, tokens, prompt.single)
    return ImageSpec(made, prompt, tower.tile, tower.tile, tokens, tower.channels, video=video)


def _video_spec(checkpoint: Checkpoint, tile: int, tokens: int, single: str) -> VideoSpec | None:
    """Each frame as a whole image behind its time, all of them behind how many there are. None for models of images
    alone, and as of `video_settings`."""
    source, processor = checkpoint.source, checkpoint.processor
    if not hasattr(processor, "video_token"):
        return None
    resample = {"resample": 1, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    settings = video_settings(source, "SmolVLMVideoProcessor", max_image_size={"longest_edge": 364}, **resample)
    if settings is None:
        return None
    sampling = getattr(settings, "video_sampling", {})
    settings.size = getattr(settings, "size", sampling.get("video_size", {"longest_edge": 4 * 364}))
    require_tile(source, (_longest_edge(settings, "max_image_size"),) * 2, tile)
    name = resample_name(settings.resample)
    longest = ResizeLongestEdge(_longest_edge(settings, "size"), name, _SIDE_LIMIT)
    return VideoSpec(
        (longest, Resize(tile, tile, name), *value_transforms(settings)),
        processor.image_token,
        checkpoint.token_id,
        features=tokens,
        placeholder=processor.video_token,
        begin="You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n",
        frame=f"\nFrame from {{clock}}:{single}",
        close="\n\n",
        sampling=_frame_sampling(source, settings, sampling),
    )


def _frame_sampling(source: Source, settings: Any, stated: Mapping[str, Any]) -> FrameSampling | None:
    """At a rate, up to a number of frames; what is `stated` for both in one setting counts."""
    rate = stated.get("fps", getattr(settings, "fps", None))
    most = stated.get("max_frames", getattr(settings, "num_frames", None))
    if rate is None or most is None:
        return None
    return frame_sampling(source, SimpleNamespace(fps=rate), "inner", most=most, seconds=1.0)


FAMILY = Family(
    name="idefics3",
    model_types=("idefics3", "smolvlm"),
    decoders=("llama",),
    examples=("HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceM4/Idefics3-8B-Llama3"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    text="model.text_model",
)
