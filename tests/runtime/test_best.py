"""The largest logits found on the device: the tokens are those of whole logits, whatever is equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.backends import tensorrt_build, tensorrt_engines
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.backends.tensorrt_best import _BEST, add_best
from mllm_edge.runtime.backends.tensorrt_build import modules
from mllm_edge.runtime.backends.top_logits import IDS, OUTPUTS, SUM, VALUES, TopLogits
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.vlm import VLM
from tests.runtime.tensorrt_stand_in import StandIn
from tests.tiny import save_tiny_idefics3

TARGETS = ("tensorrt", "tensorrt-10.3")
N = 16
IMAGE = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
# What samplers may ask; those below the line need all logits.
FEW: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 1},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
    {"temperature": 1.5, "top_k": N - 1, "min_p": 0.01},
]
ALL: list[dict[str, Any]] = [
    {"repetition_penalty": 1.1},
    {"frequency_penalty": 0.1},
    {"presence_penalty": 0.1},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.1},
]


def found_by_device(logits: np.ndarray, whole: Callable[[], np.ndarray] | None = None) -> TopLogits:
    """The N best, of equal ones any."""
    order = np.lexsort((np.random.default_rng(len(logits)).permutation(len(logits)), -logits))[:N]
    return TopLogits(logits[order], order.astype(np.int32), float(logits.sum()), whole or (lambda: logits))


# ---------------------------------------------------------------- sampling
@pytest.mark.parametrize("options", FEW)
@pytest.mark.parametrize("digits", [0, 1, 6])
def test_tokens_are_those_of_whole_logits(options: dict[str, Any], digits: int) -> None:
    """With few digits many logits are equal."""
    rng = np.random.default_rng(digits)
    whole, best = (Sampler(SamplingParams(seed=3, **options)) for _ in range(2))
    for _ in range(300):
        logits = np.round(3 * rng.standard_normal(200), digits).astype(np.float32)
        assert best.sample(found_by_device(logits)) == whole.sample(logits)


def test_more_than_the_device_found() -> None:
    logits = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    for count in (N, N + 1, 1000):
        ids, row = found_by_device(logits).row(count)
        assert ids is None
        assert row is logits


@pytest.mark.parametrize("options", [*FEW, *ALL])
def test_what_a_sampler_needs(options: dict[str, Any]) -> None:
    needs = Sampler(SamplingParams(**options)).needs
    assert needs == (None if options in ALL else options.get("top_k", 1))


def _not_asked() -> np.ndarray:
    raise AssertionError("the largest are enough")


def test_all_logits_are_asked_for_only_where_equal_ones_may_be_missing() -> None:
    logits = np.arange(100, 0, -1, dtype=np.float32)
    ids, row = found_by_device(logits, _not_asked).row(3)
    assert ids is not None
    assert ids.tolist() == [0, 1, 2]
    assert row.tolist() == [100, 99, 98]
    logits[50 : 50 + N - 3] = 98  # with the third, as many as fit in behind the first two but one
    ids, row = found_by_device(logits, _not_asked).row(2)
    assert ids is not None
    assert ids.tolist() == [0, 1]
    logits[:] = 5
    logits[7] = 6
    ids, row = found_by_device(logits, _not_asked).row(1)
    assert ids is not None
    assert ids.tolist() == [7]
    assert found_by_device(logits).row(2)[0] is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_overflow_is_found(bad: float) -> None:
    """A NaN even where the device's order hides it."""
    logits = np.linspace(0, 1, 200, dtype=np.float32)
    hidden = found_by_device(logits)
    logits[0 if np.isnan(bad) else slice(None)] = bad
    best = TopLogits(hidden.values if np.isnan(bad) else logits[:N], hidden.ids, float(logits.sum()), lambda: logits)
    with pytest.raises(ValueError, match="logits contain NaN or infinity"):
        Sampler(SamplingParams()).sample(best)


def test_masked_logits_are_no_overflow() -> None:
    logits = np.full(200, -np.inf, np.float32)
    logits[[3, 9]] = 1, 2
    assert Sampler(SamplingParams()).sample(found_by_device(logits)) == 9


# ---------------------------------------------------------------- on TensorRT
def _answers(vlm: VLM, **options: Any) -> list[tuple[int, ...]]:
    questions: list[tuple[str, list[np.ndarray]]] = [("Hello.", []), ("What is it?", [IMAGE]), ("Hi.", [])]
    options = {"max_new_tokens": 12, "ignore_eos": True, "seed": 5, **options}
    return [vlm.generate(text, images, **options).token_ids for text, images in questions]


def _load(path: Path, target: str) -> VLM:
    return VLM.load(path, backend=target, notice=lambda text: None)


@pytest.mark.parametrize("target", TARGETS)
def test_answers_are_those_of_whole_logits(machine: StandIn, bundle: Path, target: str) -> None:
    """Calls of both ways take turns; a call that needs few copies few from the device."""
    vocabulary = Bundle.load(bundle).manifest.model.vocab_size
    with VLM(Bundle.load(bundle), OnnxRuntimeCpu(target=target)) as vlm:
        assert vlm.decoder.top == 0
        expected = [_answers(vlm, **options) for options in (*FEW, *ALL)]
    few = _BEST * (4 + 4) + 4
    with _load(bundle, target) as vlm:
        assert vlm.decoder.top == _BEST
        for options, answers in zip((*FEW, *ALL), expected, strict=True):
            _answers(vlm, **options)
            machine.counts["bytes downloaded"] = 0
            vlm.generate("Hello.", max_new_tokens=12, ignore_eos=True, seed=5, **options)
            downloaded = machine.counts["bytes downloaded"]
            assert downloaded == 12 * (few if options in FEW else 4 * vocabulary)
            assert _answers(vlm, **options) == answers
    assert not machine.memory, "everything was freed"


@pytest.mark.parametrize("target", TARGETS)
def test_guesses_are_checked_by_the_largest_logits_alone(machine: StandIn, bundle: Path, target: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 48, "ignore_eos": True, "seed": 5}
    few, guessed = _BEST * (4 + 4) + 4, 0
    with _load(bundle, target) as vlm:
        for choice in FEW:
            expected = vlm.generate("Tell me. " * 4, **options, **choice)
            machine.counts["bytes downloaded"] = 0
            found = vlm.generate("Tell me. " * 4, speculation=15, **options, **choice)
            assert found.token_ids == expected.token_ids
            guessed += found.metrics.guessed
            rows = 48 - found.metrics.accepted + found.metrics.guessed
            assert machine.counts["bytes downloaded"] == few * rows
        for choice in ({"frequency_penalty": -1.0}, {"frequency_penalty": -1.0, "temperature": 0.5}):
            expected = vlm.generate("Tell me. " * 4, **options, **choice)
            found = vlm.generate("Tell me. " * 4, speculation=15, **options, **choice)
            assert found.token_ids == expected.token_ids
            assert found.metrics.accepted > 10
    assert guessed > 10
    assert not machine.memory, "everything was freed"


def test_equal_logits_are_copied_whole(machine: StandIn, bundle: Path) -> None:
    vocabulary = Bundle.load(bundle).manifest.model.vocab_size
    machine.spoil = {"logits": 0, VALUES: 0, SUM: 0}
    with _load(bundle, "tensorrt") as vlm:
        assert vlm.generate("Hi.", max_new_tokens=3, ignore_eos=True).token_ids == (0, 0, 0)
        assert machine.counts["bytes downloaded"] >= 3 * 4 * vocabulary


def test_steps_are_replayed_all_the_same(machine: StandIn, bundle: Path) -> None:
    with _load(bundle, "tensorrt") as vlm:
        _answers(vlm)
    assert machine.counts["replays"] > 20


def test_engines_without_them_go_on_working(machine: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _load(bundle, "tensorrt") as vlm:
        expected = _answers(vlm)
    for file in (bundle / "engines").iterdir():
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("mllm_edge.runtime.backends.tensorrt_build.add_best", lambda trt, network: None)
        _load(bundle, "tensorrt").close()
    builds = machine.counts["builds"]
    with _load(bundle, "tensorrt") as vlm:
        assert vlm.decoder.top == 0
        assert _answers(vlm) == expected
    assert machine.counts["builds"] == builds


def test_only_decoders_have_them(machine: StandIn, bundle: Path) -> None:
    opened, limits = Bundle.load(bundle), tensorrt_engines.Limits(64)
    for name in opened.manifest.components:
        _, options = tensorrt_engines.build_inputs(opened.variant(name, "tensorrt"), limits)
        assert options.top_logits == (name == "decoder")


def test_caches_that_are_not_updated_in_place_are_still_refused(
    machine: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.runtime.tensorrt_stand_in._Engine.get_aliased_input_tensor", lambda self, name: None)
    opened = Bundle.load(bundle)
    variant = opened.variant("decoder", "tensorrt")
    with pytest.raises(BackendError, match=r"does not update past_key_values\.0\.\w+ in place"):
        open_backend("tensorrt").open(opened.listed(variant.file), variant)


def test_some_of_them_are_none(machine: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine has all or none."""
    opened = Bundle.load(bundle)
    variant = opened.variant("decoder", "tensorrt")
    with monkeypatch.context() as patch:
        patch.setattr("mllm_edge.runtime.backends.tensorrt_best.SUM", "logits.other")
        (module,) = modules(variant.minimum)
        tensorrt_engines.make_engine(opened, variant, module, "sm87", tensorrt_engines.Limits(64))
    with pytest.raises(BackendError, match="has other inputs or outputs than its graph"):
        open_backend("tensorrt").open(opened.listed(variant.file), variant)


@pytest.mark.parametrize("recipe", ["fp16", "int4"])
def test_tensorrt_for_rtx_builds_them(recipe: str, tmp_path: Path) -> None:
    """In both dialects; what is read of the network before is what is there behind it."""
    save_tiny_idefics3(tmp_path / "checkpoint")
    export(str(tmp_path / "checkpoint"), tmp_path / "bundle", targets=TARGETS, recipe_name=recipe, verify_mode="off")
    bundle = Bundle.load(tmp_path / "bundle")
    (module,) = modules({"tensorrt_rtx": "1.0"})
    vocabulary, layers = bundle.manifest.model.vocab_size, len(bundle.manifest.model.state[0].layers)
    for target in TARGETS:
        variant = bundle.variant("decoder", target)
        path, batch = bundle.listed(variant.file), 2 if target == "tensorrt" else 1
        profiles, options = tensorrt_engines.build_inputs(variant, tensorrt_engines.Limits(64, max_batch=2))
        assert options.top_logits
        assert [ranges["logits_indices"][2] for ranges in profiles] == 2 * [(batch, 16)]
        assert profiles[-1]["inputs_embeds"][2][:2] == (batch, 16), "a step that checks 15 guesses is a decode step"
        parsed = tensorrt_build._Parsed(path, module, options.sizes)
        before = tensorrt_build._report(parsed)
        assert before.cache_updates == (2 * layers if target == "tensorrt" else 0)
        add_best(module.trt, parsed.network)
        outputs = {t.name: t for t in map(parsed.network.get_output, range(parsed.network.num_outputs))}
        assert set(outputs) == {t.name for t in variant.outputs} | set(OUTPUTS)
        assert [outputs[name].shape[-1] for name in ("logits", *OUTPUTS)] == [vocabulary, _BEST, _BEST, 1]
        kinds = {name: outputs[name].dtype.name for name in ("logits", *OUTPUTS)}
        assert kinds == {"logits": "FLOAT", VALUES: "FLOAT", IDS: "INT32", SUM: "FLOAT"}
        after = tensorrt_build._report(parsed)
        assert dict(after.layers) == {**before.layers, "TOPK": 1, "REDUCE": before.layers.get("REDUCE", 0) + 1}
        assert (after.cache_updates, after.unused_inputs) == (before.cache_updates, ())
        assert tensorrt_build.build(path, profiles, ["SM86", "SM120"], module, options).nbytes > 10_000


@pytest.mark.parametrize("target", TARGETS)
def test_a_decoder_gives_both(machine: StandIn, bundle: Path, target: str) -> None:
    opened = Bundle.load(bundle)
    variant, chosen = opened.variant("decoder", target), open_backend(target)
    decoder = Decoder(chosen.open(opened.listed(variant.file), variant), variant, opened.manifest.model, chosen)
    prompt = np.random.default_rng(0).standard_normal((7, opened.manifest.model.hidden_size)).astype(np.float32)
    decoder.reset(32)
    whole = decoder.forward(prompt).copy()
    decoder.reset(32)
    (best,) = decoder.top_logits(prompt)
    assert np.array_equal(best.values, np.sort(whole)[::-1][:_BEST])
    assert np.array_equal(whole[best.ids], best.values)
    assert best.total == pytest.approx(whole.sum(), abs=1e-3)
    assert np.array_equal(best.whole(), whole)
    decoder.reset(32)
    rows = decoder.forward(prompt, project=[0, 3, 6])
    assert np.array_equal(rows[2], whole)
    # Any number of rows, more and fewer by turns: the same memory.
    for chosen in ([0, 3, 6], [6], range(7), [2, 5]):
        decoder.reset(32)
        expected = decoder.forward(prompt, project=chosen).copy()
        for again in (chosen, [1, 4], chosen):
            decoder.reset(32)
            found = decoder.top_logits(prompt, project=again)
        for one, row in zip(found, expected, strict=True):
            assert np.array_equal(one.values, np.sort(row)[::-1][:_BEST])
            assert np.array_equal(row[one.ids], one.values)
            assert one.total == pytest.approx(row.sum(), abs=1e-3)
            assert np.array_equal(one.whole(), row)
