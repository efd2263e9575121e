"""llama.cpp beside our recipes: the same float reference, quantized and run by llama.cpp itself on the CPU.

Its library comes prebuilt from the package registry, into an environment of its own in the cache.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from benchmarks.real_weights_source import Source

__all__ = ["TYPES", "LlamaModel", "Unavailable", "environment", "opened", "write_gguf"]

_PACKAGES = ("cyllama==0.2.18", "numpy")  # MIT, with a static llama.cpp
_WORKER = Path(__file__).with_name("real_weights_llama_worker.py")
# Names → llama.cpp's LLAMA_FTYPE; F32 is the reference itself, and shows what else differs between the two runtimes.
TYPES = {"llama.cpp F32": 0, "llama.cpp Q4_0": 2, "llama.cpp Q4_K_M": 15, "llama.cpp Q8_0": 7}
_CONTROL = 3  # token type


class Unavailable(Exception):
    """llama.cpp cannot be had here; the message says why."""


def environment(cache: Path) -> Path:
    """The Python of an environment with llama.cpp's library, made where it is not in the cache; raises Unavailable."""
    folder = cache / "llama.cpp"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file() or ready.read_text(encoding="utf-8") != " ".join(_PACKAGES):
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *_PACKAGES])
        _run([str(python), "-c", "import cyllama.llama.llama_cpp"])
        ready.write_text(" ".join(_PACKAGES), encoding="utf-8")
    return python


def write_gguf(source: Source, tensors: dict[str, np.ndarray], table: np.ndarray, path: Path) -> None:
    """`source` with other `tensors`, in float32; `table` [words, hidden]: its embeddings, with words added at the end
    as the checkpoint has them."""
    import gguf

    kinds = gguf.GGUFValueType
    reader = gguf.GGUFReader(source.path)
    writer = gguf.GGUFWriter(path, source.fields["general.architecture"])
    added = len(table) - len(source.fields["tokenizer.ggml.tokens"])
    longer: dict[str, list[Any]] = {
        "tokenizer.ggml.tokens": [f"<added_{i}>" for i in range(added)],
        "tokenizer.ggml.token_type": [_CONTROL] * added,
        "tokenizer.ggml.scores": [0.0] * added,
    }
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value = source.fields[name]
        if name in longer:
            value = list(value) + longer[name]
        value = len(table) if name.endswith(".vocab_size") else value
        sub = field.types[1] if field.types[0] == kinds.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(table if name == "token_embd.weight" else tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class LlamaModel:
    """A GGUF file that llama.cpp has open. `bits`: of all its tensors, norms included, for each parameter."""

    bits: float
    words: int
    log: Path
    _questions: IO[bytes]
    _logits: IO[bytes]

    def score(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Logits [n, vocabulary] that each of the n tokens of the answer gets behind the prompt and those before it."""
        line = {"prompt": [int(token) for token in prompt], "answer": [int(token) for token in answer]}
        self._questions.write(json.dumps(line).encode() + b"\n")
        self._questions.flush()
        size = 4 * len(answer) * self.words
        data = self._logits.read(size)
        if len(data) < size:
            raise RuntimeError(f"llama.cpp ended while it ran the model; its log: {self.log}")
        return np.frombuffer(data, np.float32).reshape(len(answer), self.words)


@contextmanager
def opened(python: Path, reference: Path, name: str) -> Iterator[LlamaModel]:
    """The `reference` (a GGUF file in float32) as llama.cpp quantizes it to the type of that name."""
    log = reference.with_name("llama.log")
    with tempfile.TemporaryDirectory(prefix="mllm-edge-") as folder, log.open("wb") as said:
        path = Path(folder) / "quantized.gguf" if TYPES[name] else reference
        worker = [str(python), str(_WORKER)]
        if path != reference:
            subprocess.run(
                [*worker, "quantize", str(reference), str(path), str(TYPES[name])],
                check=True,
                stdout=said,
                stderr=said,
            )
        command = [*worker, "score", str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said) as process:
            yield LlamaModel(*_size(path), log, cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout))


def _size(path: Path) -> tuple[float, int]:
    """(bits a parameter, words of the vocabulary)."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    words = next(int(tensor.shape[1]) for tensor in tensors if tensor.name == "token_embd.weight")
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors), words


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as e:
        said = getattr(e, "stderr", None) or str(e)
        raise Unavailable(said.strip().splitlines()[-1]) from None
