"""Recipes: which precision each part of the model gets, as data."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from mllm_edge.errors import RecipeError
from mllm_edge.graph.precision import (
    BLOCKS,
    BLOCKS_8,
    CALIBRATED_4,
    EVENED_4,
    FLOAT16,
    FLOAT32,
    FP8,
    HEAD_8,
    INT8_DYNAMIC,
    INT8_STATIC,
    INT8_TOKEN,
    W4A8,
    Precision,
)
from mllm_edge.spec import DECODER, Role

__all__ = [
    "CALIBRATED",
    "Attention",
    "MOST_BITS",
    "RECIPES",
    "Recipe",
    "Rule",
    "at_most",
    "attention_of",
    "calibrated_recipe",
    "check_rules",
    "is_quantized",
    "part_of",
    "precision_of",
    "read_recipe",
    "recipe",
]

Attention = Literal["float", "int8"]
HEAD = "lm_head"  # the decoder's projection onto the vocabulary


@dataclass(frozen=True)
class Rule:
    """Another precision for the layers whose component and name match these patterns (`*` and `?` as in a shell)."""

    component: str
    layers: str
    precision: Precision


@dataclass(frozen=True)
class Recipe:
    """A named choice. `vision` covers the vision encoder's linear layers, `head` the projection onto the vocabulary; of
    the `rules` that match a layer the last one counts.

    `raised`: what the layers with the largest errors get instead, as many as the bundle stays under `size` with, a part
    of what it was in half precision. `kv`: how the decoder's cache holds keys and values; int8 has ranges from
    calibration. `more_bits_above`: the divergence in nats from which on the decoder's bits are spread by what each part
    costs (`mixed.spread`), so that all take at most `most_bits` a weight (None: 8); None: never. `attention`: how a
    vision encoder with layers in int8 multiplies its attention on the CPU (`int8_attention`); it is float elsewhere.
    """

    name: str
    vision: Precision
    connector: Precision
    decoder: Precision
    head: Precision
    rules: tuple[Rule, ...] = ()
    raised: Precision | None = None
    size: float = 1.0
    kv: Literal["float", "int8"] = "float"
    more_bits_above: float | None = None
    most_bits: float | None = None
    attention: Attention = "float"

    @property
    def limits_bits(self) -> bool:
        """Whether somebody asked for its `most_bits`."""
        return self.most_bits not in (None, MOST_BITS)


# Small models lose their words with four bits everywhere, large ones do not: measured, and not told by their names.
_MORE_BITS_ABOVE = 0.1
MOST_BITS = 6.15  # what small decoders take in llama.cpp's Q4_K_M
RECIPES = {
    "fp32": Recipe("fp32", FLOAT32, FLOAT32, FLOAT32, FLOAT32),
    "fp16": Recipe("fp16", FLOAT16, FLOAT16, FLOAT16, FLOAT16),
    "int8": Recipe("int8", INT8_DYNAMIC, INT8_DYNAMIC, BLOCKS_8, HEAD_8),
    "int4": Recipe(
        "int4",
        INT8_DYNAMIC,
        INT8_DYNAMIC,
        EVENED_4,
        HEAD_8,
        more_bits_above=_MORE_BITS_ABOVE,
        most_bits=MOST_BITS,
    ),
}
_MOST_BITS_ARE = "bits a weight of the decoder, scales included: 6.15"
# With calibration data.
CALIBRATED = {
    "int8": Recipe("int8", INT8_STATIC, INT8_STATIC, INT8_TOKEN, HEAD_8),
    "int4": replace(RECIPES["int4"], vision=INT8_STATIC, connector=INT8_STATIC, decoder=CALIBRATED_4),
    "fp8": Recipe("fp8", FP8, FP8, FP8, HEAD_8),
    "w4a8": Recipe("w4a8", INT8_STATIC, INT8_STATIC, W4A8, HEAD_8),
    "mixed": Recipe("mixed", CALIBRATED_4, CALIBRATED_4, CALIBRATED_4, HEAD_8, raised=BLOCKS_8, size=0.4),
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; raises ValueError that lists the names."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def calibrated_recipe(name: str) -> Recipe:
    """The recipe called `name` as it is with calibration data, or the one in the file of that name (.toml).

    Raises RecipeError.
    """
    if name.endswith(".toml"):
        return read_recipe(Path(name))
    known = {**RECIPES, **CALIBRATED}
    if name not in known:
        raise RecipeError(f"unknown recipe {name!r}", f"known recipes: {', '.join(known)}, or a .toml file")
    return known[name]


def at_most(recipe: Recipe, bits: float) -> Recipe:
    """`recipe` with at most so many bits a weight of the decoder, scales included; raises RecipeError for what has no
    bits to choose."""
    if not 0 < bits < math.inf:
        raise RecipeError(f"most_bits = {bits!r}", _MOST_BITS_ARE)
    if recipe.more_bits_above is None or not recipe.decoder.fewer_than_8:
        raise RecipeError(
            f"most_bits = {bits:g}, and recipe {recipe.name} gives every layer the bits that stand in it",
            "use --recipe int4",
        )
    return replace(recipe, most_bits=float(bits))


def is_quantized(recipe: Recipe) -> bool:
    """Whether a recipe rounds the decoder's weights, so that its bundle is judged by its loss."""
    return recipe.decoder.kind not in ("float32", "float16")


def part_of(recipe: Recipe, role: Role) -> Precision:
    """What `recipe` says about the components of a role; a choice is not its concern."""
    parts = {"vision": recipe.vision, "connector": recipe.connector, "text": recipe.decoder, "choice": FLOAT32}
    return parts[role]


def attention_of(recipe: Recipe, role: Role, target: str) -> Attention:
    """How a component of this role multiplies its attention in the form for `target`."""
    in_int8 = recipe.vision.kind in ("int8_dynamic", "int8_static")
    return recipe.attention if role == "vision" and in_int8 and target == "cpu" else "float"


def precision_of(recipe: Recipe, component: str, layer: str, role: Role = "text") -> Precision:
    """What `recipe` says about one linear layer of a component, by the component's role (`ModelSpec.role`)."""
    chosen = part_of(recipe, role)
    if component == DECODER and layer == HEAD:
        chosen = recipe.head
    for rule in recipe.rules:
        if fnmatchcase(component, rule.component) and fnmatchcase(layer, rule.layers):
            chosen = rule.precision
    return chosen


def check_rules(recipe: Recipe, layers: Mapping[str, Iterable[str]]) -> None:
    """Raise RecipeError for a rule that matches none of the model's layers, `layers` by component."""
    names = {(component, layer) for component, found in layers.items() for layer in found}
    for rule in recipe.rules:
        if any(fnmatchcase(c, rule.component) and fnmatchcase(n, rule.layers) for c, n in names):
            continue
        pattern = f"{rule.component}: {rule.layers}"
        near = difflib.get_close_matches(pattern, sorted(f"{c}: {n}" for c, n in names), 3, 0.3)
        raise RecipeError(
            f"recipe {recipe.name}: the rule for {pattern} matches no layer",
            f"near matches: {', '.join(near) or 'none'}; `*` stands for any text",
        )


# ---------------------------------------------------------------- TOML
_PARTS = ("vision", "connector", "decoder", "head")
_CACHES = ("float", "int8")
_ATTENTIONS = ("float", "int8")
_KEYS: Mapping[str, tuple[Any, ...]] = {
    "kind": ("float32", "float16", "int8", "int8_dynamic", "fp8", "blocks", "w4a8"),
    "bits": (2, 3, 4, 8),
    "block": BLOCKS,
    "method": ("rtn", "smoothquant", "gptq", "awq", "awq+gptq"),
    "ranges": ("minmax", "percentile", "entropy", "mse", "search", "token"),
}
_EXAMPLE = (
    'base = "int4", kv = "int8", attention = "float", more_bits_above = 0.1, most_bits = 6.15, and tables [vision], '
    f"[connector], [decoder], [head], [[rules]] with {', '.join(_KEYS)}"
)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file: a `base` (int4) and what differs from it; raises RecipeError naming the key."""
    import tomllib  # type: ignore[import-not-found, unused-ignore]  # Python 3.11, which the export needs anyway

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RecipeError(f"{path}: {e.strerror}", "--recipe takes a name or a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: {e}", f"a recipe holds {_EXAMPLE}") from None
    known = {"name", "base", "size", "kv", "attention", "more_bits_above", "most_bits", "rules", *_PARTS}
    unknown = sorted(set(data) - known)
    if unknown:
        raise RecipeError(f"{path}: unknown key {unknown[0]!r}", f"a recipe holds {_EXAMPLE}")
    base = calibrated_recipe(str(data.get("base", "int4")))
    size = data.get("size", base.size)
    if not _is_number(size) or not 0 < size <= 1:
        raise RecipeError(
            f"{path}: size = {size!r}", "size is a part of the half-precision bundle: 0.4, for base = mixed"
        )
    kv = data.get("kv", base.kv)
    if kv not in _CACHES:
        raise RecipeError(f"{path}: kv = {kv!r}", f"kv, the decoder's cache, is one of {', '.join(_CACHES)}")
    attention = data.get("attention", base.attention)
    if attention not in _ATTENTIONS:
        raise RecipeError(
            f"{path}: attention = {attention!r}",
            f"attention, that of the vision encoder on the CPU, is one of {', '.join(_ATTENTIONS)}",
        )
    above = _more_bits_above(path, data.get("more_bits_above", base.more_bits_above))
    most = _most_bits(path, data.get("most_bits", base.most_bits))
    vision, connector, decoder, head = (
        _precision(f"{path}: [{part}]", data.get(part, {}), getattr(base, part)) for part in _PARTS
    )
    listed = data.get("rules", [])
    if not isinstance(listed, list):
        raise RecipeError(f"{path}: rules = {listed!r}", "rules are tables, each under a line [[rules]]")
    rules = tuple(_rule(f"{path}: [[rules]] {i}", rule) for i, rule in enumerate(listed, 1))
    name = str(data.get("name", path.stem))
    rules = base.rules + rules
    chosen = Recipe(name, vision, connector, decoder, head, rules, base.raised, float(size), kv, above, most, attention)
    if not chosen.decoder.fewer_than_8:
        for key in ("more_bits_above", "most_bits"):
            if key in data and getattr(chosen, key) is not None:
                raise RecipeError(
                    f"{path}: {key} = {data[key]:g}, and the decoder is {chosen.decoder.kind} of "
                    f"{chosen.decoder.bits} bits",
                    "it gives more bits to a decoder in blocks of fewer than 8: leave it out",
                )
        return replace(chosen, more_bits_above=None, most_bits=None)
    if above is None:
        if "most_bits" in data:
            raise RecipeError(
                f"{path}: most_bits = {data['most_bits']!r}, and every layer keeps the bits that stand here",
                f'more_bits_above = {_MORE_BITS_ABOVE:g} instead of "never", or no most_bits',
            )
        return replace(chosen, most_bits=None)
    return chosen


def _most_bits(path: Path, value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or not 0 < value < math.inf:
        raise RecipeError(f"{path}: most_bits = {value!r}", _MOST_BITS_ARE)
    return float(value)


def _more_bits_above(path: Path, value: Any) -> float | None:
    if value in (None, "never"):
        return None
    if not _is_number(value) or not 0 <= value < math.inf:
        raise RecipeError(
            f"{path}: more_bits_above = {value!r}",
            'a KL divergence in nats, 0 or more; or "never", for fixed bits',
        )
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rule(where: str, data: Any) -> Rule:
    if not isinstance(data, Mapping) or "layers" not in data:
        raise RecipeError(f"{where}: no layers", 'a rule holds layers = "layers.0.*", and a kind')
    rest = {key: value for key, value in data.items() if key not in ("component", "layers")}
    return Rule(str(data.get("component", "*")), str(data["layers"]), _precision(where, rest, FLOAT16))


def _precision(where: str, data: Any, base: Precision) -> Precision:
    """`base` with what a table says otherwise; a kind that differs brings its own defaults."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: not a table", f"a recipe holds {_EXAMPLE}")
    for key, value in data.items():
        if key not in _KEYS:
            raise RecipeError(f"{where}: unknown key {key!r}", f"known keys: {', '.join(_KEYS)}")
        if not any(value == known and type(value) is type(known) for known in _KEYS[key]):
            raise RecipeError(f"{where}: {key} = {value!r}", f"{key} is one of {', '.join(map(str, _KEYS[key]))}")
    kind = {"int8": "int8_static"}.get(data.get("kind", base.kind), data.get("kind", base.kind))
    if kind != base.kind:
        defaults = (FLOAT32, FLOAT16, INT8_DYNAMIC, INT8_TOKEN, FP8, CALIBRATED_4, W4A8)
        base = next(precision for precision in defaults if precision.kind == kind)
    own = {"bits": ("blocks",), "block": ("blocks", "w4a8"), "ranges": ("int8_static", "fp8", "w4a8")}
    for key, kinds in own.items():
        if key in data and kind not in kinds and not (key == "bits" and data[key] == base.bits):
            said = ", ".join("int8" if known == "int8_static" else known for known in kinds)
            raise RecipeError(
                f"{where}: {key} = {data[key]!r} means nothing for kind {kind}", f"{key} belongs to kind {said}"
            )
    return replace(
        base,
        bits=data.get("bits", base.bits),
        largest_block=data.get("block", base.largest_block),
        method=data.get("method", base.method),
        ranges=data.get("ranges", base.ranges),
    )
