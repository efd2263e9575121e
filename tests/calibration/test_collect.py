"""What is recorded of a model whose positions follow the images' grids: every encoder input, and the answer's
positions behind the prompt's."""

from pathlib import Path

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.collect import Feeds, record
from mllm_edge.calibration.data import Sample
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.vlm import VLM
from tests.tiny import save_tiny_qwen2_vl


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_qwen2_vl(folder)
    out = tmp_path_factory.mktemp("bundle") / "fp32"
    export(str(folder), out, recipe_name="fp32", verify_mode="off")
    return out


def pictures(*sizes: tuple[int, int]) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    return tuple(random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes)


def test_an_answer_in_one_piece_has_the_logits_of_one_step_by_step(bundle: Path) -> None:
    with VLM.load(bundle) as vlm:
        prompt = vlm.processor.process("Compare.", pictures((40, 200), (70, 33)))
        assert prompt.positions is not None
        assert prompt.positions.max() + 1 < len(prompt.token_ids)  # places in the sequence would not do
        encoded = vlm.encode(prompt)
        (tokens,) = vlm.greedy([encoded], 8)
        logits = vlm.score(encoded, tokens)
        np.testing.assert_array_equal(logits.argmax(axis=1), tokens)
        vlm.decoder.reset(len(encoded) + len(tokens))
        steps = [vlm.decoder.forward(encoded).copy()]
        steps += [vlm.decoder.forward(vlm.embed(tokens[i : i + 1])).copy() for i in range(len(tokens) - 1)]
        np.testing.assert_allclose(logits, steps, atol=1e-4 * np.ptp(logits))


def test_recorded_feeds_are_what_the_components_run_with(bundle: Path, tmp_path: Path) -> None:
    sample = Sample("Compare.", pictures((40, 200), (70, 33)), "the first", "here")
    record(Bundle.load(bundle), OnnxRuntimeCpu(), [sample], tmp_path)
    encoder, decoder = Feeds(tmp_path / "vision_encoder"), Feeds(tmp_path / "decoder")
    with VLM.load(bundle) as vlm:
        prompt = vlm.processor.process(sample.prompt, sample.images)
        assert len(encoder) == len(prompt.layouts) == 2  # one run per image
        for i, layout in enumerate(prompt.layouts):
            feeds = encoder.read(i, ["pixel_values", "cos", "sin"])
            assert {name: len(array) for name, array in feeds.items()} == dict.fromkeys(
                feeds, layout.rows * layout.cols
            )
            assert set(feeds) == {"pixel_values", "cos", "sin"}
        variant = vlm.bundle.variant("decoder", "cpu")
        found = decoder.read(0, [tensor.name for tensor in variant.inputs])
        assert set(found) == {tensor.name for tensor in variant.inputs}
        assert len(decoder) == 1
        # The table holds a row for each token of prompt and answer; the prompt's last one is not at its place.
        tokens, place = len(prompt.token_ids), int(prompt.positions[0, -1])
        assert found["inputs_embeds"].shape[1] > tokens
        rope = vlm.spec.positions.ropes[0]
        first = float(rope.theta**0)
        np.testing.assert_allclose(found["cos"][tokens - 1, 0], np.cos(place * first), atol=1e-5)
        np.testing.assert_allclose(found["cos"][tokens, 0], np.cos((place + 1) * first), atol=1e-5)
