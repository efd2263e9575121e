"""Tiny random Fuyu checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import FuyuConfig, FuyuForCausalLM, FuyuProcessor, PreTrainedTokenizerFast
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from tests.tiny import Names, random_model, save_state_dict

__all__ = ["save_tiny_fuyu"]

_SPECIAL = ("<unk>", "<s>", "</s>")


def save_tiny_fuyu(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    template: str | None = None,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random Fuyu with its processor files to `folder` and return the model in float32.

    The defaults: patches of 8 px, images of at most 64 × 96 px, a decoder with 2 layers, hidden size 128.
    """
    tokenizer = _tokenizer()
    model = random_model(FuyuForCausalLM, _config(tokenizer, text, config), tokenizer, seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    patch = model.config.patch_size
    sizes = {"size": {"height": 64, "width": 96}, "patch_size": {"height": patch, "width": patch}}
    processor = FuyuProcessor(FuyuImageProcessorPil(**{**sizes, **(image_settings or {})}), tokenizer)
    processor.chat_template = template
    processor.save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder)
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    """Characters and bytes as pieces, a blank before each text; words for patches and rows are pieces like others."""
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "|SPEAKER|", "|NEWLINE|"]
    letters = ["▁", *map(chr, range(33, 127))]
    core = Tokenizer(models.Unigram([(p, 0.0) for p in pieces] + [(p, -2.0) for p in letters], 0, byte_fallback=True))
    blank = letters[0]
    core.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
    core.decoder = decoders.Sequence(
        [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _config(
    tokenizer: PreTrainedTokenizerFast, text: Mapping[str, Any] | None, config: Mapping[str, Any] | None
) -> FuyuConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    decoder = {"vocab_size": 384, "max_position_embeddings": 1024, "hidden_act": "relu2", "qk_layernorm": True}
    rope = {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5}
    return FuyuConfig(
        text_config={"model_type": "persimmon", **sizes, **decoder, "rope_parameters": rope, **(text or {})},
        image_token_id=tokenizer.convert_tokens_to_ids("|SPEAKER|"),
        **{"patch_size": 8, **(config or {})},
    )


def _as_on_the_hub(folder: Path) -> None:
    """Older forms of files: one flat configuration, and the image processor's settings alone."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    flat = {**config, **text, "rope_theta": rope["rope_theta"], "rope_scaling": None, "partial_rotary_factor": 0.5}
    (folder / "config.json").write_text(json.dumps(flat | {"model_type": "fuyu"}))
    stated = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    (folder / "processor_config.json").unlink()
