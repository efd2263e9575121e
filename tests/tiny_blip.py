"""Tiny random checkpoints of BLIP-2."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mllm_edge.export.families.qformer_parts import answering
from tests.tiny import Names, byte_tokenizer, random_model, save_state_dict

__all__ = ["save_tiny_blip_2"]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges; one token begins and ends a text, and is put before it."""
    core = byte_tokenizer("<pad>", "</s>", "<unk>", "<mask>", "<image>")
    core.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", core.token_to_id("</s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """The same, with a token behind each text and none before it."""
    core = byte_tokenizer("<pad>", "</s>", "<unk>", "<image>")
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", core.token_to_id("</s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _text(stated: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """An OPT, or a T5 as it is in Flan-T5."""
    if stated.get("model_type") != "t5":
        decoder = {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
        sizes = {"vocab_size": 320, "max_position_embeddings": 1024, "word_embed_proj_dim": 64}
        return {"model_type": "opt", **decoder, **sizes, **stated}
    told = dict(stated)
    depth = {"num_layers": 2, "num_decoder_layers": told.pop("num_hidden_layers", 3)}  # as others call the decoder's
    layers = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, **depth}
    scores = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    kind = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": tokenizer.pad_token_id}
    return {**layers, **scores, **kind, "vocab_size": 320, "n_positions": 1024, **told}


def save_tiny_blip_2(
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    qformer: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    image_settings: Mapping[str, Any] | None = None,
    names: Names = "saved",
    seed: int = 0,
    shard_size: str = "5GB",
) -> Any:
    """Save a random BLIP-2 with its processor files to `folder` and return the model in float32.

    The defaults: a tower of 48 px and 8 px patches with 2 layers, a Q-Former with 3 and 5 queries, an OPT with 2,
    or with the text model t5 a T5 of 2 + 3; hidden sizes 64, the Q-Former's 48.
    """
    stated = dict(text or {})
    tokenizer = t5_tokenizer() if stated.get("model_type") == "t5" else opt_tokenizer()
    made = Blip2Config(
        text_config=_text(stated, tokenizer),
        vision_config={**SIZES, "image_size": 48, "patch_size": 8, **(vision or {})},
        qformer_config={**SIZES, "hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 90, **(qformer or {})},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **{"num_query_tokens": 5, **(config or {})},
    )
    model = random_model(answering(Blip2ForConditionalGeneration), made, tokenizer, seed)
    for name, weight in model.named_parameters():
        if name.endswith(("Attention.q.weight", "Attention.k.weight")):
            weight.data *= 0.4  # T5 does not scale its scores
    model.save_pretrained(folder, max_shard_size=shard_size)
    side = made.vision_config.image_size
    images = BlipImageProcessorPil(**{"size": {"height": side, "width": side}, **(image_settings or {})})
    Blip2Processor(images, tokenizer, num_query_tokens=made.num_query_tokens).save_pretrained(folder)
    if names == "state_dict":
        save_state_dict(folder, model)
    elif names == "hub":
        _as_on_the_hub(folder)
    return model


def _as_on_the_hub(folder: Path) -> None:
    """Older forms of files: the head beside the embeddings that it is, the image processor in a file of its own, and
    no number of queries."""
    tensors = load_file(folder / "model.safetensors")
    head = tensors["language_model.model.decoder.embed_tokens.weight"].clone()
    save_file({**tensors, "language_model.lm_head.weight": head}, folder / "model.safetensors")
    stated = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(stated.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Blip2Processor"}))
