"""T5 and BART whole, as the runtime runs them: prompts are read, looked at and answered as by transformers' `generate`.

In every dialect, in float32; the graphs are compared step by step in test_cross_attention.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_edge.calibration.recipes import RECIPES
from mllm_edge.errors import ContextError
from mllm_edge.export.checkpoint.config import ConfigReader
from mllm_edge.export.checkpoint.safetensors import open_weights
from mllm_edge.export.decoders.build import DIALECTS, build_cross_kv, build_text_encoder
from mllm_edge.export.decoders.find import decoder_for, decoder_types
from mllm_edge.export.decoders.place import Place
from mllm_edge.export.plan import TEXT_POSITIONS
from mllm_edge.graph.datafile import DataFile
from mllm_edge.runtime.decode import along
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.encode import Components, encoded
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import CROSS_KV, TEXT_ENCODER, Stage, TextEncoderSpec
from tests.decoders.models import assert_close, describe, open_decoder
from tests.decoders.test_cross_attention import IDS, PAIRS, PROMPT, component, random_weights

START, MOST = 3, 20


class Whole:
    """A tiny model of transformers, its graphs in a dialect, and what the runtime makes of them."""

    def __init__(self, name: str, dialect: str, folder: Path):
        architecture, config, _ = PAIRS[name]
        torch.manual_seed(0)
        self.model = random_weights(architecture(config)).eval()
        for part, weight in self.model.named_parameters():
            if weight.ndim == 2 and (".layers." in part or ".block." in part):
                weight.data *= 3  # else answers repeat their first token, whatever was asked
        self.model.save_pretrained(folder)
        weights = open_weights(folder)
        reader = ConfigReader("config.json", config.to_dict(), type(config)().to_dict())
        place = Place("" if name.startswith("t5") else "model", tied=True)
        spec = decoder_for(config.model_type, reader, weights, place, "model_type")
        reader.take("max_position_embeddings")
        reader.finish()
        encoder = spec.encoder
        assert encoder is not None
        with DataFile(folder / "e.onnx.data") as data:
            read = build_text_encoder(encoder, weights, RECIPES["fp32"], data, dialect)
        with DataFile(folder / "c.onnx.data") as data:
            look = build_cross_kv(spec, weights, RECIPES["fp32"], data, dialect)
        runs = {
            TEXT_ENCODER: component(read, folder / "e.onnx", dialect),
            CROSS_KV: component(look, folder / "c.onnx", dialect),
        }
        assert encoder.table is not None
        self._arrays = {TEXT_POSITIONS: weights.read(encoder.table.tensor)[encoder.table.skip :]}
        model = replace(
            describe(spec),
            stages=(Stage(TEXT_ENCODER, "text", "prompt"), Stage(CROSS_KV, "text", "prompt")),
            text_encoder=TextEncoderSpec(encoder.position_spec(TEXT_POSITIONS), (START,)),
        )
        inputs = {TEXT_ENCODER: ["inputs_embeds", "attention_bias"], CROSS_KV: ["encoder_hidden_states"]}
        self._components = Components(model, inputs, lambda name, feeds: runs[name](**feeds), 1)
        self._embeddings = weights.read(encoder.embedding) * np.float32(spec.embedding_scale)
        self.decoder: Decoder = open_decoder(spec, weights, dialect, folder)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self._embeddings[ids]

    def encode(self, ids: list[int]) -> Any:
        prompt = Prompt("", np.array(ids), (), np.zeros(0, np.int64))
        return encoded(self._components, prompt, self.embed, self._arrays, Trace())

    def generated(self, ids: list[int]) -> list[int]:
        """transformers' greedy answer; without a cache, of which it makes a layer for each of the encoder's."""
        ends = {"eos_token_id": None, "pad_token_id": 0, "forced_eos_token_id": None}
        with torch.no_grad():
            found = self.model.generate(
                torch.tensor([ids]),
                decoder_start_token_id=START,
                do_sample=False,
                max_new_tokens=MOST,
                use_cache=False,
                **ends,
            )
        return [int(token) for token in found[0, 1:]]


@pytest.fixture(scope="module", params=[(name, dialect) for name in PAIRS for dialect in DIALECTS], ids="-".join)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(*request.param, tmp_path_factory.mktemp("whole"))


def test_answers_are_those_of_generate(whole: Whole) -> None:
    """One by one, and several at once, each with what it has read."""
    asked: Any = [PROMPT, IDS, PROMPT[:1]]
    expected = [whole.generated(ids) for ids in asked]
    assert len({tuple(answer) for answer in expected}) == len(asked)
    prompts, embed = [whole.encode(ids) for ids in asked], whole.embed
    for prompt, answer in zip(prompts, expected, strict=True):
        (found,) = along.greedy(whole.decoder, embed, [prompt], MOST, ())  # type: ignore[arg-type]
        assert found.tolist() == answer
    found = along.greedy(whole.decoder, embed, prompts, MOST, ())  # type: ignore[arg-type]
    assert [answer.tolist() for answer in found] == expected


def test_an_answer_is_scored_as_it_is_made(whole: Whole) -> None:
    prompt, answer = whole.encode(PROMPT), np.array(IDS)
    with torch.no_grad():
        begun = torch.tensor([[START, *IDS[:-1]]])
        reference = whole.model(input_ids=torch.tensor([PROMPT]), decoder_input_ids=begun).logits[0].numpy()
    for run in (along.score, along.steps):
        assert_close(run(whole.decoder, whole.embed, prompt, answer), reference)  # type: ignore[arg-type]
    np.testing.assert_array_equal(prompt.prompt, whole.embed(np.array(PROMPT)))
    np.testing.assert_array_equal(prompt.embeds, whole.embed(np.array([START])))


def test_a_prompt_that_is_too_long_is_named(whole: Whole) -> None:
    with pytest.raises(ContextError, match="and the text encoder reads"):
        whole.encode(PROMPT * 20)


def test_both_are_known_by_their_type() -> None:
    assert {"bart", "t5"} <= set(decoder_types())
