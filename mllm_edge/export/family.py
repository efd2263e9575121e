"""What a model family says of itself and of a checkpoint, and the plan that is made of that.

A family is one file of `families/`, which defines a `FAMILY`; there is no list of them elsewhere.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np

from mllm_edge.errors import ConfigError, MllmEdgeError, UnsupportedModelError, WeightsError
from mllm_edge.export.checkpoint.config import (
    OWN_CONFIG,
    ConfigReader,
    check_layers,
    load_config,
    model_readers,
    nearest,
    text_part,
)
from mllm_edge.export.checkpoint.generation import decoder_start
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.skeleton import skeleton
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.source_weights import empty_model, source_weights
from mllm_edge.export.checkpoint.texts import Texts, read_texts
from mllm_edge.export.checkpoint.vocabulary import check_vocabulary
from mllm_edge.export.decoders.find import decoder_for
from mllm_edge.export.decoders.place import Place
from mllm_edge.export.known import known_systems
from mllm_edge.export.plan import POSITIONS, TEXT_POSITIONS, Plan, TracedComponent
from mllm_edge.export.reference import load_reference
from mllm_edge.graph.decoder_spec import DecoderSpec, EncoderSpec
from mllm_edge.spec import (
    CROSS_KV,
    DEEPSTACK,
    TEXT_ENCODER,
    EmbeddingSpec,
    ImageSpec,
    ModelSpec,
    Stage,
    TextEncoderSpec,
)

__all__ = [
    "Checkpoint",
    "Family",
    "Parts",
    "families",
    "family_for",
    "open_weights",
    "reading",
    "understand",
]

_DISTANCES = 512  # tokens that T5 was trained with; its scores of distances have no end
_TABLES = (".rotary_emb.inv_freq", ".position_ids")  # that old versions saved


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint, opened. `config` is as transformers has it, `weights` are under its names; `top`, `text` and
    `vision` read the configuration and its parts, and every value that matters must be taken from them. `token_id` is
    the image placeholder's."""

    source: Source
    config: Any
    weights: Weights
    top: ConfigReader
    text: ConfigReader
    vision: ConfigReader
    decoder: DecoderSpec
    token_id: int
    load_processor: Callable[[Source], Any]

    @cached_property
    def processor(self) -> Any:
        """transformers' processor."""
        return self.load_processor(self.source)


@dataclass(frozen=True)
class Parts:
    """What is special about a checkpoint. `ignored`: tensors that begin so are rightly left out; `markers`: special
    tokens that images use beside the placeholder. `images`: see `PositionSpec`."""

    traced: tuple[TracedComponent, ...]
    image: ImageSpec
    ignored: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    images: Literal["sequence", "grid"] = "sequence"
    arrays: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)


def _as_it_is(source: Source) -> Source:
    return source


def _plain_texts(checkpoint: Checkpoint) -> Texts:
    return read_texts(checkpoint.source, checkpoint.processor, text_part(checkpoint.config).to_dict())


def _given_pixels(model: Any, inputs: Mapping[str, Any]) -> Any:
    return inputs["pixel_values"]


def _stated_decoder(config: Any, weights: Weights) -> str:
    return str(text_part(config).model_type)


@dataclass(frozen=True)
class Family:
    """A model family.

    `decoders` (those that are proven) and `examples` (hub ids) are facts for people. `text`: where the decoder stands
    under transformers' names, or where by its model type, `head`: its projection onto the vocabulary; whether the
    embeddings are that one, too, is told by who holds it: the model, or the text model. `vision`: the configuration's
    part for images, "" for none; `image_token`: the setting with the placeholder's id, with a dot one of that part.
    `describe` says what is special about a checkpoint; it raises ConfigError, WeightsError or SourceError that names
    what does not fit. For the comparison with the source model there are `load_processor`, the reference's own
    processor without torchvision, `load_model` (the source; how many layers of the decoder, None: all) in float32, and
    `image_features` (model, inputs): its tensors that answer to the components' outputs `vision_hidden` and
    `image_features` (or `encoder_hidden_states`). `pixel_values` (model, inputs): those of its processor, where they
    differ from the bundle's by more than their shape; `video_features` (model, pixels of the frames of a video) as
    `image_features`, where stages of their own show videos; `note`: what every comparison says of the reference.

    A layout that transformers does not know has `own_layouts`, its model types; `renames`, from its names to
    transformers', by regular expressions that are applied in order; and `translated`, the source with its configuration
    as transformers would write it. `decoder_type` (configuration, weights) tells which decoder the text model is.
    """

    name: str
    model_types: tuple[str, ...]
    decoders: tuple[str, ...]
    examples: tuple[str, ...]
    describe: Callable[[Checkpoint], Parts]
    load_processor: Callable[[Source], Any]
    image_features: Callable[[Any, Mapping[str, Any]], tuple[Any, Any]]
    pixel_values: Callable[[Any, Mapping[str, Any]], Any] = _given_pixels
    video_features: Callable[[Any, Any], tuple[Any, Any]] | None = None
    note: str = ""
    text: str | Mapping[str, str] = "model.language_model"
    head: str = "lm_head"
    vision: str = "vision_config"
    image_token: str = "image_token_id"
    load_model: Callable[[Source, int | None], Any] = load_reference
    own_layouts: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    translated: Callable[[Source], Source] = _as_it_is
    texts: Callable[[Checkpoint], Texts] = _plain_texts
    decoder_type: Callable[[Any, Weights], str] = _stated_decoder

    def place(self, config: Any) -> str:
        """Where the decoder stands; of an unknown type, where that of the first one does."""
        if isinstance(self.text, str):
            return self.text
        return self.text.get(config.text_config.model_type, next(iter(self.text.values())))


@cache
def families() -> Mapping[str, Family]:
    """Every family by the model types of config.json that it serves. Imports no torch."""
    package = importlib.import_module("mllm_edge.export.families")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {model_type: family for family in found for model_type in family.model_types}


def family_for(source: Source) -> Family:
    """The family of a checkpoint; raises UnsupportedModelError that names the nearest supported type."""
    family = families().get(source.model_type)
    if family is None:
        known = sorted(families())
        near = nearest(source.model_type, known)
        raise UnsupportedModelError(
            f"{source.folder / 'config.json'}: model_type {source.model_type!r} is not supported{_known(source)}",
            f"supported: {', '.join(known)}" + (f"; the nearest is {near}" if near else ""),
        )
    return family


def _known(source: Source) -> str:
    """What is known of a system that is not exported."""
    known = {entry["model_type"]: entry for entry in known_systems()}.get(source.model_type)
    return f" ({known['name']}: {known.get('why') or 'planned'})" if known else ""


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Around what reads a checkpoint's settings: a value of a type or size that nothing can be made of, which no check
    foresaw, becomes a ConfigError that quotes what failed."""
    try:
        yield
    except MllmEdgeError:
        raise
    except OSError as e:
        raise ConfigError(f"{e.filename or source.folder}: {e.strerror or e}", "check the file, and links to it") from e
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, re.error) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(
            f"{source.folder}: a setting has a value that cannot be used ({type(e).__name__}: {reason:.200})",
            "compare the JSON files with those of the model's own repository; --debug shows where it was read",
        ) from e


def open_weights(source: Source) -> Weights:
    """The weights with adapters merged, under the names that transformers has for them today; errors as of
    `source_weights`."""
    weights = source_weights(source)
    check_layers(source, sum(1 for _ in weights))
    if source.in_transformers:
        try:
            return weights.under(skeleton(empty_model(source)).rename)
        except WeightsError:
            raise
        except Exception:  # of such settings transformers makes no model: who reads them names the one that is wrong
            return weights
    renames = family_for(source).renames

    def renamed(name: str) -> str:
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        return name

    return weights.under(renamed)


def understand(source: Source, weights: Weights) -> Plan:
    """What the export needs to know about a checkpoint, whose `weights` are as `open_weights` opens them; raises
    ConfigError, WeightsError or SourceError that names what does not fit."""
    family = family_for(source)
    checkpoint = _opened(family, source, weights)
    top, text = checkpoint.top, checkpoint.text
    context = text.take("max_position_embeddings", text.take("n_positions", _DISTANCES))
    parts = family.describe(checkpoint)
    decoder = _fitted(checkpoint.decoder, parts)
    for reader in (top, text, checkpoint.vision):
        reader.finish()
    image = parts.image
    check_vocabulary(source, {image.prompt.token: image.prompt.token_id}, parts.markers, decoder.vocab_size)
    encoder = decoder.encoder
    embedding = Place(family.place(checkpoint.config)).embedding if encoder is None else encoder.embedding
    if bool(decoder.crossed) != (image.into == "cross_attention" or encoder is not None):
        raise ConfigError(
            f"{source.folder / 'config.json'}: the decoder has {decoder.crossed} layers of cross-attention, and "
            f"features of images go into {image.into.replace('_', '-')}",
            OWN_CONFIG,
        )
    crossed = (Stage(CROSS_KV, "text", "prompt"),) if decoder.crossed else ()
    read = (Stage(TEXT_ENCODER, "text", "prompt"),) if encoder is not None else ()
    model = ModelSpec(
        family=family.name,
        model_type=source.model_type,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        context_length=context,
        parameters=weights.parameters,
        embedding=EmbeddingSpec("embed_tokens.npy", weights.shape(embedding)[0], scale=decoder.embedding_scale),
        positions=replace(decoder.position_spec(POSITIONS), images=parts.images),
        state=decoder.state_specs(),
        image=image,
        stages=(*(component.stage for component in parts.traced), *read, *crossed),
        text_encoder=None if encoder is None else _reading(checkpoint, encoder),
    )
    left = parts.ignored if encoder is None else (*parts.ignored, *encoder.copies)
    ignored = tuple(name for name in weights if name.endswith(_TABLES) or name.startswith(left))
    return Plan(model, decoder, parts.traced, embedding, family.texts(checkpoint), ignored, parts.arrays)


def _reading(checkpoint: Checkpoint, encoder: EncoderSpec) -> TextEncoderSpec:
    start = decoder_start(checkpoint.source, checkpoint.config.text_config.to_dict())
    return TextEncoderSpec(encoder.position_spec(TEXT_POSITIONS), start)


def _fitted(decoder: DecoderSpec, parts: Parts) -> DecoderSpec:
    """With an input for each output of the stages that is added behind a layer, and a mask where tokens see each other
    in both directions."""
    names = (tensor.name for part in parts.traced for tensor in part.outputs)
    added = tuple(sorted(int(name.removeprefix(DEEPSTACK)) for name in names if name.startswith(DEEPSTACK)))
    return replace(decoder, deepstack=added, spans=parts.image.both_ways is not None)


def _opened(family: Family, source: Source, weights: Weights) -> Checkpoint:
    read = family.translated(source)
    config = load_config(read)
    top, text, vision = model_readers(read, config, family.vision)
    holder = text if "." in family.head else top
    place = Place(family.place(config), family.head, bool(holder.take("tie_word_embeddings", False)))
    where = f"{source.folder / 'config.json'}: text_config.model_type"
    decoder = decoder_for(family.decoder_type(config, weights), text, weights, place, where)
    part, _, key = family.image_token.rpartition(".")
    token_id = (vision if part else top).take(key)
    return Checkpoint(source, config, weights, top, text, vision, decoder, token_id, family.load_processor)
