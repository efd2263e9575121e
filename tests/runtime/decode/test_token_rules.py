"""What may not come next, against transformers' own logits processors over whole answers."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.decode.token_rules import TokenRules
from mllm_edge.spec import GenerationDefaults

VOCABULARY, STOPS, PROMPT = 12, (3, 5), [7, 1, 2, 1, 2, 9]
SETTINGS: list[dict[str, Any]] = [
    {"suppress_tokens": [1, 4, 11]},
    {"begin_suppress_tokens": [2, 8]},
    {"bad_words_ids": [[6], [1, 2], [2, 1, 2], [3], [9, 10, 0]]},
    {"bad_words_ids": [[7, 1, 2, 1, 2, 9, 4], [7, 1, 2, 1, 2, 9]]},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 9},
    {"min_new_tokens": 4},
    {"min_length": 9},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [0], "bad_words_ids": [[5, 1]]},
]


def tuples(value: Any) -> Any:
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_transformers(settings: dict[str, Any]) -> None:
    """Greedy answers of a model whose logits come back every fourth step, the same for both."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
    config = GenerationConfig(eos_token_id=list(STOPS), pad_token_id=0, **settings)
    config._eos_token_tensor = torch.tensor(STOPS)
    apply = model._get_logits_processor(config, input_ids_seq_length=len(PROMPT))
    defaults = GenerationDefaults(**{name: tuples(value) for name, value in settings.items()})
    changed = 0
    for seed in range(8):
        rules = TokenRules(defaults, PROMPT, STOPS) if TokenRules.wanted(defaults) else None
        sampler = Sampler(SamplingParams(repetition_penalty=defaults.repetition_penalty), PROMPT, rules)
        rows = np.random.default_rng(seed).normal(size=(4, VOCABULARY)).astype(np.float32) * 3
        ids = list(PROMPT)
        for row in np.tile(rows, (5, 1)):
            expected = apply(torch.tensor([ids]), torch.tensor(row)[None])[0]
            if torch.isinf(expected).all():
                break
            ids.append(sampler.sample(row))
            assert ids[-1] == int(expected.argmax())
            changed += ids[-1] != int(row.argmax())
    assert changed or settings.get("no_repeat_ngram_size") == 9 or len(settings.get("bad_words_ids", [[]])[0]) > 6


def test_nothing_is_forbidden_by_default() -> None:
    assert not TokenRules.wanted(GenerationDefaults())
    assert TokenRules(GenerationDefaults(), PROMPT, STOPS).forbidden() == set()


def test_every_setting_that_forbids_is_wanted() -> None:
    values = {"no_repeat_ngram_size": 2, "min_new_tokens": 1, "min_length": 1, "bad_words_ids": ((1,),)}
    plain = {"repetition_penalty", "max_new_tokens", "stop_strings", "top_k", "top_p", "min_p"}
    for field in dataclasses.fields(GenerationDefaults):
        if field.name not in plain:
            assert TokenRules.wanted(GenerationDefaults(**{field.name: values.get(field.name, (1,))})), field.name


def test_all_logits_are_needed() -> None:
    rules = TokenRules(GenerationDefaults(suppress_tokens=(1,)), PROMPT, STOPS)
    assert Sampler(SamplingParams(), PROMPT, rules).needs is None
    assert Sampler(SamplingParams(temperature=1.0, top_k=5), PROMPT, rules).needs is None
    assert Sampler(SamplingParams(), PROMPT).needs == 1
