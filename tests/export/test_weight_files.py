"""Which files of a checkpoint count: transformers' choice, told where there was one, and true reasons for none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from mllm_edge.errors import SourceError, WeightsError
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.checkpoint.source_weights import source_weights
from mllm_edge.export.pipeline import export
from tests.tiny import save_tiny_llava

HEAD, INDEX = "language_model.lm_head.weight", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "m"
    save_tiny_llava(folder, shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "m"
    save_tiny_llava(folder, seed=2)
    return folder


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "m"))


def head(folder: Path) -> np.ndarray:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).lm_head.weight.detach().numpy()


def read(folder: Path) -> tuple[np.ndarray, str]:
    """The head as it is exported, and what was told."""
    source = open_source(str(folder))
    return source_weights(source).read(HEAD), "\n".join(source.notices)


def reason(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        source_weights(open_source(str(folder)))
    assert caught.value.fix
    return str(caught.value)


# ---------------------------------------------------------------- several sets
def complete(folder: Path) -> None:
    pass


def no_shard(folder: Path) -> None:
    for path in folder.glob("model-*.safetensors"):
        path.unlink()


def one_shard_less(folder: Path) -> None:
    next(folder.glob("model-*.safetensors")).unlink()


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (complete, "two complete sets"),
        (no_shard, "(0 of the "),
        (one_shard_less, "left aside ("),
        (broken_index, "broken and left aside"),
    ],
)
def test_one_file_wins_over_an_index(folder: Path, single: Path, change: Callable[[Path], None], word: str) -> None:
    shutil.copy(single / "model.safetensors", folder)
    change(folder)
    found, told = read(folder)
    np.testing.assert_array_equal(found, head(folder))
    np.testing.assert_array_equal(found, head(single))
    assert word in told
    assert "model.safetensors is read" in told
    assert INDEX in told


def test_an_index_of_the_one_file_is_nothing_to_tell(tmp_path: Path, single: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m"))
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert read(folder)[1] == ""


def test_shards_that_the_index_does_not_name(folder: Path, single: Path) -> None:
    shutil.copy(single / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    found, told = read(folder)
    np.testing.assert_array_equal(found, head(folder))
    assert "model-00001-of-00001.safetensors not read" in told


def test_configuration_names_the_file(folder: Path, single: Path) -> None:
    shutil.copy(single / "model.safetensors", folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    found, _ = read(folder)
    np.testing.assert_array_equal(found, head(folder))
    np.testing.assert_array_equal(found, head(single))
    for name, words in {"gone.safetensors": "is missing", "../m.safetensors": "no safetensors file of this"}.items():
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        assert words in reason(folder)


def test_export_of_a_folder_with_a_left_over_index(folder: Path, single: Path, tmp_path: Path) -> None:
    shutil.copy(single / "model.safetensors", folder)
    no_shard(folder)
    report = export(str(folder), tmp_path / "out", recipe_name="fp32")
    assert report.parity["greedy_agreement"] == 1
    assert any(INDEX in text for text in report.notices)


# ---------------------------------------------------------------- none
@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_broken_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    assert "not a safetensors index" in reason(folder)


def test_missing_shards(folder: Path) -> None:
    one_shard_less(folder)
    assert "is missing" in reason(folder)
    no_shard(folder)
    assert "and " in reason(folder)


def test_index_that_leaves_the_folder(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    assert "no file of this folder" in reason(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model-00001-of-00002.safetensors"], ["shards", INDEX]),
        (["consolidated.safetensors"], ["consolidated.safetensors", "transformers"]),
        (["model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["pytorch_model.bin"], ["pickled (pytorch_model.bin)"]),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "training_args.bin"], ["pickled"]),
        (["consolidated.00.pth"], ["pickled (consolidated.00.pth)"]),
        (["model-Q4_K_M.gguf", "mmproj.gguf"], ["GGUF"]),
        (["adapter_config.json", "adapter_model.safetensors"], ["an adapter without its model", "--adapter"]),
        (["training_args.bin"], ["no model.safetensors here"]),
    ],
)
def test_what_a_folder_without_weights_holds(tmp_path: Path, single: Path, names: list[str], words: list[str]) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))
    for name in names:
        (folder / name).write_bytes(
            b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}' if name == "adapter_config.json" else b"{}"
        )
    for word in words:
        assert word in reason(folder)


def test_link_to_a_file_that_is_gone(tmp_path: Path, single: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "link to a file that is gone" in reason(folder)


def test_pointers_of_git_lfs(tmp_path: Path, single: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n"
    (folder / "model.safetensors").write_text(pointer)
    assert "git-lfs" in reason(folder)
    (folder / "config.json").write_text(pointer)
    with pytest.raises(SourceError, match="git-lfs"):
        open_source(str(folder))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        "F32",
    ],
)
def test_header_that_makes_no_sense(tmp_path: Path, single: Path, entry: object) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m"))
    header = json.dumps({"a": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    assert "header is broken" in reason(folder)


# ---------------------------------------------------------------- quantized
QUANTIZED = {
    "bitsandbytes": ("weight.absmax", torch.float32),
    "bitsandbytes_8bit": ("SCB", torch.float32),
    "gptq": ("g_idx", torch.int32),
    "awq": ("qweight", torch.int32),
    "compressed-tensors": ("weight_packed", torch.int32),
    "fp8": ("weight_scale_inv", torch.float32),
    "fbgemm_fp8": ("weight_scale", torch.bfloat16),
    "modelopt": ("weight_scale_2", torch.float32),
    "exl2": ("q_weight", torch.int32),
    "hqq": ("W_q", torch.uint8),
    "aqlm": ("codebooks", torch.float16),
    "mxfp4": ("up_proj_blocks", torch.uint8),
    "torchao": ("_weight_qdata", torch.int8),
    "quanto": ("weight._data", torch.int8),
}


def quantize(folder: Path, part: str, dtype: torch.dtype, settings: dict[str, object] | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("language_model.model.layers.0.self_attn.q_proj.weight"))
    tensors[f"{name.removesuffix('weight')}{part}"] = torch.zeros(4, 4, dtype=dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    add_settings(folder, settings)


def add_settings(folder: Path, settings: dict[str, object] | None, key: str = "quantization_config") -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **({key: settings} if settings else {})}))


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_named(single: Path, tmp_path: Path, method: str, stated: bool) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m"))
    quantize(folder, *QUANTIZED[method], {"quant_method": method} if stated else None)
    text = reason(folder)
    assert "quantized by" in text
    assert "full-precision" in text
    if stated:
        assert method.lower().split("_")[0] in text.lower()
    else:
        assert "config.json does not say so" in text


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint32, torch.float8_e4m3fn])
def test_packed_weights_are_quantized(single: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.self_attn.q_proj.weight"))
    tensors[name] = torch.zeros(8, 1).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    add_settings(folder, {"quant_method": "fp8", "_name": "x"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "maker/whole"}))
    assert "quantized by FP8" in reason(folder)
    assert "maker/whole" in reason(folder)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("quantization_config", {"load_in_8bit": True}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128}),
        ("quantization_config", {"quant_method": "awq", "bits": 4}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization_config", {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        ("quantization_config", {"quant_method": "something_new"}),
        ("quantization_config", {"bits": 4}),
        ("text_config", {"quantization_config": {"quant_method": "awq", "bits": 4}}),
        ("quantization", {"group_size": 64, "bits": 4}),
    ],
)
def test_settings_left_over_on_float_weights(
    single: Path, tmp_path: Path, key: str, settings: dict[str, object]
) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    add_settings(folder, {**config.get(key, {}), **settings}, key)
    report = export(str(folder), tmp_path / "out", recipe_name="fp32")
    assert report.parity["greedy_agreement"] == 1
    assert any("the weights are float" in text for text in report.notices)


def test_settings_that_say_nothing(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    source = open_source(str(folder))
    source_weights(source)
    assert not len(source.notices)


def test_float8_without_scales_is_read_as_it_stands(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.self_attn.q_proj.weight"))
    tensors[name] = tensors[name].to(torch.float8_e5m2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = open_source(str(folder))
    np.testing.assert_array_equal(source_weights(source).read(name), tensors[name].float().numpy())
    assert "float8 without scales" in "".join(source.notices)
