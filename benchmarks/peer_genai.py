"""ONNX Runtime GenAI as a worker, in an environment of its own: set-up, its own model builder, its own runtime.

python -m benchmarks.peer_genai FOLDER THREADS CAPACITY     (with the environment's interpreter)

This module runs in both environments: on top it imports the standard library only.
"""

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.worker import checked_run, serve

if TYPE_CHECKING:
    from benchmarks.checkpoints import Geometry

__all__ = ["NAME", "build", "command", "environment", "write_tokenizer"]

NAME = "onnxruntime-genai"
VERSION = "0.18.0"
TORCH = "2.13.0"
_BUILDER_NEEDS = ["onnx", "onnx_ir", "transformers>=5.20,<6"]
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def environment(folder: Path) -> Path:
    """The interpreter of an environment below `folder`, which is set up when it is not there yet (about a minute).

    It gets the ONNX Runtime that this process has. Raises SystemExit with pip's own words.
    """
    runtime = version("onnxruntime")
    home = folder / f"{NAME}-{VERSION}-onnxruntime-{runtime}"
    python, done = home / "bin" / "python", home / ".installed"
    if not done.is_file():
        print(f"setting up {home}", file=sys.stderr)
        checked_run([sys.executable, "-m", "venv", "--clear", home], f"no environment in {home}")
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch comes first and exactly, so that nothing else chooses another build of it.
        for packages in ([f"torch=={TORCH}"], [f"{NAME}=={VERSION}", f"onnxruntime=={runtime}", *_BUILDER_NEEDS]):
            checked_run([*pip, *packages], f"pip cannot install {' '.join(packages)}")
        done.touch()
    return python


def write_tokenizer(geometry: "Geometry", folder: Path) -> None:
    """What the builder demands of a checkpoint beyond the weights: a tokenizer and a class name in config.json."""
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(geometry.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))
    special = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    names = {"architectures": [_ARCHITECTURES[geometry.model_type]], "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(geometry.config | names), encoding="utf-8")


def build(python: Path, checkpoint: Path, folder: Path, block: int, prune_head: bool) -> None:
    """Build the model with 4-bit blocks of `block` weights and a head of 8-bit blocks of the same size.

    `rtn` is the one rounding whose 8-bit head the builder finds again as the tied embedding table. `prune_head`
    projects the last position only, as ours always does; the builder's default projects all of a prompt.
    """
    options = {
        "block_size": block,
        "accuracy_level": 4,
        "algo_config": "rtn",
        "matmul_mixed_precision": "last_matmul:int8",
        "prune_lm_head": str(prune_head).lower(),
    }
    pairs = [f"{key}={value}" for key, value in options.items()]
    places: list[str | Path] = ["-i", checkpoint, "-o", folder, "-c", folder.with_name("builder-cache")]
    module: list[str | Path] = [python, "-m", "onnxruntime_genai.models.builder", *places]
    checked_run([*module, "-p", "int4", "-e", "cpu", "--extra_options", *pairs], f"{NAME} cannot build the model")


def command(python: Path, folder: Path, threads: int, capacity: int) -> list[str]:
    """What starts the worker for a model that `build` wrote."""
    return [str(python), "-m", "benchmarks.peer_genai", str(folder), str(threads), str(capacity)]


class _Engine:
    def __init__(self, folder: str, threads: int, capacity: int):
        import numpy
        import onnxruntime_genai as genai  # type: ignore[import-not-found]

        self._numpy: Any = numpy
        config = genai.Config(folder)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        model = genai.Model(config)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=capacity)
        self._generator = genai.Generator(model, parameters)

    def prefill(self, ids: Sequence[int]) -> None:
        self._generator.rewind_to(0)
        self._generator.append_tokens(self._numpy.asarray(ids, self._numpy.int32))
        self._generator.generate_next_token()  # only chooses: the logits are there

    def step(self) -> None:
        if self._generator.is_done():
            raise RuntimeError("the sequence ended by itself")
        self._generator.generate_next_token()

    def logits(self, ids: Sequence[int]) -> Sequence[float]:
        self._generator.rewind_to(0)
        self._generator.append_tokens(self._numpy.asarray(ids, self._numpy.int32))
        return self._generator.get_logits()[0, -1].tolist()


if __name__ == "__main__":
    serve(lambda: _Engine(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
