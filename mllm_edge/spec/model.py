"""The model, and the bundle that holds it: manifest.json and generation.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_edge.spec.images import ImageSpec
from mllm_edge.spec.positions import PositionSpec
from mllm_edge.spec.state import StateSpec
from mllm_edge.spec.text_encoder import TextEncoderSpec

__all__ = [
    "DECODER",
    "DEEPSTACK",
    "Role",
    "Stage",
    "Component",
    "EmbeddingSpec",
    "FileEntry",
    "GenerationDefaults",
    "GenerationSpec",
    "Manifest",
    "ModelSpec",
    "SCHEMA_VERSION",
    "SymbolRange",
    "TensorSpec",
    "Variant",
]

SCHEMA_VERSION = 2
DECODER = "decoder"  # the component that every model ends with
DEEPSTACK = "deepstack."  # and a layer's number: what is added to the hidden states behind it, token by token

Role = Literal["vision", "connector", "text", "choice"]


@dataclass(frozen=True)
class EmbeddingSpec:
    """Token embeddings [rows, hidden_size] in a .npy file of `dtype`; a row is multiplied by `scale` when read."""

    file: str
    rows: int
    dtype: Literal["float16", "float32"] = "float16"
    scale: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A component that runs before the decoder.

    Tensors go by their names. An input is `pixel_values`, a table of the images, what `ImageSpec.text` or its
    views name, or an output of an earlier stage.
    Outputs: `image_features` [.., H] take the places of the image tokens; `deepstack.{k}` [.., H] are added there
    behind layer k; `cross.{l}.key` and `.value` are what the decoder's cross-attention looks at; others are for later
    stages.

    `role` decides about precision; a `choice` of rows of a table stays in float32, where rounding would choose others.
    What a run takes, `per`: slice (any number of slices, of any images), image (all
    slices of one, with its tables; of an image that is several grids of cells, those of one grid), prompt (outputs of
    earlier stages, [1, N, F]: the rows of all images one behind the other; stages of this kind come last, and run only
    where there are images). In an encoder-decoder these are `text_encoder` and those behind it, which run for every
    prompt. `shows`: it runs for images alone, or for videos, whose slices are their frames; None: for both.
    """

    component: str
    role: Role
    per: Literal["slice", "image", "prompt"]
    shows: Literal["image", "video"] | None = None

    def is_for(self, kind: Literal["image", "video"]) -> bool:
        """Whether it runs for images, or for videos."""
        return self.shows in (None, kind)


@dataclass(frozen=True)
class ModelSpec:
    """The model as the device needs to know it. `family` and `model_type` are for people only; `stages` run in their
    order, before the decoder. `text_encoder`: of an encoder-decoder; None: the decoder reads the prompt itself."""

    family: str
    model_type: str
    hidden_size: int
    vocab_size: int
    context_length: int
    parameters: int
    embedding: EmbeddingSpec
    positions: PositionSpec
    state: tuple[StateSpec, ...]
    image: ImageSpec | None
    stages: tuple[Stage, ...] = ()
    text_encoder: TextEncoderSpec | None = None

    def begun(self, prompt_tokens: int) -> int:
        """The places that the decoder takes for a prompt of so many tokens, before its answer."""
        return prompt_tokens if self.text_encoder is None else len(self.text_encoder.start)

    @property
    def arrays(self) -> tuple[str, ...]:
        """The bundle's arrays that a prompt's way to the decoder needs."""
        read = () if self.text_encoder is None else (self.text_encoder.positions.table,)
        return tuple(filter(None, (*(self.image.arrays if self.image is not None else ()), *read)))

    def role(self, component: str) -> Role:
        """What a component is to the model; the decoder is text."""
        return next((stage.role for stage in self.stages if stage.component == component), "text")


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint's own generation settings ask for, named as in transformers' GenerationConfig. Applied where
    a call does not say otherwise; `top_k`, `top_p` and `min_p` only to drawn answers."""

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    min_length: int = 0
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True)
class GenerationSpec:
    """generation.json: stop ids, special tokens by name, and the checkpoint's own generation settings."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    add_special_tokens: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output; a dimension is a number or a symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class SymbolRange:
    """Sizes of a symbolic dimension that an engine takes: from `least` to `most`, fastest at `usual`.

    `limit` names what the build of an engine bounds `most` by; None for `most`: by that alone, for `least`: always as
    large as `most`. `usual` is at least the part `share` of `most`. `times`: so many for each one of the limit.
    `sum_of`, in place of all these: the symbols whose sizes it adds up. Limits: `max_seq`, tokens of prompt and answer;
    `max_past`, those that one run of a decoder may have behind it; `max_new`, its own, where a prompt may come in
    pieces, else `max_prompt`; `max_images`, images or tiles in one run; `max_batch`, sequences; `max_rows`, tokens
    whose logits are wanted.
    """

    least: int | None = 1
    usual: int = 1
    most: int | None = None
    limit: Literal["max_seq", "max_past", "max_new", "max_prompt", "max_images", "max_batch", "max_rows"] | None = None
    share: float = 0.0
    times: int = 1
    sum_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One form of a component for one target. `minimum` maps a runtime's module name to its lowest version; `ranges` a
    symbol of the inputs to its sizes, for targets that build engines."""

    target: str
    dialect: Literal["contrib", "opset24", "opset17"]
    precision: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kv_mode: Literal["in_place", "append"] | None = None
    minimum: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, SymbolRange] = field(default_factory=dict)


@dataclass(frozen=True)
class Component:
    """One step of the model and the forms it comes in."""

    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle, and the XXH3 of each block of `block` bytes: 16 hexadecimal
    digits each, one after the other. A bundle of an older version has no XXH3."""

    nbytes: int
    sha256: str
    block: int = 0
    xxh3: str = ""


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `parity` and `accuracy` hold what was measured; `provenance` where it came from.
    `checksum`: the file's own bytes, 12 digits, and its XXH3 with zeros in the place of both."""

    schema: int
    model: ModelSpec
    components: Mapping[str, Component]
    recipe: Mapping[str, Any]
    parity: Mapping[str, Any]
    accuracy: Mapping[str, Any]
    provenance: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    checksum: str = ""
