"""Whether the parts of a manifest agree with each other: a contradiction is named, and not met later on."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Literal, get_args

from mllm_edge.errors import BundleError
from mllm_edge.image_checks import LARGEST, image_problems, positive
from mllm_edge.spec import (
    CROSS_BIAS,
    CROSS_KV,
    DECODER,
    DEEPSTACK,
    PIXELS,
    TEXT_ENCODER,
    Component,
    FileEntry,
    ImageSpec,
    Manifest,
    ModelSpec,
    PositionSpec,
    RopeSpec,
    Stage,
    StateKind,
    StateSpec,
    TensorSpec,
    TextEncoderSpec,
    Variant,
    is_cross,
    is_state,
)

__all__ = ["check_manifest"]

# Repeated here because a device has no exporter; a test compares them with the exporter's own.
DIALECTS = {"cpu": "contrib", "cuda": "contrib", "tensorrt": "opset24", "tensorrt-10.3": "opset17"}
_KV_MODES = {"contrib": "in_place", "opset24": "in_place", "opset17": "append"}
_DTYPES = {"bfloat16", "bool", "float16", "float32", "int32", "int64", "int8", "uint8"}
# Of targets for which engines are built, each for a range of shapes.
_BUILT = ("opset24", "opset17")
_PLACES = {"contrib": ("seqlens_k", "total_sequence_length"), "opset24": ("write_indices",), "opset17": ()}
# What a text encoder gets, by the number of axes.
_READ: dict[str, int | None] = {"inputs_embeds": 3, "attention_bias": 4}
_DIGITS = 16  # of a block's checksum
# Kinds of ropes that are made from the length they were trained for.
_TRAINED = ("dynamic", "llama3", "yarn", "longrope")


def check_manifest(manifest: Manifest) -> None:
    """Raise BundleError that names the first thing in `manifest` that contradicts another, or cannot be."""
    for what in chain(
        _files(manifest),
        _model(manifest.model),
        *(_component(manifest, name, component) for name, component in manifest.components.items()),
        _stages(manifest),
    ):
        raise BundleError(
            f"the manifest contradicts itself: {what}",
            "the bundle is damaged: copy it again from where it is whole, or export it again with "
            "`mllm-edge export MODEL OUT --force`",
        )


def _files(manifest: Manifest) -> Iterator[str]:
    for name, entry in manifest.files.items():
        yield from (f"files: {name}: {what}" for what in _entry(entry))
    model = manifest.model
    text = model.image.text if model.image is not None else None
    named = (model.embedding.file, model.positions.table, *model.arrays, "" if text is None else text.file)
    for name in filter(None, named):
        if name not in manifest.files:
            yield f"{name} is not in the manifest's list of files"


def _entry(entry: FileEntry) -> Iterator[str]:
    if entry.nbytes < 0:
        yield f"{entry.nbytes} bytes"
    if entry.block < 0 or (entry.xxh3 and not entry.block):
        yield f"blocks of {entry.block} bytes"
    elif entry.xxh3 and len(entry.xxh3) != _DIGITS * -(-entry.nbytes // entry.block):
        yield f"{len(entry.xxh3)} digits of checksums do not fit {entry.nbytes} bytes in blocks of {entry.block}"


def _model(model: ModelSpec) -> Iterator[str]:
    for name in ("hidden_size", "vocab_size", "context_length"):
        yield from positive(f"model.{name}", getattr(model, name))
    yield from _state(model.state)
    yield from positive("model.embedding.rows", model.embedding.rows)
    if model.parameters < 0:
        yield f"model.parameters is {model.parameters}"
    if model.embedding.rows < model.vocab_size:
        yield f"model.vocab_size is {model.vocab_size}, and there are {model.embedding.rows} embeddings"
    if not math.isfinite(model.embedding.scale) or not model.embedding.scale:
        yield f"model.embedding.scale is {model.embedding.scale}"
    yield from _positions(model.positions, model)
    if model.text_encoder is not None:
        yield from _text_encoder(model.text_encoder, model)
    if model.image is not None:
        yield from image_problems(model.image, model)


def _text_encoder(encoder: TextEncoderSpec, model: ModelSpec) -> Iterator[str]:
    positions = encoder.positions
    yield from (f"model.text_encoder: {what}" for what in _positions(positions, model))
    if positions.ropes or positions.windows != (None,) or positions.images != "sequence":
        yield "model.text_encoder.positions are those of a decoder"
    if model.image is not None and model.image.into != "tokens":
        yield f"a text encoder reads features of images, and they go into {model.image.into}"
    if not encoder.start or any(not 0 <= token < model.embedding.rows for token in encoder.start):
        yield f"model.text_encoder.start is {list(encoder.start)}, of {model.embedding.rows} tokens"


def _state(state: Sequence[StateSpec]) -> Iterator[str]:
    for k, spec in enumerate(state):
        if len(spec.shape) != 2:
            yield f"model.state[{k}].shape has {len(spec.shape)} sizes"
        for size in spec.shape:
            yield from positive(f"model.state[{k}].shape", size)
    for kind in get_args(StateKind):
        layers = sorted(layer for spec in state if spec.kind == kind for layer in spec.layers)
        if layers != list(range(len(layers))):
            yield f"model.state: its layers of kind {kind} are {layers}"


def _positions(spec: PositionSpec, model: ModelSpec) -> Iterator[str]:
    if (spec.kind == "rope") != bool(spec.ropes):
        yield f"positions of kind {spec.kind} with {len(spec.ropes)} ropes"
    if (spec.kind in ("learned", "relative_bias")) != bool(spec.table):
        yield f"positions of kind {spec.kind} with the table {spec.table!r}"
    if not spec.windows or any(window is not None and window < 1 for window in spec.windows):
        yield f"windows of {list(spec.windows)} positions"
    if spec.max_distance < 0 or (spec.kind == "relative_bias" and not spec.max_distance):
        yield f"model.positions.max_distance is {spec.max_distance}"
    if spec.images == "grid" and not (spec.ropes and all(rope.sections for rope in spec.ropes)):
        yield "positions follow the grid of images, and a rope has no sections"
    if spec.images == "grid" and (model.image is None or model.image.patches is None):
        yield "positions follow the grid of images, and images are not cut into cells"
    head_dim = max((state.shape[1] for state in model.state if state.kind == "growing"), default=0)
    for k, rope in enumerate(spec.ropes):
        yield from (f"model.positions.ropes[{k}]: {what}" for what in _rope(rope, head_dim))


def _rope(rope: RopeSpec, head_dim: int) -> Iterator[str]:
    numbers = {f.name: getattr(rope, f.name) for f in dataclasses.fields(rope) if f.type is float}
    for name, number in numbers.items():
        if not math.isfinite(number):
            yield f"{name} is {number}"
    if rope.dim < 2 or rope.dim % 2 or rope.dim > head_dim:
        yield f"dim {rope.dim} in heads of {head_dim}"
        return
    if rope.theta <= 1 or rope.factor <= 0 or rope.attention_factor <= 0:
        yield f"theta {rope.theta}, factor {rope.factor}, attention_factor {rope.attention_factor}"
    if rope.original_max_positions < (1 if rope.kind in _TRAINED else 0):
        yield f"kind {rope.kind} with original_max_positions {rope.original_max_positions}"
    if rope.kind == "dynamic" and rope.dim == 2:
        yield "kind dynamic with dim 2"
    if rope.kind == "llama3" and rope.low_freq_factor == rope.high_freq_factor:
        yield f"low_freq_factor and high_freq_factor are both {rope.low_freq_factor}"
    if rope.kind == "yarn" and (rope.beta_fast <= 0 or rope.beta_slow <= 0):
        yield f"beta_fast {rope.beta_fast}, beta_slow {rope.beta_slow}"
    for name in ("short_factors", "long_factors"):
        factors = getattr(rope, name)
        if rope.kind == "longrope" and (len(factors) != rope.dim // 2 or not all(f > 0 for f in factors)):
            yield f"{len(factors)} {name} for {rope.dim // 2} pairs, all above 0"
    if rope.sections and (len(rope.sections) != 3 or min(rope.sections) < 0 or sum(rope.sections) != rope.dim // 2):
        yield f"sections {list(rope.sections)} of {rope.dim // 2} pairs on three axes"


def _component(manifest: Manifest, name: str, component: Component) -> Iterator[str]:
    if not component.variants:
        yield f"{name} has no variants"
    targets = [variant.target for variant in component.variants]
    for target in targets:
        if targets.count(target) > 1:
            yield f"{name} has several variants for {target}"
    for variant in component.variants:
        where = f"{name} for {variant.target}"
        yield from (f"{where}: {what}" for what in _variant(manifest, name, variant))


def _variant(manifest: Manifest, name: str, variant: Variant) -> Iterator[str]:
    if variant.target not in DIALECTS:
        yield f"no such target (there are: {', '.join(DIALECTS)})"
        return
    if variant.dialect != DIALECTS[variant.target]:
        yield f"its dialect is {variant.dialect}, not {DIALECTS[variant.target]}"
    kv_mode = _KV_MODES[variant.dialect] if name == "decoder" else None
    if variant.kv_mode != kv_mode:
        yield f"its kv_mode is {variant.kv_mode}, not {kv_mode}"
    if variant.file not in manifest.files:
        yield f"{variant.file} is not in the manifest's list of files"
    for module, version in variant.minimum.items():
        if not version[:1].isdigit():
            yield f"{version!r} is no version of {module}"
    yield from _ranges(variant)
    yield from _tensors("input", variant.inputs)
    yield from _tensors("output", variant.outputs)
    if name == "decoder":
        yield from _decoder(manifest.model, variant)


def _ranges(variant: Variant) -> Iterator[str]:
    """Whether an engine can be built for some size of every symbol, for targets that have engines."""
    inputs = {size for tensor in variant.inputs for size in tensor.shape if isinstance(size, str)}
    if variant.dialect in _BUILT:
        yield from (
            f"no range is known for the dimension {symbol!r}" for symbol in sorted(inputs - set(variant.ranges))
        )
    plain = {symbol for symbol, sizes in variant.ranges.items() if not sizes.sum_of}
    for symbol, sizes in variant.ranges.items():
        if sizes.sum_of:
            unknown = sorted(set(sizes.sum_of) - plain)
            yield from (f"{symbol} adds up {part!r}, which has no sizes of its own" for part in unknown)
        elif sizes.most is None and sizes.limit is None:
            yield f"nothing bounds the range of {symbol}"
        elif not 1 <= sizes.times <= LARGEST:
            yield f"the range of {symbol} is {sizes.times} times its limit"
        elif not 0 <= sizes.share <= 1:
            yield f"the range of {symbol} has a share of {sizes.share}"
        else:
            least, most = sizes.least or 0, LARGEST if sizes.most is None else sizes.most
            if not 0 <= least <= max(least, sizes.usual) <= most <= LARGEST or sizes.usual < least or most < 1:
                yield f"the range of {symbol} is {sizes.least}, {sizes.usual}, {sizes.most}"


def _tensors(kind: str, tensors: Sequence[TensorSpec]) -> Iterator[str]:
    names = [tensor.name for tensor in tensors]
    for tensor in tensors:
        if not tensor.name or names.count(tensor.name) > 1:
            yield f"several {kind}s are called {tensor.name!r}"
        if tensor.dtype not in _DTYPES:
            yield f"{kind} {tensor.name} is of type {tensor.dtype!r}"
        if any(size < 0 if isinstance(size, int) else not size for size in tensor.shape):
            yield f"{kind} {tensor.name} has the shape {list(tensor.shape)}"


def _decoder(model: ModelSpec, variant: Variant) -> Iterator[str]:
    inputs = {tensor.name: tensor for tensor in variant.inputs}
    outputs = {tensor.name: tensor for tensor in variant.outputs}
    ropes = [f"{table}.{k}" if k else table for k in range(len(model.positions.ropes)) for table in ("cos", "sin")]
    past = {name: spec for spec in model.state for name in spec.inputs}
    present = [name for spec in model.state for name in spec.outputs]
    wanted = ["inputs_embeds", "logits_indices", *_PLACES[variant.dialect], *ropes, *past]
    yield from _lacks("input", wanted, inputs)
    yield from _lacks("output", ["logits", *present], outputs)
    extra = [n for n in inputs if (is_state(n) or n.startswith(("cos", "sin"))) and n not in wanted]
    extra += [n for n in outputs if is_state(n) and n not in present]
    for name in extra:
        layers = sum(len(spec.layers) for spec in model.state)
        yield f"{name} does not fit {layers} layers and {len(model.positions.ropes)} ropes"
    biases = {f"attention_bias.{k}" if k else "attention_bias" for k in range(len(model.positions.windows))}
    for name in inputs:
        if name.startswith("attention_bias") and name not in biases:
            yield f"input {name} for {len(biases)} windows"
    sizes = {"inputs_embeds": model.hidden_size, "logits": model.vocab_size}
    sizes |= {name: spec.shape[1] for name, spec in past.items()}
    for k, rope in enumerate(model.positions.ropes):
        sizes |= {(f"{table}.{k}" if k else table): rope.dim // 2 for table in ("cos", "sin")}
    for name, size in sizes.items():
        tensor = inputs.get(name) or outputs.get(name)
        last = tensor.shape[-1] if tensor is not None and tensor.shape else None
        if last != size and not isinstance(last, str):
            yield f"{name} ends with {last}, the model says {size}"
    for name, spec in past.items():
        yield from (f"{name} has {what}" for what in _state_shape(spec, inputs[name].shape, variant.kv_mode))


def _state_shape(spec: StateSpec, shape: Sequence[int | str], kv_mode: str | None) -> Iterator[str]:
    growing = spec.kind == "growing"
    axis = 1 if kv_mode == "in_place" or not growing else 2
    if len(shape) != (4 if growing else 3) or (isinstance(shape[axis], int) and shape[axis] != spec.shape[0]):
        what = f"{spec.shape[0]} heads" if growing else f"a width of {spec.shape[0]}"
        yield f"the shape {list(shape)}, the model says {what}"


def _stages(manifest: Manifest) -> Iterator[str]:
    """The components that the model needs, and what one hands to the next."""
    image, stages, components = manifest.model.image, manifest.model.stages, manifest.components
    names = [stage.component for stage in stages]
    if (image is not None) != bool(stages):
        yield f"the model takes {'images' if image is not None else 'no images'}, and has {len(stages)} stages for them"
    for name in (*names, DECODER):
        if name not in components:
            yield f"there is no {name}"
    for name in components:
        if name not in (*names, DECODER):
            yield f"no stage runs {name}"
    if len(set(names)) != len(names) or DECODER in names:
        yield f"the stages are {', '.join(names)}"
    for stage in stages:
        if stage.shows == "video" and (image is None or image.video is None):
            yield f"{stage.component} runs for videos, and the model takes none"
    whole = [stage.component for stage in stages if stage.per == "prompt"]
    if whole != names[len(names) - len(whole) :]:
        yield f"{', '.join(whole)} run for whole prompts, and others behind them"
    reads = manifest.model.text_encoder is not None
    if reads != (TEXT_ENCODER in whole) or (reads and whole != [TEXT_ENCODER, CROSS_KV]):
        yield f"model.text_encoder {'is stated' if reads else 'is not'}, and {whole} run for whole prompts"
    if image is None or not {*names, DECODER} <= set(components):
        return
    tables = [name for table in image.tables for name in table.names]
    if tables and all(stage.per != "image" for stage in stages):
        yield f"images have {', '.join(tables)}, and no stage runs for one image"
    for target in dict.fromkeys(v.target for name in names for v in components[name].variants):
        found = {n: next((v for v in components[n].variants if v.target == target), None) for n in (*names, DECODER)}
        for run in _chains(image, stages):
            variants = {name: found[name] for name in run}
            yield from _chain(target, variants, manifest.model, image, tables, found[DECODER], whole)


def _chains(image: ImageSpec, stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    """The components that run for images and, where they are others, those for videos."""
    kinds: tuple[Literal["image", "video"], ...] = ("image", "video") if image.video is not None else ("image",)
    return list(dict.fromkeys(tuple(stage.component for stage in stages if stage.is_for(kind)) for kind in kinds))


def _chain(
    target: str,
    variants: Mapping[str, Variant | None],
    model: ModelSpec,
    image: ImageSpec,
    tables: Sequence[str],
    decoder: Variant | None,
    whole: Sequence[str],
) -> Iterator[str]:
    """What the stages for one target are given, and what they make; those of `whole` run for whole prompts."""
    pixels = {name: 1 + len(shape) for name, shape in image.inputs.items()}
    texts = {} if image.text is None else {image.text.name: 2}
    given: dict[str, int | None] = {**pixels, **dict.fromkeys(tables), **texts}
    made: dict[str, TensorSpec] = {}
    used: set[str] = set()
    for name, variant in variants.items():
        if variant is None:
            continue
        where = f"{name} for {target}"
        if name == next(iter(whole), None):
            # Rows of all images, [1, N, F]; or all that a text encoder gets of a prompt.
            given = dict(_READ) if model.text_encoder is not None else dict.fromkeys(made, 3)
        for tensor in variant.inputs:
            if tensor.name not in given:
                yield f"{where}: nothing gives its input {tensor.name}"
            elif given[tensor.name] not in (None, len(tensor.shape)):
                shape = list(tensor.shape)
                yield f"{where}: {tensor.name} has the shape {shape}, it is given {given[tensor.name]} axes"
            used.add(tensor.name)
            wanted = image.inputs.get(tensor.name, ())
            if tensor.name == PIXELS and image.tiles is not None:
                wanted = (image.tiles, *wanted)
            if wanted and _differs(tensor.shape[-len(wanted) :], wanted):
                shape = list(tensor.shape)
                yield f"{where}: {tensor.name} has the shape {shape}, the image processing makes {list(wanted)}"
        made |= {tensor.name: tensor for tensor in variant.outputs}
        given |= {tensor.name: len(tensor.shape) for tensor in variant.outputs}
    if None in variants.values():
        return
    for name in (n for n in (*pixels, *tables, *texts) if n not in used):
        yield f"for {target}: no stage takes {name}"
    if decoder is not None:
        crosses = image.into == "cross_attention" or model.text_encoder is not None
        yield from (f"decoder for {target}: {what}" for what in _crossed(decoder, crosses, image.into, made))
        if image.both_ways is not None and all(t.name != "attention_bias" for t in decoder.inputs):
            yield f"decoder for {target}: tokens see each other in both directions, and it takes no attention_bias"
    if image.into == "cross_attention":
        return
    features = made.get("image_features")
    if features is None:
        yield f"for {target}: no stage has the output image_features"
        return
    last, hidden = features.shape[-1:], model.hidden_size
    if not last or (isinstance(last[0], int) and last[0] != hidden):
        yield f"for {target}: image_features ends with {list(last)}, the model's hidden size is {hidden}"


def _crossed(decoder: Variant, crosses: bool, into: str, made: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Whether the decoder looks at what is made for it to look at, and adds what is made for it to add."""
    inputs = {tensor.name: tensor for tensor in decoder.inputs}
    looked_at = [name for name in inputs if is_cross(name)]
    if bool(looked_at) != crosses or (looked_at and CROSS_BIAS not in inputs):
        yield f"it looks at {', '.join(looked_at) or 'nothing'}, and features go into {into}"
    added, features = ({name for name in names if name.startswith(DEEPSTACK)} for names in (inputs, made))
    for name in sorted(features - added):
        yield f"it has no input {name}, which a stage makes"
    for name in (*looked_at, *sorted(added)):
        if name not in made:
            yield f"nothing gives its input {name}"
        elif name in added:
            if _differs(inputs[name].shape[-1:], made[name].shape[-1:]):
                yield f"{name} ends with {inputs[name].shape[-1]}, it is given {made[name].shape[-1]}"
        elif len(made[name].shape) != 4 or _differs(inputs[name].shape, made[name].shape):
            yield f"{name} has the shape {list(inputs[name].shape)}, it is given {list(made[name].shape)}"


def _differs(shape: Sequence[int | str], wanted: Sequence[int | str]) -> bool:
    return len(shape) == len(wanted) and any(isinstance(a, int) and a != b for a, b in zip(shape, wanted, strict=True))


def _lacks(kind: str, wanted: Sequence[str], have: dict[str, TensorSpec]) -> Iterator[str]:
    for name in wanted:
        if name not in have:
            yield f"it has no {kind} {name}"
