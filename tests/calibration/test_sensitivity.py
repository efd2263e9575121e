"""What rounding layers costs at the logits, and what recipes make of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mllm_edge.bundle import Bundle
from mllm_edge.calibration.data import Sample, load_samples
from mllm_edge.calibration.linears import find_layers
from mllm_edge.calibration.quantize_job import layers_of
from mllm_edge.calibration.sensitivity import Unit, affordable, answered, measure, measure_ways
from mllm_edge.calibration.whole import of_rounding
from mllm_edge.export.pipeline import export
from mllm_edge.graph.precision import BLOCKS_4
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.vlm import VLM
from tests.export.test_quantize import samples
from tests.tiny import save_tiny_idefics3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("sensitivity")
    save_tiny_idefics3(folder / "model")
    export(str(folder / "model"), folder / "fp16", recipe_name="fp16", verify_mode="off")
    return Bundle.load(folder / "fp16")


def noisy(bundle: Bundle, part: float) -> Callable[[str, str], np.ndarray]:
    """Weights with noise of that part of their size."""

    def weight(component: str, name: str) -> np.ndarray:
        graph = ir.load(bundle.listed(bundle.variant(component, "cpu").file)).graph
        exact = next(layer for layer in find_layers(graph) if layer.name == name).read_weight()
        random = np.random.default_rng(0)
        return (exact + part * exact.std() * random.standard_normal(exact.shape)).astype(np.float32)

    return weight


def units(bundle: Bundle) -> list[Unit]:
    found = []
    for component in bundle.manifest.components:
        graph = ir.load(bundle.listed(bundle.variant(component, "cpu").file)).graph
        found += [Unit(component, (layer.name,)) for layer in find_layers(graph) if layer.name != "lm_head"]
    return found


def test_losses_are_of_the_unit_alone(bundle: Bundle, tmp_path: Path) -> None:
    chosen = units(bundle)
    held = answered(load_samples(samples(4))[:2])
    exact = measure(bundle, OnnxRuntimeCpu(), held, chosen, noisy(bundle, 0.0), tmp_path / "exact")
    some = measure(bundle, OnnxRuntimeCpu(), held, chosen, noisy(bundle, 0.05), tmp_path / "some")
    more = measure(bundle, OnnxRuntimeCpu(), held, chosen, noisy(bundle, 0.1), tmp_path / "more")
    assert {unit.component for unit in chosen} == {"vision_encoder", "connector", "decoder"}
    assert max(exact.values()) < 1e-6
    assert min(some.values()) > 1e-6
    # A divergence grows as the square of the error.
    ratios = [more[key] / some[key] for key in some]
    assert 2.5 < np.median(ratios) < 6


def test_measured_units_are_not_measured_again(bundle: Bundle, tmp_path: Path) -> None:
    chosen, held = units(bundle)[:3], answered(load_samples(samples(4))[:1])
    stop = noisy(bundle, 0.1)

    def interrupted(component: str, layer: str) -> np.ndarray:
        if layer == chosen[2].layers[0]:
            raise KeyboardInterrupt
        return stop(component, layer)

    with pytest.raises(KeyboardInterrupt):
        measure(bundle, OnnxRuntimeCpu(), held, chosen, interrupted, tmp_path)
    asked: list[str] = []

    def rest(component: str, layer: str) -> np.ndarray:
        asked.append(layer)
        return stop(component, layer)

    found = measure(bundle, OnnxRuntimeCpu(), held, chosen, rest, tmp_path)
    assert asked == list(chosen[2].layers)
    assert set(found) == {unit.key for unit in chosen}


def test_what_large_models_can_afford() -> None:
    assert affordable(168, 230e6) == 4
    assert affordable(220, 7e9) == 0
    assert 0 < affordable(200, 5e8) < 4


def test_along_answers_is_the_divergence_of_the_proofs_tokens(bundle: Bundle, tmp_path: Path) -> None:
    """A head with doubled weights doubles the logits."""
    held = load_samples(samples(4))[:2]

    def doubled(name: str) -> np.ndarray:
        return 2 * noisy(bundle, 0.0)("decoder", name)

    unit = Unit("decoder", ("lm_head",))
    ways, folder = {"doubled": doubled}, tmp_path / "doubled"
    kl, agreement = measure_ways(bundle, OnnxRuntimeCpu(), answered(held), unit, ways, folder)["doubled"]
    expected = []
    with VLM.load(bundle.path) as vlm:
        for sample in held:
            prompt = vlm.processor.process(sample.prompt, sample.images)
            if sample.answer is None:
                answer = np.array(vlm.generate(sample.prompt, sample.images, max_new_tokens=32).token_ids)
            else:
                answer = np.array([*vlm.tokenizer.encode(sample.answer, add_special_tokens=False), *vlm.stop_ids])
            logits = torch.tensor(vlm.score(vlm.encode(prompt), answer)).double()
            p, q = logits.log_softmax(1), (2 * logits).log_softmax(1)
            expected.append((p.exp() * (p - q)).sum(1).numpy())
    np.testing.assert_allclose(kl, np.concatenate(expected), rtol=1e-3, atol=1e-9)
    assert agreement.all()
    assert not (tmp_path / "doubled").exists()


def test_prompts_that_leave_no_room_tell_nothing(bundle: Bundle, tmp_path: Path) -> None:
    unit = Unit("decoder", ("lm_head",))
    ways = {"same": lambda name: noisy(bundle, 0.0)("decoder", name)}
    kl, same = measure_ways(bundle, OnnxRuntimeCpu(), lambda vlm: [], unit, ways, tmp_path / "none")["same"]
    assert len(kl) == len(same) == 0
    layers = layers_of(bundle, "decoder")
    assert of_rounding(bundle, OnnxRuntimeCpu(), full(bundle), layers, lambda name: BLOCKS_4, tmp_path / "none") is None


def full(bundle: Bundle) -> list[Sample]:
    """A prompt that fills the context to its last token."""
    with VLM.load(bundle.path) as vlm:
        words = ["a"]
        while len(vlm.processor.process(" ".join(words)).token_ids) < vlm.context_length:
            words += ["a"] * max(1, (vlm.context_length - len(vlm.processor.process(" ".join(words)).token_ids)) // 4)
        return [Sample(" ".join(words), (), None, "line 1")]
