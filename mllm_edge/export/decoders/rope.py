"""A configuration's rope to RopeSpec, for every decoder family."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.spec import RopeSpec

__all__ = ["rope_spec"]

_ORIGINAL = "original_max_position_embeddings"
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
    "longrope": ("short_factor", "long_factor", "factor", _ORIGINAL),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor",),
}
# Names that transformers 4 had: Phi-3's first for longrope, and Qwen2-VL's, where the sections say it all.
_ALIASES = {"su": "longrope", "mrope": "default"}


def rope_spec(
    config: ConfigReader,
    head_dim: int,
    *,
    partial: bool = False,
    mrope: Literal["sectioned", "interleaved"] | None = None,
) -> RopeSpec:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    `partial`: the reference applies `partial_rotary_factor`. `mrope`: its layout of `mrope_section`, None if it has no
    such thing; neither can be seen in the configuration. Raises ConfigError naming a key that is missing, that
    nothing handles, or whose value contradicts another.
    """
    values = dict(config.take("rope_parameters") or config.take("rope_scaling") or {})
    values = {key: value for key, value in values.items() if value is not None}
    theta = values.pop("rope_theta", None) or config.take("rope_theta", 10000.0)
    kind = _kind(values)
    dim = _rotary_dim(config, values, head_dim, partial)
    sections = _sections(values, dim, mrope)
    positions = config.take("max_position_embeddings")
    _fill(values, kind, positions, config.take(_ORIGINAL))
    _check(values, kind)
    if kind == "dynamic":
        if positions is None:
            raise ConfigError("rope_parameters of type dynamic need max_position_embeddings", "add it to config.json")
        values[_ORIGINAL] = positions
    return RopeSpec(
        theta=float(theta),
        dim=dim,
        kind=kind,
        factor=float(values.get("factor", 1.0)),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 4.0)),
        original_max_positions=int(values.get(_ORIGINAL, 0)),
        attention_factor=_attention_factor(kind, values),
        # 0 means the default, as in transformers.
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        truncate=bool(values.get("truncate", True)),
        short_factors=_pair_factors(values, "short_factor", dim),
        long_factors=_pair_factors(values, "long_factor", dim),
        sections=sections,
        layout=mrope or "sectioned",
    )


def _kind(values: dict[str, Any]) -> Any:
    name = values.pop("rope_type", None) or values.get("type") or "default"
    values.pop("type", None)
    kind = _ALIASES.get(name, name)
    if kind not in _REQUIRED:
        raise ConfigError(f"rope_type = {name!r} is not supported", f"supported: {', '.join(_REQUIRED)}")
    return kind


def _rotary_dim(config: ConfigReader, values: dict[str, Any], head_dim: int, partial: bool) -> int:
    """How many elements of a head turn."""
    outer = config.take("partial_rotary_factor", 1.0)
    share = values.pop("partial_rotary_factor", outer)
    if share == 1:
        return head_dim
    dim = int(head_dim * share)
    if not partial:
        raise ConfigError(
            f"partial_rotary_factor = {share!r}, which the source model does not apply", "remove it, or set it to 1"
        )
    if dim % 2 or not 0 < dim <= head_dim:
        raise ConfigError(
            f"partial_rotary_factor = {share!r} turns {dim} of {head_dim} elements of a head",
            "pairs turn: the number must be even and within the head",
        )
    return dim


def _sections(values: dict[str, Any], dim: int, layout: str | None) -> tuple[int, ...]:
    """M-RoPE's sections, () where the family has none (`_check` then refuses the keys)."""
    if layout is None:
        return ()
    sections = tuple(int(n) for n in values.pop("mrope_section", ()))
    if len(sections) != 3 or sum(sections) != dim // 2:
        raise ConfigError(
            f"mrope_section = {list(sections)!r} is not three numbers that add up to {dim // 2} pairs",
            "check rope_parameters in config.json",
        )
    interleaved = values.pop("mrope_interleaved", layout == "interleaved")
    if interleaved != (layout == "interleaved"):
        raise ConfigError(f"mrope_interleaved = {interleaved!r}, but the source model is {layout}", "remove it")
    return sections


def _fill(values: dict[str, Any], kind: str, positions: int | None, original: int | None) -> None:
    """Defaults that other keys imply: Phi-3 keeps the original length outside, YaRN and LongRoPE default to the
    context length, and their factor to the ratio of the two."""
    if original is not None and _ORIGINAL in _REQUIRED[kind]:
        values[_ORIGINAL] = original
    if kind not in ("yarn", "longrope") or positions is None:
        return
    if _ORIGINAL in values or kind == "longrope":
        values.setdefault("factor", positions / values.get(_ORIGINAL, positions))
    values.setdefault(_ORIGINAL, positions)


def _check(values: Mapping[str, Any], kind: str) -> None:
    missing = [k for k in _REQUIRED[kind] if k not in values]
    extra = [k for k in values if k not in (*_REQUIRED[kind], *_OPTIONAL.get(kind, ()))]
    if missing or extra:
        problem = f"lacks {missing[0]}" if missing else f"has {extra[0]} = {values[extra[0]]!r}, which nothing handles"
        raise ConfigError(f"rope_parameters of type {kind} {problem}", "check config.json for a mistake")


def _attention_factor(kind: str, values: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by, so that long contexts keep their attention's sharpness.

    YaRN: 0.1 · ln(factor) + 1 (arXiv 2309.00071, equation 22), with mscale and mscale_all_dim the ratio of two such.
    LongRoPE: √(1 + ln(factor) / ln(original length)) (arXiv 2402.13753).
    """
    if kind not in ("yarn", "longrope"):
        return 1.0
    factor = float(values["factor"])
    if "attention_factor" in values:
        return float(values["attention_factor"])
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(values[_ORIGINAL]))
    scale, whole = values.get("mscale"), values.get("mscale_all_dim")
    if scale and whole:
        return _yarn_scale(factor, scale) / _yarn_scale(factor, whole)
    return _yarn_scale(factor, 1.0)


def _yarn_scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _pair_factors(values: Mapping[str, Any], key: str, dim: int) -> tuple[float, ...]:
    factors = tuple(float(f) for f in values.get(key, ()))
    if key in values and len(factors) != dim // 2:
        raise ConfigError(f"{key} has {len(factors)} values, {dim // 2} pairs turn", "check config.json for a mistake")
    return factors
