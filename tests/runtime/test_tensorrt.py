"""The TensorRT backend on a stand-in for TensorRT and CUDA: answers equal those of ONNX Runtime on the same graphs."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_edge.bundle import Bundle
from mllm_edge.errors import BackendError, BundleError, ContextError, OptionError
from mllm_edge.export.pipeline import export
from mllm_edge.runtime.backends import tensorrt as backend
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.backends.tensorrt_build import modules
from mllm_edge.runtime.backends.tensorrt_engines import FOLDER, Limits, find_engine, make_engine
from mllm_edge.runtime.build import build_engines, plan_build
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.limits import MOST_ROWS
from mllm_edge.runtime.vlm import VLM
from mllm_edge.spec import DEEPSTACK
from tests.families.row import families_of
from tests.runtime.tensorrt_stand_in import StandIn, install
from tests.tiny import save_tiny_idefics3

TARGETS = ("tensorrt", "tensorrt-10.3")
IMAGES = [np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8) for seed, size in enumerate([(50, 90, 3)])]
# Prompts of unequal lengths, one after the other, so that memory grows and is used again.
QUESTIONS: list[tuple[str, list[np.ndarray]]] = [
    ("Hello.", []),
    ("Tell me what is in the picture. " * 5, IMAGES),
    ("Hi.", []),
    ("And now?", IMAGES),
]


@pytest.fixture(scope="module", params=families_of(""))
def exported(request: pytest.FixtureRequest, floats: Callable[[str], Path]) -> Path:
    return floats(request.param)


def load(path: Path, target: str, **options: Any) -> tuple[VLM, list[str]]:
    """The model on TensorRT, and what it gave notice of."""
    notices: list[str] = []
    return VLM.load(path, backend=target, notice=notices.append, **options), notices


def reference(path: Path, target: str) -> VLM:
    return VLM(Bundle.load(path), OnnxRuntimeCpu(target=target))


def answers(vlm: VLM) -> list[tuple[int, ...]]:
    options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
    return [vlm.generate(text, images, **options).token_ids for text, images in QUESTIONS]


# ---------------------------------------------------------------- answers
@pytest.mark.parametrize("target", TARGETS)
def test_answers_are_those_of_onnxruntime(machine: StandIn, exported: Path, tmp_path: Path, target: str) -> None:
    path = Path(shutil.copytree(exported, tmp_path / "bundle"))
    with reference(path, target) as vlm:
        expected = answers(vlm)
    vlm, notices = load(path, target)
    with vlm:
        assert vlm.backend.name == target
        assert answers(vlm) == expected
        assert answers(vlm) == expected
        counts = [vlm.count_tokens(text, [i.shape[:2] for i in images]) for text, images in QUESTIONS]
        lengths = [vlm.spec.begun(count) for count in counts]
        new = sum(length + 23 for length in lengths)
        growing = [spec for spec in vlm.spec.state if spec.kind == "growing"]
        # A prompt as short as a step of several tokens is run as one, and its logits are brought to their place.
        logits = 4 * vlm.spec.vocab_size * 2 * sum(length <= MOST_ROWS for length in lengths)
    assert len(notices) == machine.counts["builds"] == len(vlm.bundle.manifest.components) >= 2
    assert all("building the engine" in notice and "GB of memory" in notice for notice in notices)
    # Caches are never copied; new rows of an append cache are, which every step leaves at the same place.
    row, copied = 4 * sum(spec.values(1) for spec in growing), machine.counts["bytes copied on the device"] - logits
    assert copied == 0 if target == "tensorrt" else 0 < copied <= 2 * new * row
    # Steps keep their shapes and addresses for 64 tokens.
    assert machine.counts["replays"] > 100
    assert not machine.memory, "everything was freed"


def test_tensorrt_for_rtx(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = install(monkeypatch, "1.7.1", (8, 6), rtx=True)
    with reference(bundle, "tensorrt") as vlm:
        expected = answers(vlm)
    vlm, notices = load(bundle, "auto")
    with vlm:
        assert vlm.backend.name == "tensorrt"
        assert answers(vlm) == expected
    assert all("for sm86 with TensorRT for RTX 1.7.1, once" in notice for notice in notices)
    assert machine.counts["builds"] == 3
    assert not list((bundle / FOLDER).glob("timings*"))


def test_kernels_that_tensorrt_for_rtx_compiles_are_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = install(monkeypatch, "1.7.1", (8, 6), rtx=True)
    with load(bundle, "tensorrt")[0] as vlm:
        assert not list((bundle / FOLDER).glob("*.engine.cache"))
        vlm.generate("Hi.", max_new_tokens=2)
        caches = sorted((bundle / FOLDER).glob("*.engine.cache"))
        assert len(caches) == 3, "however the process ends"
        expected = answers(vlm)
    assert machine.counts["caches taken"] == machine.counts["caches refused"] == 0
    written = [cache.read_bytes() for cache in caches]
    times = [cache.stat().st_mtime_ns for cache in caches]
    with load(bundle, "tensorrt")[0] as vlm:
        assert answers(vlm) == expected
    assert machine.counts["caches taken"] == 3
    assert [cache.stat().st_mtime_ns for cache in caches] == times, "nothing new"
    caches[0].write_bytes(b"damaged")
    with load(bundle, "tensorrt")[0] as vlm:
        assert answers(vlm) == expected
    assert machine.counts["caches refused"] == 1
    assert [cache.read_bytes() for cache in caches] == written


def test_tensorrt_itself_has_no_such_kernels(machine: StandIn, bundle: Path) -> None:
    load(bundle, "tensorrt")[0].close()
    assert not list((bundle / FOLDER).glob("*.engine.cache"))


def test_a_gpu_that_tensorrt_for_rtx_does_not_know(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "1.7.1", (9, 0), rtx=True)
    assert open_backend("auto", bundle=Bundle.load(bundle)).name == "cpu"
    vlm, notices = load(bundle, "tensorrt")
    with vlm:
        assert answers(vlm)
    assert len(notices) == 3
    assert all("TensorRT for RTX 1.7.1 does not build for sm90" in notice for notice in notices)


@pytest.mark.parametrize("target", TARGETS)
def test_engines_are_kept(machine: StandIn, bundle: Path, target: str) -> None:
    with load(bundle, target)[0] as vlm:
        first = answers(vlm)
    vlm, notices = load(bundle, target)
    with vlm:
        assert answers(vlm) == first
    assert not notices
    assert machine.counts["builds"] == 3
    assert len(list((bundle / FOLDER).glob("*.engine"))) == 3
    assert all(0 < workspace <= machine.free // 2 for workspace in machine.workspaces)


def test_graphs_can_be_switched_off(machine: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(bundle, "tensorrt")[0] as vlm:
        expected = answers(vlm)
    replays = machine.counts["replays"]
    assert replays
    monkeypatch.setenv(backend.GRAPHS, "0")
    with load(bundle, "tensorrt")[0] as vlm:
        assert answers(vlm) == expected
    assert machine.counts["replays"] == replays


def test_steps_that_cannot_be_recorded_run_all_the_same(machine: StandIn, bundle: Path) -> None:
    with load(bundle, "tensorrt")[0] as vlm:
        expected = answers(vlm)
    replays = machine.counts["replays"]
    machine.trouble["cudaGraphInstantiate"] = 900
    with load(bundle, "tensorrt")[0] as vlm:
        assert answers(vlm) == expected
    assert machine.counts["replays"] == replays


# The decoders of all, and one that cannot forget tokens.
CHECKING = [*families_of("speculation"), pytest.param("lfm2_vl", marks=pytest.mark.xdist_group("bundle-lfm2_vl"))]


@pytest.mark.parametrize("exported", CHECKING, indirect=True)
@pytest.mark.parametrize("target", TARGETS)
def test_guesses_are_checked_in_decode_steps(machine: StandIn, exported: Path, tmp_path: Path, target: str) -> None:
    """The tokens of single steps, with and without images; the decode profile takes them."""
    path = Path(shutil.copytree(exported, tmp_path / "bundle"))
    accepted = rejected = 0
    with load(path, target)[0] as vlm:
        if not vlm.decoder.rewindable:
            with pytest.raises(OptionError, match="recurrent state"):
                vlm.generate("Hi", speculation=1)
            return
        for text, images in QUESTIONS:
            options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
            for choice in ({}, {"frequency_penalty": -0.5}):
                expected = vlm.generate(text, images, **options, **choice).token_ids
                for speculation in (1, 15):
                    found = vlm.generate(text, images, speculation=speculation, **options, **choice)
                    assert found.token_ids == expected
                    m = found.metrics
                    accepted, rejected = accepted + m.accepted, rejected + m.guessed - m.accepted
    assert accepted > 50
    assert rejected > 20


def test_engines_built_for_fewer_rows(machine: StandIn, bundle: Path) -> None:
    """Those whose facts do not tell took 8; they go on working, and `build` makes new ones."""
    opened = Bundle.load(bundle)
    variant = opened.variant("decoder", "tensorrt")
    (module,) = modules(variant.minimum)
    stored = make_engine(opened, variant, module, "sm87", Limits(1024, max_rows=8))
    facts = stored.path.with_name(f"{stored.path.name}.json")
    told = json.loads(facts.read_text())
    del told["limits"]["max_rows"]
    facts.write_text(json.dumps(told))
    with load(bundle, "tensorrt")[0] as vlm:
        expected = vlm.generate("abcabc", max_new_tokens=40, ignore_eos=True, frequency_penalty=-1.0)
        found = vlm.generate("abcabc", max_new_tokens=40, ignore_eos=True, frequency_penalty=-1.0, speculation=7)
        assert found.token_ids == expected.token_ids
        assert found.metrics.accepted > 10
        with pytest.raises(BackendError, match=r"speculation=8 takes steps of 9 tokens; .* checks 8 at most") as caught:
            vlm.stream("abcabc", speculation=8)
        assert "mllm-edge build" in str(caught.value)
    plan = plan_build(bundle, target="tensorrt", max_seq=1024)
    assert [e.seconds > 0 for e in build_engines(plan, Quiet()) if e.component == "decoder"] == [True]
    with load(bundle, "tensorrt")[0] as vlm:
        assert vlm.decoder.rows == 16
        assert vlm.generate("abcabc", max_new_tokens=4, speculation=15)


class Quiet:
    def stage(self, title: str, total: int = 0) -> None: ...

    def advance(self, amount: int) -> None: ...


def test_a_long_prompt_comes_in_chunks(machine: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_edge.runtime.decode.generate.PREFILL_CHUNK", 50)
    for target in TARGETS:
        with reference(bundle, target) as vlm:
            expected = answers(vlm)
        with load(bundle, target)[0] as vlm:
            assert answers(vlm) == expected


def batch_and_again(decoder: Decoder, prompts: list[np.ndarray]) -> list[np.ndarray]:
    """Logits of a batch of prompts and of a token each behind it, the latter twice: a restored cache gives the same."""
    token = [p[:1] for p in prompts]
    cache = decoder.reset(32, batch=len(prompts))
    rows = [decoder.forward_batch(prompts).copy()]
    kept = cache.snapshot()
    rows.append(decoder.forward_batch(token).copy())
    cache.restore(kept)
    rows.append(decoder.forward_batch(token).copy())
    assert np.array_equal(rows[1], rows[2])
    return rows


@pytest.mark.parametrize("target", TARGETS)
def test_batches_and_snapshots(machine: StandIn, bundle: Path, target: str) -> None:
    opened = Bundle.load(bundle)
    variant = opened.variant("decoder", target)
    make_engine(opened, variant, modules(variant.minimum)[0], "sm87", Limits(128, max_batch=2))
    agrees_in_batches(opened, target)


def agrees_in_batches(bundle: Bundle, target: str) -> None:
    """The decoder's engines, made for a batch of two, against ONNX Runtime: batches, snapshots, chosen rows."""
    variant, model = bundle.variant("decoder", target), bundle.manifest.model
    rng = np.random.default_rng(0)
    prompts = [rng.standard_normal((n, model.hidden_size)).astype(np.float32) for n in (7, 4)]
    found = []
    for chosen in (open_backend(target), OnnxRuntimeCpu(target=target)):
        decoder = Decoder(chosen.open(bundle.listed(variant.file), variant), variant, model, chosen)
        rows = batch_and_again(decoder, prompts)
        decoder.reset(32)
        rows.append(decoder.forward(prompts[0], project=[0, 3, 6]).copy())
        found.append(rows)
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-3 * np.ptp(theirs))


def test_memory_of_other_libraries_is_used_where_it_lies(machine: StandIn, bundle: Path) -> None:
    class Lent:
        def __init__(self, buffer: Any, **changes: Any):
            facts = {"data": (buffer.address, False), "shape": buffer.shape, "typestr": "<f2", "strides": None}
            self.__cuda_array_interface__ = {"version": 3, **facts, **changes}

    opened = Bundle.load(bundle)
    variant, chosen = opened.variant("vision_encoder", "tensorrt"), open_backend("tensorrt")
    session = chosen.open(opened.listed(variant.file), variant)
    pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float16)
    expected = session.run({"pixel_values": pixels})["vision_hidden"]
    buffer: Any = chosen.allocate(pixels.shape, "float16")
    assert not buffer.read(0, 2).any()
    buffer.write(0, pixels)
    before = machine.allocated()
    found = session.run({"pixel_values": Lent(buffer)})  # type: ignore[dict-item]
    assert np.array_equal(found["vision_hidden"], expected)
    assert machine.allocated() == before
    other = machine.new_stream(blocking=False)
    for stream, waits in ((None, 0), (1, 1), (other, 1)):
        session.run({"pixel_values": Lent(buffer, stream=stream)})  # type: ignore[dict-item]
        assert machine.counts[f"waits for stream {stream}"] == waits
    assert not machine.counts["waits for all"]
    with load(bundle, "tensorrt")[0] as vlm:
        found = vlm.component("vision_encoder", {"pixel_values": Lent(buffer)})
        assert np.array_equal(found["vision_hidden"], expected)
    with pytest.raises(BackendError, match="pixel_values is float32, not float16"):
        session.run({"pixel_values": Lent(buffer, typestr="<f4")})  # type: ignore[dict-item]
    with pytest.raises(BackendError, match="pixel_values is not C-contiguous"):
        session.run({"pixel_values": Lent(buffer, strides=(2, 4, 8, 16))})  # type: ignore[dict-item]


def test_what_cannot_change_is_uploaded_once(machine: StandIn, bundle: Path) -> None:
    """Cross-attention's keys and values, for one; see `Session.run`."""
    opened = Bundle.load(bundle)
    variant = opened.variant("vision_encoder", "tensorrt")
    session = open_backend("tensorrt").open(opened.listed(variant.file), variant)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float16)

    def run(array: np.ndarray) -> tuple[int, np.ndarray]:
        before = machine.counts["bytes uploaded"]
        result = session.run({"pixel_values": array})["vision_hidden"]
        return machine.counts["bytes uploaded"] - before, result

    def fixed() -> np.ndarray:
        view = pixels.view()
        view.flags.writeable = False
        return view

    assert [run(pixels)[0] for _ in range(2)] == [pixels.nbytes] * 2
    view = fixed()
    first = [run(view) for _ in range(2)]
    assert [uploaded for uploaded, _ in first] == [pixels.nbytes, 0]
    assert np.array_equal(first[0][1], first[1][1])
    pixels *= -1
    uploaded, changed = run(fixed())
    assert uploaded == pixels.nbytes
    assert np.array_equal(changed, run(pixels)[1])
    assert not np.array_equal(changed, first[0][1])
    assert run(view)[0] == pixels.nbytes


def test_zeros_that_are_added_behind_layers_are_never_uploaded(
    machine: StandIn, floats: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of a Qwen3-VL, where no image is looked at; and again behind a prompt that has one."""
    path = Path(shutil.copytree(floats("qwen3_vl"), tmp_path / "bundle"))
    with load(path, "tensorrt")[0] as vlm:
        added = {f"{DEEPSTACK}{k}" for k in range(2)}
        for images in ([], IMAGES):
            prompt = vlm.encode(vlm.processor.process("Hello.", images))
            vlm.decoder.start(prompt, 3)
            vlm.decoder.forward(prompt)
            steps = []
            for token in range(3):
                before = machine.counts["bytes uploaded"]
                vlm.decoder.forward(vlm.embed(np.array([token])))
                steps.append(machine.counts["bytes uploaded"] - before)
            assert steps[0] == steps[1] == steps[2] > 0
            slots = vlm.decoder._session._plan.slots  # type: ignore[attr-defined]
            assert "inputs_embeds" in slots
            assert not added & set(slots)


# ---------------------------------------------------------------- limits
def test_the_context_ends_with_the_engine(machine: StandIn, bundle: Path) -> None:
    vlm, _ = load(bundle, "tensorrt", max_context=64)
    with vlm:
        assert vlm.generate("Hi.", max_new_tokens=100, ignore_eos=True).finish_reason == "length"
    vlm, notices = load(bundle, "tensorrt")  # no wish: what is there is good
    with vlm:
        assert not notices
        assert vlm.context_length == 64
        with pytest.raises(ContextError, match="the context holds 64") as caught:
            vlm.generate("x" * 100)
        assert "mllm-edge build --max-seq" in caught.value.fix
        with pytest.raises(ContextError, match="the decoder's engine holds 64"):
            vlm.decoder.reset(65)
    vlm, notices = load(bundle, "tensorrt", max_context=200)
    with vlm:
        assert vlm.context_length == 200
        assert vlm.generate("x" * 100, max_new_tokens=3, ignore_eos=True).token_ids
    assert ["decoder" in notice for notice in notices] == [True]


def test_tiles_come_in_runs_that_the_engine_takes(machine: StandIn, bundle: Path) -> None:
    opened = Bundle.load(bundle)
    for name in ("vision_encoder", "connector"):
        variant = opened.variant(name, "tensorrt")
        make_engine(opened, variant, modules(variant.minimum)[0], "sm87", Limits(64, max_images=2))
    with reference(bundle, "tensorrt") as vlm:
        expected = answers(vlm)
    with load(bundle, "tensorrt")[0] as vlm:
        assert answers(vlm) == expected
        with pytest.raises(BackendError, match=r"pixel_values is \[3, 3, 64, 64\], its engine takes") as caught:
            vlm.component("vision_encoder", {"pixel_values": np.zeros((3, 3, 64, 64))})
        assert "--max-images" in caught.value.fix


def test_more_sequences_than_the_engine_takes(machine: StandIn, bundle: Path) -> None:
    opened = Bundle.load(bundle)
    variant, chosen = opened.variant("decoder", "tensorrt"), open_backend("tensorrt")
    decoder = Decoder(chosen.open(opened.listed(variant.file), variant), variant, opened.manifest.model, chosen)
    decoder.reset(32, batch=2)
    with pytest.raises(BackendError, match="its engine takes") as caught:
        decoder.forward_batch([np.zeros((3, opened.manifest.model.hidden_size), np.float32)] * 2)
    assert "--max-batch" in caught.value.fix


# ---------------------------------------------------------------- engines that are not good
def _edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("what", ["flipped", "cut", "facts", "facts missing"])
def test_a_damaged_engine_is_built_again(machine: StandIn, bundle: Path, what: str) -> None:
    with load(bundle, "tensorrt")[0] as vlm:
        expected = answers(vlm)
    (engine,) = (bundle / FOLDER).glob("decoder*.engine")
    facts = engine.with_name(f"{engine.name}.json")
    if what == "flipped":
        _edit(engine, lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif what == "cut":
        _edit(engine, lambda data: data[:-1])
    elif what == "facts":
        facts.write_text("[]")
    else:
        facts.unlink()
    vlm, notices = load(bundle, "tensorrt")
    with vlm:
        assert answers(vlm) == expected
    assert ["decoder" in notice for notice in notices] == [True]


def test_an_engine_that_tensorrt_does_not_open_is_built_again(machine: StandIn, bundle: Path) -> None:
    load(bundle, "tensorrt")[0].close()
    machine.trouble["deserialize"] = 1
    vlm, notices = load(bundle, "tensorrt")
    vlm.close()
    assert machine.counts["builds"] == 4
    assert "does not open" in notices[0]
    machine.trouble["deserialize"] = 2
    vlm, notices = load(bundle, "tensorrt")
    vlm.close()
    assert any("vision_encoder runs on the CPU" in n and "does not open the engine" in n for n in notices)


def test_engines_of_others_are_not_taken(
    machine: StandIn, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model's, another TensorRT's, another GPU's, even under the right name."""
    load(bundle, "tensorrt")[0].close()
    opened = Bundle.load(bundle)
    variant = opened.variant("decoder", "tensorrt")
    (module,) = modules(variant.minimum)
    assert find_engine(opened, variant, module, "sm87") is not None
    assert find_engine(opened, variant, module, "sm86") is None
    save_tiny_idefics3(tmp_path / "other", seed=1)
    export(str(tmp_path / "other"), tmp_path / "changed", targets=TARGETS, recipe_name="fp16", verify_mode="off")
    shutil.copytree(bundle / FOLDER, tmp_path / "changed" / FOLDER)
    other = Bundle.load(tmp_path / "changed")
    assert find_engine(other, other.variant("decoder", "tensorrt"), module, "sm87") is None
    (engine,) = (bundle / FOLDER).glob("decoder*.engine")
    for name in (engine.name, f"{engine.name}.json"):
        shutil.copy(bundle / FOLDER / name, bundle / FOLDER / name.replace("sm87", "sm86"))
    assert find_engine(opened, variant, module, "sm86") is None
    install(monkeypatch, "10.17.0")
    (newer,) = modules(variant.minimum)
    assert find_engine(opened, variant, newer, "sm87") is None


# ---------------------------------------------------------------- what is missing
@pytest.mark.parametrize("component", ["vision_encoder", "connector", "decoder"])
def test_a_component_that_is_refused_runs_on_the_processor(machine: StandIn, bundle: Path, component: str) -> None:
    machine.refuse[f"{component}.tensorrt.onnx"] = "no kernel for this layer"
    vlm, notices = load(bundle, "tensorrt")
    with vlm:
        found = answers(vlm)
    told = [notice for notice in notices if "runs on the CPU" in notice]
    assert len(told) == 1
    assert told[0].startswith(f"{component} runs on the CPU instead of tensorrt: ")
    assert "no kernel for this layer" in told[0]
    with VLM.load(bundle, backend="cpu") as plain:
        expected = answers(plain)
    # Half precision against float32: the first tokens of most answers agree.
    assert sum(a[0] == b[0] for a, b in zip(found, expected, strict=True)) >= 3


def test_out_of_memory_while_building_says_what_would_fit(machine: StandIn, bundle: Path) -> None:
    machine.refuse["decoder"] = "Requested amount of GPU memory (9 bytes) could not be allocated."
    opened = Bundle.load(bundle)
    variant = opened.variant("decoder", "tensorrt")
    with pytest.raises(BackendError, match="not enough memory to build the engine: Requested amount") as caught:
        open_backend("tensorrt").open(opened.listed(variant.file), variant)
    assert "--max-seq" in caught.value.fix
    assert "--recipe int4" in caught.value.fix


def test_out_of_memory_while_running(machine: StandIn, bundle: Path) -> None:
    with load(bundle, "tensorrt")[0] as vlm:
        machine.free = machine.allocated() + 1000
        with pytest.raises(BackendError, match=r"cudaErrorMemoryAllocation: .* bytes wanted") as caught:
            vlm.generate("Hi.", max_new_tokens=2)
        assert "--max-seq" in caught.value.fix
        machine.free = 8 << 30
        assert vlm.generate("Hi.", max_new_tokens=2, ignore_eos=True).token_ids


def test_a_bundle_that_cannot_be_written(machine: StandIn, bundle: Path) -> None:
    (bundle / FOLDER).write_text("in the way")
    opened = Bundle.load(bundle)
    variant = opened.variant("decoder", "tensorrt")
    with pytest.raises(BackendError, match="engines cannot be stored here"):
        open_backend("tensorrt").open(opened.listed(variant.file), variant)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    install(monkeypatch, gpus=0)
    with pytest.raises(BackendError, match="no NVIDIA GPU can be used: cudaErrorInsufficientDriver"):
        VLM.load(bundle, backend="tensorrt")
    with VLM.load(bundle) as vlm:
        assert vlm.backend.name == "cpu"


def test_no_tensorrt(machine: StandIn, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"needs TensorRT ≥ 10.15 or .*, here is no TensorRT") as caught:
        VLM.load(bundle, backend="tensorrt")
    assert "mllm-edge doctor" in caught.value.fix
    with VLM.load(bundle) as vlm:
        assert vlm.backend.name == "cpu"


def test_tensorrt_that_is_too_old(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    install(monkeypatch, "10.3.0")
    with pytest.raises(BackendError, match=r"needs TensorRT ≥ 10.15 or .*, here is TensorRT 10.3.0"):
        VLM.load(bundle, backend="tensorrt")
    vlm, _ = load(bundle, "auto")
    with vlm:
        assert vlm.backend.name == "tensorrt-10.3"
        assert answers(vlm)


def test_without_the_bindings(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match="cuda-bindings are not installed") as caught:
        open_backend("tensorrt")
    assert "pip install" in caught.value.fix
    assert open_backend("auto", bundle=Bundle.load(bundle)).name == "cpu"


def test_auto_takes_tensorrt_only_where_the_bundle_has_it(machine: StandIn, bundle: Path, tiny_bundle: Path) -> None:
    assert open_backend("auto", bundle=Bundle.load(bundle)).name == "tensorrt"
    assert open_backend("auto", bundle=Bundle.load(tiny_bundle)).name == "cpu"
    assert open_backend("auto").name == "cpu"
    with pytest.raises(BundleError, match="no variant for target 'tensorrt'"):
        VLM.load(tiny_bundle, backend="tensorrt")


def test_notices_are_warnings_unless_someone_takes_them(machine: StandIn, bundle: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        VLM.load(bundle, backend="tensorrt").close()
    assert sum("building the engine" in str(w.message) for w in caught) == 3
