"""The files around the weights: geometry, tokenizer, processor and chat template.

The layout is that of SmolVLM (Idefics3): a SigLIP-like tower, pixel shuffle and one projection,
and a Llama decoder; only the sizes are small.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

IMAGE_SIZE = 128
PATCH_SIZE = 8
SCALE_FACTOR = 2
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // SCALE_FACTOR) ** 2

PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<end_of_utterance>"
FAKE = "<fake_token_around_image>"
IMAGE = "<image>"
GLOBAL = "<global-img>"
TILES = range(1, 5)
"""Rows and columns of tiles that have a token."""
SPECIAL_TOKENS = [PAD, START, "<|im_end|>", FAKE, IMAGE, GLOBAL, END]
SPECIAL_TOKENS += [f"<row_{row}_col_{column}>" for row in TILES for column in TILES]

CHAT_TEMPLATE = (
    "<|im_start|>"
    "{% for turn in messages %}"
    "{{ turn.role | capitalize }}"
    "{{ ': ' if turn.content is string or turn.content[0].type != 'image' else ':' }}"
    "{% if turn.content is string %}{{ turn.content }}"
    "{% else %}"
    "{% for part in turn.content %}"
    "{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '<end_of_utterance>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def build_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token a digit; at most `vocabulary` tokens with the special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (START, END, PAD)],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": IMAGE_SIZE},
        max_image_size={"longest_edge": IMAGE_SIZE},
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    template = CHAT_TEMPLATE
    return Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=template)


def build_config(tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    """Sizes; every row of a decoder matrix is a multiple of 64, which block quantization likes."""
    ids: Any = tokenizer.convert_tokens_to_ids
    special: dict[str, Any] = {
        "bos_token_id": ids(START),
        "eos_token_id": ids(END),
        "pad_token_id": ids(PAD),
    }
    return Idefics3Config(
        image_token_id=ids(IMAGE),
        tie_word_embeddings=True,
        scale_factor=SCALE_FACTOR,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            **special,
        },
        **special,
    )


def write_side_files(processor: Idefics3Processor, config: Idefics3Config, folder: Path) -> None:
    """Everything but weights and config.json."""
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    text: Any = config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    ).save_pretrained(folder)
