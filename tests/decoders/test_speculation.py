"""Guesses checked by every decoder in every dialect: windows, caps, experts, ropes of all kinds, both caches.

The tokens are those of single steps, whether guesses come true or not; the cache holds the same.
"""

from pathlib import Path

import numpy as np
import pytest

from mllm_edge.errors import OptionError
from mllm_edge.export.checkpoint.safetensors import open_weights
from mllm_edge.export.decoders.build import DIALECTS
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.generate import generate
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.decode.state import Snapshot
from mllm_edge.runtime.prompt.embedder import Embedder
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import EmbeddingSpec
from tests.decoders.models import CAPACITY, CONFIGS, LIMIT, decoder_spec, open_decoder, random_model, save_checkpoint
from tests.runtime.test_speculation import Known

IDS = np.array([3, 14, 15, 92])
TOKENS = 24


@pytest.mark.parametrize("name", CONFIGS)
def test_guesses_change_no_token(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    save_checkpoint(model, tmp_path)
    weights = open_weights(tmp_path)
    table = model.get_input_embeddings().weight.detach().numpy()
    embed = Embedder(table, EmbeddingSpec("", len(table)))
    spec = decoder_spec(model.config, weights)
    for dialect in DIALECTS:
        folder = tmp_path / dialect
        folder.mkdir()
        decoder = open_decoder(spec, weights, dialect, folder)
        if not decoder.rewindable:
            setting = (Sampler(SamplingParams()), (), TOKENS, Trace())
            decoder.reset(CAPACITY)
            with pytest.raises(OptionError, match="recurrent state, from which a token that was guessed wrong"):
                next(generate(decoder, embed, Encoded(embed(IDS)), *setting, guesser=Known([1, 2], 6, 0.0)))
            continue

        def run(guesser: Known | None, trace: Trace) -> tuple[list[int], Snapshot]:
            cache = decoder.reset(CAPACITY)  # noqa: B023
            shifted = np.stack([np.arange(4), [0, 1, 1, 2], [0, 1, 2, 2]]) if name == "qwen2_vl" else None
            setting = (Sampler(SamplingParams()), (), TOKENS, trace)
            ids = list(generate(decoder, embed, Encoded(embed(IDS), shifted), *setting, guesser=guesser))  # noqa: B023
            return ids, cache.snapshot()

        expected, plain = run(None, Trace())
        for wrong in (0.0, 0.3):
            trace = Trace()
            found, snapshot = run(Known(expected, 6, wrong), trace)
            assert found == expected, (dialect, wrong)
            assert snapshot.lengths == plain.lengths
            for a, b in zip(snapshot.rows, plain.rows, strict=True):
                np.testing.assert_allclose(a, b, atol=2e-4)
            accepted, guessed = trace.counts["accepted"], trace.counts["guessed"]
            assert accepted == guessed if wrong == 0 else accepted < guessed or name == "dynamic"
            if name == "dynamic":
                # Places 4 to 7 have the frequencies of the limit; each later one has its own.
                assert accepted <= LIMIT - len(IDS)
            else:
                assert accepted > 5
