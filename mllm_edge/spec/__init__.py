"""What a bundle says about its model, as frozen dataclasses (their JSON form: `json_form.py`).

This is the closed vocabulary of the device side. Nothing here knows a model family; a word that is not here means
that the bundle was made by a newer version. Only numpy-free standard library is imported.
"""

from mllm_edge.spec.images import (
    CenterCrop,
    GridRope,
    ImagePrompt,
    ImageSpec,
    Normalize,
    PadToSquare,
    Patchify,
    Resample,
    Rescale,
    Resize,
    ResizeLongestEdge,
    ResizeShortestEdge,
    ResizeToMultiple,
    ResizeToPixels,
    SelectTiles,
    SplitTiles,
    Transform,
)
from mllm_edge.spec.model import (
    SCHEMA_VERSION,
    Component,
    EmbeddingSpec,
    FileEntry,
    GenerationDefaults,
    GenerationSpec,
    Manifest,
    ModelSpec,
    SymbolRange,
    TensorSpec,
    Variant,
)
from mllm_edge.spec.positions import PositionSpec, RopeSpec
from mllm_edge.spec.state import CacheSpec

__all__ = [
    "CacheSpec",
    "CenterCrop",
    "Component",
    "EmbeddingSpec",
    "FileEntry",
    "GenerationDefaults",
    "GenerationSpec",
    "GridRope",
    "ImagePrompt",
    "ImageSpec",
    "Manifest",
    "ModelSpec",
    "Normalize",
    "PadToSquare",
    "Patchify",
    "PositionSpec",
    "Resample",
    "Rescale",
    "Resize",
    "ResizeLongestEdge",
    "ResizeShortestEdge",
    "ResizeToMultiple",
    "ResizeToPixels",
    "RopeSpec",
    "SCHEMA_VERSION",
    "SelectTiles",
    "SplitTiles",
    "SymbolRange",
    "TensorSpec",
    "Transform",
    "Variant",
]
