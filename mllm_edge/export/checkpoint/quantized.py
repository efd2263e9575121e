"""Weights that somebody quantized: told by what is stored, for config.json often says it of float weights, too."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_edge.errors import WeightsError
from mllm_edge.export.checkpoint.notices import Notices

__all__ = ["SETTINGS", "check_float", "without_quantization"]

SETTINGS = ("quantization_config", "quantization", "compression_config")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_FLOAT8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"}
# Names of tensors that only a quantized checkpoint has → who writes them.
_SIGNS = (
    (r"\.(absmax|quant_map|nested_absmax|SCB|quant_state\.bitsandbytes__\w+)$", "bitsandbytes"),
    (r"\.g_idx$", "GPTQ"),
    (r"\.(qweight|qzeros)$", "AWQ or GPTQ"),
    (r"\.(weight_packed|weight_global_scale|weight_zero_point)$", "compressed-tensors"),
    (r"\.weight_scale_2$", "ModelOpt (NVFP4)"),
    (r"\.(weight_scale_inv|weight_scales?|input_scale|activation_scale)$", "FP8 or int8 scales"),
    (r"_proj_(blocks|scales)$", "MXFP4"),
    (r"\.(q_weight|q_scale|q_invperm|q_group_map|q_groups)$", "EXL2"),
    (r"\.(trellis|suh|svh)$", "EXL3"),
    (r"\.(W_q|W_nbits)$", "HQQ"),
    (r"\.(codebooks|codes)$", "AQLM"),
    (r"(_weight_qdata|:_data|\.weight\._data|\.weight_qdata)$", "torchao or quanto"),
    (r"\.(centroids|res_centroids)$", "VPTQ"),
)
_METHODS = {
    "aqlm": "AQLM",
    "awq": "AWQ",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
}


def check_float(folder: Path, config: Mapping[str, Any], types: Mapping[str, str], notices: Notices) -> None:
    """Raise WeightsError when the tensors (name → the safetensors dtype) are quantized, saying by what; a notice tells
    of settings that float weights have left over."""
    key, method = _stated(config)
    found = _sign(types)
    floats8 = [name for name, dtype in types.items() if dtype in _FLOAT8]
    packed = [n for n, dtype in types.items() if n.endswith("weight") and dtype not in _FLOATS | _FLOAT8]
    if not found and floats8 and method:
        found = floats8[0], "FP8"
    if not found and packed:
        found = packed[0], {"U32": "MLX"}.get(types[packed[0]], f"a packed form ({types[packed[0]]})")
    if found:
        name, by = found
        raise WeightsError(
            f"{folder}: the weights are quantized by {method or by}: tensor {name} is {types[name]}"
            + ("" if method else ", and config.json does not say so"),
            f"give the full-precision model{_origin(config)}; the export quantizes it itself (--recipe)",
        )
    if method:
        notices.add(
            f"{folder / 'config.json'}: {key} says {method}, but the weights are float ({_kinds(types)}): it is left "
            "over and has no effect"
        )
    elif floats8:
        notices.add(
            f"{folder}: {len(floats8)} tensors are float8 without scales ({floats8[0]} …): read as plain numbers"
        )


def without_quantization(config: Any) -> Any:
    """A transformers configuration that says nothing of quantization: of weights that are float, see `check_float`."""
    for part in (config, *(getattr(config, name, None) for name in ("text_config", "vision_config", "llm_config"))):
        for key in SETTINGS:
            if part is not None and key in vars(part):
                delattr(part, key)
    return config


def _stated(config: Mapping[str, Any]) -> tuple[str, str]:
    """The key that speaks of quantization and the method that it names; ('', '') when there is none."""
    for part, prefix in (
        (config, ""),
        *((config.get(p), f"{p}.") for p in ("text_config", "llm_config", "vision_config")),
    ):
        for key in SETTINGS:
            settings = part.get(key) if isinstance(part, Mapping) else None
            if settings:
                return prefix + key, _method(settings if isinstance(settings, Mapping) else {})
    return "", ""


def _method(settings: Mapping[str, Any]) -> str:
    method = str(settings.get("quant_method") or settings.get("quant_library") or "")
    if not method and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if not method and {"group_size", "bits"} <= set(settings):
        method = "MLX"
    return _METHODS.get(method, method or "an unnamed method")


def _sign(types: Mapping[str, str]) -> tuple[str, str] | None:
    """The first tensor whose name tells, and whose name it is."""
    for pattern, by in _SIGNS:
        for name in types:
            if re.search(pattern, name):
                return name, by
    return None


def _origin(config: Mapping[str, Any]) -> str:
    """' (owner/name)' where config.json says which model this one was made from."""
    name = config.get("_name_or_path")
    return f" (config.json says it was made from {name})" if isinstance(name, str) and name.count("/") == 1 else ""


def _kinds(types: Mapping[str, str]) -> str:
    return ", ".join(sorted({dtype for dtype in types.values() if dtype in _FLOATS}))
