"""Every decoder in every dialect against transformers in float32, on ONNX Runtime's CPU provider.

Prefill, a chunk, single steps and truncate-then-continue run through the shipping `Decoder` and its caches; the
reference takes the same steps with its own cache. Tolerance: max|a − b| ≤ 1e-3 of the reference logits' range (seen:
below 2e-6).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_edge.errors import ExportError
from mllm_edge.export.checkpoint.safetensors import open_weights
from mllm_edge.export.decoders.build import DIALECTS
from mllm_edge.export.decoders.find import decoder_types
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.generate import generate
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.trace import Trace
from tests.decoders.models import (
    CAPACITY,
    CONFIGS,
    LIMIT,
    assert_close,
    decoder_spec,
    open_decoder,
    random_model,
    save_checkpoint,
    saved_model,
)

IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
UNUSED = ("embed", "visual", "vqmodel", "positions")  # what no decoder graph holds
THREE_AXES = ("glm4v", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True)
class Case:
    """A reference model and the decoder built from its checkpoint."""

    model: Any
    decoder: Decoder
    embeddings: np.ndarray

    def steps(self, pieces: list[list[int]], **options: Any) -> np.ndarray:
        """Logits after the last of `pieces`, [V]."""
        return [self.decoder.forward(self.embeddings[piece], **options).copy() for piece in pieces][-1]

    def reference(self, pieces: list[list[int]]) -> list[np.ndarray]:
        """The source model's logits after each of `pieces`, fed one after the other, [V] each."""
        self._forget()
        logits, cache, start = [], None, 0
        with torch.no_grad():
            for piece in pieces:
                end, options = start + len(piece), {}
                if self.model.config.model_type in THREE_AXES:
                    options["position_ids"] = torch.arange(start, end).expand(3, 1, -1)
                out = self.model(torch.tensor([piece]), past_key_values=cache, use_cache=True, **options)
                cache, start = out.past_key_values, end
                logits.append(out.logits[0, -1].numpy())
        return logits

    def _forget(self) -> None:
        """Rotary modules remember the longest sequence they have seen."""
        inner = self.model.model
        if hasattr(inner, "rotary_emb"):
            inner.rotary_emb = type(inner.rotary_emb)(self.model.config)


def embeddings_of(model: Any) -> np.ndarray:
    """Token embeddings [V, H], scaled where the model does so."""
    module = model.get_input_embeddings()
    with torch.no_grad():
        table = module(torch.arange(module.num_embeddings)).numpy()
    return table * np.float32(getattr(model.config, "embedding_multiplier", 1))


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return saved_model(request.param, folder), folder


@pytest.fixture(scope="module", params=DIALECTS)
def built(
    request: pytest.FixtureRequest, checkpoint: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    model, folder = checkpoint
    weights = open_weights(folder)
    spec = decoder_spec(model.config, weights)
    decoder = open_decoder(spec, weights, request.param, tmp_path_factory.mktemp(request.param))
    assert all(any(part in name for part in UNUSED) for name in weights.unused()), "a weight was left out"
    return Case(model, decoder, embeddings_of(model))


@pytest.fixture
def case(built: Case) -> Case:
    """An empty sequence."""
    built.decoder.reset(CAPACITY)
    return built


def test_prefill_chunk_decode_and_truncate(case: Case) -> None:
    pieces = [IDS[:5], IDS[5:LIMIT], *([token] for token in IDS[LIMIT:])]
    for piece, expected in zip(pieces, case.reference(pieces), strict=True):
        assert_close(case.steps([piece]), expected)
    cache = case.decoder.cache
    assert cache is not None
    if case.decoder.rewindable:
        cache.truncate(7)
    else:
        with pytest.raises(ValueError, match=r"of length 12 to 7: .* recurrent state has no way back"):
            cache.truncate(7)
        cache.truncate(12)
        assert_close(case.steps([[100]]), case.reference([IDS, [100]])[-1])
        cache.truncate(0)
        case.steps([IDS[:7]])
    other = [[100, 101], [102], [103]]
    assert_close(case.steps(other), case.reference([IDS[:7], *other])[-1])


def test_prompt_beyond_the_limit_whole_and_in_chunks(case: Case) -> None:
    expected = case.reference([IDS, [100]])[-1]
    assert_close(case.steps([IDS, [100]]), expected)
    case.decoder.reset(CAPACITY)
    case.steps([IDS[:5], IDS[5:]], length=len(IDS))
    assert_close(case.steps([[100]]), expected)


def test_chosen_rows(case: Case) -> None:
    expected = case.reference([IDS[:4], IDS[4:5], IDS[5:6], IDS[6:]])
    case.steps([IDS[:3]])
    rows = case.decoder.forward(case.embeddings[IDS[3:]], len(IDS), project=[0, 1, 2, len(IDS) - 4]).copy()
    alone = [case.reference([IDS[:3], IDS[3:]])[-1], expected[0]]
    assert rows.shape == (4, case.model.config.get_text_config().vocab_size)
    assert_close(rows[3], alone[0])
    if not any(rope.depends_on_length for rope in case.decoder._model.positions.ropes):
        for row, reference in zip(rows, expected[:3], strict=False):
            assert_close(row, reference)


def test_generated_tokens_with_a_prompt_in_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_edge.runtime.decode.generate.PREFILL_CHUNK", 5)
    embed: Any = lambda ids: case.embeddings[ids]  # noqa: E731
    sampler = Sampler(SamplingParams(), IDS)
    tokens = list(generate(case.decoder, embed, Encoded(case.embeddings[IDS]), sampler, (), 4, Trace()))
    expected = case.reference([IDS, *([token] for token in tokens)])
    assert tokens == [int(logits.argmax()) for logits in expected[:-1]]


def test_snapshot_survives_another_sequence(case: Case) -> None:
    case.steps([[5, 6, 7]])
    assert case.decoder.cache is not None
    snapshot = case.decoder.snapshot()
    expected = case.steps([[8], [9]])
    case.decoder.reset(CAPACITY)
    case.steps([[50, 51, 52, 53, 54]])
    case.decoder.restore(snapshot)
    np.testing.assert_array_equal(case.steps([[8], [9]]), expected)


def test_batch_of_ragged_prompts(case: Case) -> None:
    """Prompts of unequal length, ragged single steps, then ragged chunks, each as if it were alone."""
    case.decoder.reset(CAPACITY, batch=3)
    prompts = [IDS[:5], IDS[2:4], IDS[1:8]]
    turns = [prompts, [[7], [8], [9]], [[10, 11], [12], [13, 14, 15]], [[20], [21], [22]]]
    expected = [case.reference([turn[b] for turn in turns]) for b in range(3)]
    for number, turn in enumerate(turns):
        logits = case.decoder.forward_batch([case.embeddings[ids] for ids in turn])
        for b in range(3):
            assert_close(logits[b], expected[b][number])
    assert case.decoder.cache is not None
    assert case.decoder.cache.lengths.tolist() == [5 + 1 + 2 + 1, 2 + 1 + 1 + 1, 7 + 1 + 3 + 1]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", THREE_AXES)
def test_positions_on_three_axes(name: str, dialect: str, tmp_path: Path) -> None:
    """M-RoPE, with many positions equal, in prefill, a chunk and single steps."""
    model = random_model(CONFIGS[name])
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    decoder = open_decoder(decoder_spec(model.config, weights), weights, dialect, tmp_path)
    embeddings = embeddings_of(model)
    positions = np.array([[0, 1, 1, 1, 1, 3, 4, 4, 4, 6, 7, 8], [0, 1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8], [0, *range(11)]])
    for start, end in [(0, 6), (6, 10), (10, 11), (11, 12)]:
        logits = decoder.forward(Encoded(embeddings[IDS[start:end]], positions[:, start:end]))
        with torch.no_grad():
            where = torch.tensor(positions[:, None, :end])
            assert_close(logits, model(torch.tensor([IDS[:end]]), position_ids=where).logits[0, -1].numpy())
    with pytest.raises(ValueError, match=r"positions \[3, 2\]"):
        decoder.forward(Encoded(embeddings[:1], positions[:, :2]))
    assert decoder.cache is not None
    assert decoder.cache.length == len(IDS)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_positions_go_on_behind_given_ones(dialect: str, tmp_path: Path) -> None:
    """Alone, after a snapshot, in a batch of sequences with and without images, and not after the sequence's end."""
    model = random_model(CONFIGS["qwen2_vl"])
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    decoder = open_decoder(decoder_spec(model.config, weights), weights, dialect, tmp_path)
    embeddings, places = embeddings_of(model), np.arange(len(IDS))
    few = np.array([[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]])
    positions = np.concatenate([few, np.tile(np.arange(3, 9), (3, 1))], axis=1)

    def reference(ids: list[int], positions: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids]), position_ids=torch.tensor(positions)[:, None]).logits[0, -1].numpy()

    decoder.forward(Encoded(embeddings[IDS[:4]], positions[:, :4]))
    decoder.forward(Encoded(embeddings[IDS[4:6]], positions[:, 4:6]))
    assert_close(decoder.forward(embeddings[IDS[6:9]]), reference(IDS[:9], positions[:, :9]))
    assert decoder.cache is not None
    snapshot = decoder.snapshot()
    decoder.reset(CAPACITY)
    plain = np.tile(places, (3, 1))
    for start, end in [(0, 5), (5, 6)]:
        assert_close(decoder.forward(embeddings[IDS[start:end]]), reference(IDS[:end], plain[:, :end]))
    decoder.restore(snapshot)
    assert_close(decoder.forward(embeddings[IDS[9:10]]), reference(IDS[:10], positions[:, :10]))
    decoder.reset(CAPACITY, batch=2)
    decoder.forward_batch([Encoded(embeddings[IDS[:6]], positions[:, :6]), Encoded(embeddings[IDS[:5]], places[:5])])
    first, second = decoder.forward_batch([embeddings[IDS[6:9]], embeddings[IDS[5:6]]])
    assert_close(first, reference(IDS[:9], positions[:, :9]))
    assert_close(second, reference(IDS[:6], plain[:, :6]))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_deepstack_features_are_added_behind_their_layers(dialect: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS["qwen3_vl"])
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    spec = replace(decoder_spec(model.config, weights), deepstack=(0, 1))
    decoder = open_decoder(spec, weights, dialect, tmp_path)
    embeddings, random = embeddings_of(model), np.random.default_rng(3)
    visual = np.array([False, True, True, False, True, *[False] * 7])
    features = random.normal(size=(2, 3, 64)).astype(np.float32)
    per_token = {f"deepstack.{k}": np.zeros((len(IDS), 64), np.float32) for k in range(2)}
    for k in range(2):
        per_token[f"deepstack.{k}"][visual] = features[k]
    with torch.no_grad():
        hidden = model.model.language_model(
            inputs_embeds=torch.tensor(embeddings[IDS])[None],
            position_ids=torch.arange(len(IDS)).expand(3, 1, -1),
            visual_pos_masks=torch.tensor(visual)[None],
            deepstack_visual_embeds=list(torch.tensor(features)),
        ).last_hidden_state
        expected = model.lm_head(hidden)[0].numpy()
    first = {name: rows[:7] for name, rows in per_token.items()}
    assert_close(decoder.forward(Encoded(embeddings[IDS[:7]], per_token=first)), expected[6])
    assert_close(decoder.forward(embeddings[IDS[7:11]]), expected[10])
    assert_close(decoder.forward(embeddings[IDS[11:]]), expected[11])
    with pytest.raises(ValueError, match=r"no input deepstack\.2"):
        decoder.forward(Encoded(embeddings[:1], per_token={"deepstack.2": np.zeros((1, 64))}))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_image_spans_see_each_other(dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 with two images of tokens, whole and in chunks that cut none of them."""
    model = random_model(CONFIGS["gemma3"])
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    decoder = open_decoder(decoder_spec(model.config, weights, spans=True), weights, dialect, tmp_path)
    spans = np.array([0, 1, 1, 1, 1, 1, 1, 1, 0, 2, 2, 0])
    ids, embeddings = [*IDS, 100], embeddings_of(model)
    with torch.no_grad():
        mask = _gemma_masks(np.append(spans, 0), 6)
        out = model(inputs_embeds=torch.tensor(embeddings[ids])[None], attention_mask=mask)
        expected = out.logits[0].numpy()
    assert_close(decoder.forward(Encoded(embeddings[IDS], spans=spans)), expected[11])
    assert_close(decoder.forward(embeddings[100:101]), expected[12])
    decoder.reset(CAPACITY)
    monkeypatch.setattr("mllm_edge.runtime.decode.generate.PREFILL_CHUNK", 4)
    embed: Any = lambda ids: embeddings[ids]  # noqa: E731
    sampler = Sampler(SamplingParams(), IDS)
    tokens = list(generate(decoder, embed, Encoded(embeddings[IDS], spans=spans), sampler, (), 1, Trace()))
    assert tokens == [int(expected[11].argmax())]


def _gemma_masks(spans: np.ndarray, window: int) -> dict[str, torch.Tensor]:
    """Both masks of Gemma 3, from their definition: causal (and near), or in one block."""
    places = torch.arange(len(spans))
    behind = places[None] <= places[:, None]
    near = behind & (places[None] > places[:, None] - window)
    numbers = torch.tensor(spans)
    same = (numbers[None] == numbers[:, None]) & (numbers > 0)
    lowest = torch.finfo(torch.float32).min
    masks = {"full_attention": behind | same, "sliding_attention": near | same}
    return {name: torch.where(mask, 0.0, lowest)[None, None] for name, mask in masks.items()}


def test_rope_that_contrib_cannot_turn(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama3"])
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    spec = decoder_spec(model.config, weights)
    with pytest.raises(ExportError, match="8 elements of a head"):
        open_decoder(replace(spec, ropes=(replace(spec.ropes[0], dim=8),)), weights, "contrib", tmp_path)


def test_every_type_is_tested() -> None:
    tested = {config.get_text_config().model_type for config in CONFIGS.values()}
    # InternLM2's configuration is a Llama's here, and Emu3's decoder is one; those with cross-attention have tests of
    # their own.
    alike = {"internlm2", "emu3_text_model"}
    assert tested == set(decoder_types()) - alike - {"mllama_text_model", "idefics", "bart", "t5"}
