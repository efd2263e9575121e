"""LFM2-VL: SigLIP 2 of any aspect ratio, cells of patches as tokens, an LFM2 decoder; large images are cut into tiles.

Each tile, and the whole image behind them, is a grid of its own. transformers' image processor runs on torchvision
alone, which no export needs: the one that the reference gets here is ours, from the same settings.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.own_images import OWN_IMAGES, load_with_own_images
from mllm_edge.export.checkpoint.processor import OWN_PROCESSOR, require_switched_on
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import Texts, read_texts
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import cell_components
from mllm_edge.runtime.prompt.transforms.apply import apply_transforms, cut_of
from mllm_edge.spec import ImagePrompt, ImageSpec, LearnedPositions, Patchify, SplitLarge, Transform

if TYPE_CHECKING:
    from mllm_edge.export.vision.siglip import SiglipConfig

__all__ = ["FAMILY"]

_VISION = "model.vision_tower."
_POSITIONS = "vision_positions.npy"
# Of transformers' class, for settings that the files leave out.
_DEFAULTS = {
    "downsample_factor": 2,
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "encoder_patch_size": 16,
    "tile_size": 512,
    "max_pixels_tolerance": 2.0,
    "do_pad": True,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_COUNTS = tuple(key for key, value in _DEFAULTS.items() if type(value) is int and key != "resample")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.modules import channels_first
    from mllm_edge.export.vision.siglip2 import CellConnector, CellConnectorConfig, Siglip2Tower, read_siglip2

    weights, text_hidden = checkpoint.weights, checkpoint.decoder.hidden_size
    tower = read_siglip2(checkpoint.vision)
    connector = CellConnectorConfig.read(checkpoint.top, tower.hidden_size, text_hidden)
    image = _image_spec(checkpoint, tower, connector.merge)
    table = weights.use(f"{_VISION}embeddings.position_embedding.weight", (tower.grid**2, tower.hidden_size))
    values, name = tower.channels * tower.patch**2, "embeddings.patch_embedding.weight"
    linear = weights.use(f"{_VISION}{name}", (tower.hidden_size, values))
    traced = cell_components(
        lambda: Siglip2Tower(tower, connector.merge),
        lambda: CellConnector(connector),
        image,
        (tower.hidden_size, text_hidden),
        (_VISION, "model.multi_modal_projector."),
        {name: lambda: channels_first(linear(), tower.patch)},
    )
    processor = checkpoint.processor
    markers = (processor.image_start_token, processor.image_end_token)
    return Parts(traced, image, (f"{_VISION}head.",), markers, arrays={_POSITIONS: table})


def _image_spec(checkpoint: Checkpoint, tower: "SiglipConfig", merge: int) -> ImageSpec:
    source, processor, settings = checkpoint.source, checkpoint.processor, checkpoint.processor.image_processor
    for key, value, whose in (
        ("encoder_patch_size", tower.patch, "the vision tower's"),
        ("downsample_factor", merge, "the model's"),
    ):
        stated = getattr(settings, key)
        if stated != value:
            raise ConfigError(
                f"{source.folder}: the image processor's {key} is {stated!r}, {whose} {value}", OWN_PROCESSOR
            )
    require_switched_on(source, settings, "do_pad")
    start, end, whole = processor.image_start_token, processor.image_end_token, processor.image_thumbnail_token
    prompt = ImagePrompt(
        processor.image_token,
        checkpoint.token_id,
        single=f"{start}{{image}}{end}",
        begin=start,
        tile="<|img_row_{row}_col_{col}|>{image}",
        overview=f"{whole}{{image}}{end}" if settings.use_thumbnail else end,
    )
    positions = LearnedPositions(_POSITIONS, tower.grid, tower.hidden_size)
    side = tower.patch * merge
    return ImageSpec(_transforms(source, settings), prompt, side, side, features=1, tables=(positions,))


def _transforms(source: Source, settings: Any) -> tuple[Transform, ...]:
    """What the image processor does; raises ConfigError for settings with which it does not fit the model."""
    for key in _COUNTS:
        value = getattr(settings, key)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{source.folder}: the image processor's {key} is {value!r}", "expected a whole number")
    patches = Patchify(settings.encoder_patch_size, settings.downsample_factor, 1)
    cell, most = patches.patch * patches.merge, settings.max_tiles if settings.do_image_splitting else 1
    least = settings.min_tiles if most > 1 else 1
    if most > 1 and not 2 <= least <= most:
        # For a grid of one tile transformers' processor writes the tokens of another size.
        raise ConfigError(
            f"{source.folder}: the image processor cuts large images into {least} to {most} tiles", "2 are the least"
        )
    if most > 1 and settings.tile_size % cell:
        raise ConfigError(f"{source.folder}: tiles of {settings.tile_size} px and cells of {cell} px", OWN_PROCESSOR)
    if settings.min_image_tokens > settings.max_image_tokens:
        bounds = f"{settings.min_image_tokens} to {settings.max_image_tokens}"
        raise ConfigError(f"{source.folder}: the image processor makes {bounds} tokens of an image", OWN_PROCESSOR)
    resample, tolerance = resample_name(settings.resample), settings.max_pixels_tolerance
    if resample != "bilinear":  # torchvision's other filters differ from Pillow's by many levels
        raise ConfigError(f"{source.folder}: the image processor's resample is {resample}", "supported: 2, bilinear")
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < math.inf:
        said = f"max_pixels_tolerance is {tolerance!r}"
        raise ConfigError(f"{source.folder}: the image processor's {said}", "expected a positive number")
    split = SplitLarge(
        cell=cell,
        min_cells=settings.min_image_tokens,
        max_cells=settings.max_image_tokens,
        large=float(tolerance),
        thinnest=patches.patch,
        size=settings.tile_size,
        min_tiles=least,
        max_tiles=most,
        overview=bool(settings.use_thumbnail),
        resample=resample,
    )
    return (split, *value_transforms(settings), patches)


def _texts(checkpoint: Checkpoint) -> Texts:
    """Its processor adds no special tokens to a text; the template writes them."""
    texts = read_texts(checkpoint.source, checkpoint.processor, checkpoint.config.text_config.to_dict())
    return replace(texts, generation=replace(texts.generation, add_special_tokens=False))


# ---------------------------------------------------------------- the reference
def _load_processor(source: Source) -> Any:
    from transformers import Lfm2VlProcessor

    def inputs_of(settings: Any) -> Any:
        return partial(_model_inputs, transforms=_transforms(source, settings))

    names = ("Lfm2VlProcessor", "Lfm2VlImageProcessor")
    return load_with_own_images(source, Lfm2VlProcessor, *names, _DEFAULTS, _TEMPLATE, inputs_of)


def _model_inputs(images: list[Any], transforms: tuple[Transform, ...]) -> dict[str, Any]:
    """The model's inputs of RGB images: pixel_values [grids, patches, values], padded to the largest grid, where these
    are real, and each grid's patches; for the text each image's tiles and the size of the whole."""
    import torch

    *_, patches = transforms
    assert isinstance(patches, Patchify)
    cuts = [cut_of(image.height, image.width, transforms) for image in images]
    grids = [grid for cut in cuts for grid in cut.grids]
    cells = np.concatenate([apply_transforms(image, transforms) for image in images])
    ends = np.cumsum([rows * cols for rows, cols in grids])[:-1]
    rows_of = [_patch_rows(part, *grid, patches) for part, grid in zip(np.split(cells, ends), grids, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(rows) for rows in rows_of], batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[len(rows)] for rows in rows_of])
    tiles = [(cut.rows, cut.cols) if len(cut.grids) > 1 else (1, 1) for cut in cuts]
    side = patches.merge * patches.patch
    return {
        "pixel_values": padded,
        "pixel_attention_mask": mask.int(),
        "spatial_shapes": torch.tensor(grids) * patches.merge,
        "image_rows": [rows for rows, _ in tiles],
        "image_cols": [cols for _, cols in tiles],
        "image_sizes": [[side * cells for cells in cut.grids[-1]] for cut in cuts],
    }


def _patch_rows(cells: np.ndarray, rows: int, cols: int, patches: Patchify) -> np.ndarray:
    """Cells [rows · cols, merge², values] → the grid's patches row by row, each pixel by pixel."""
    merge, patch = patches.merge, patches.patch
    grid = cells.reshape(rows, cols, merge, merge, 3, patch, patch)
    return grid.transpose(0, 2, 1, 3, 5, 6, 4).reshape(rows * cols * merge**2, -1)


def _cells(model: Any, patches: Any, inputs: Mapping[str, Any]) -> Iterator[Any]:
    """Of patches [grids, longest, D] those of each grid [cells, merge², D]."""
    merge = model.config.downsample_factor
    for grid, (rows, cols) in zip(patches, inputs["spatial_shapes"].tolist(), strict=True):
        whole = grid[: rows * cols].reshape(rows // merge, merge, cols // merge, merge, -1)
        yield whole.swapaxes(1, 2).reshape(rows * cols // merge**2, merge**2, -1)


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch

    names = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    found = model.model.get_image_features(**{name: inputs[name] for name in names}, return_dict=True)
    return torch.cat([*_cells(model, found.last_hidden_state, inputs)]), torch.cat(list(found.pooler_output))


def _pixel_values(model: Any, inputs: Mapping[str, Any]) -> Any:
    import torch

    cells, patch = torch.cat([*_cells(model, inputs["pixel_values"], inputs)]), model.config.vision_config.patch_size
    return cells.unflatten(2, (patch, patch, -1)).permute(0, 1, 4, 2, 3).flatten(2)


FAMILY = Family(
    name="lfm2_vl",
    model_types=("lfm2_vl",),
    decoders=("lfm2",),
    examples=("LiquidAI/LFM2-VL-450M", "LiquidAI/LFM2-VL-1.6B"),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    pixel_values=_pixel_values,
    note=OWN_IMAGES,
    texts=_texts,
)
