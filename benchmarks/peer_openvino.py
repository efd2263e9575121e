"""OpenVINO GenAI as a worker, in an environment of its own: set-up, export by optimum-intel, conversations.

python -m benchmarks.peer_openvino FOLDER THREADS BACKEND     (with the environment's interpreter)

This module runs in both environments: on top it imports the standard library only.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.worker import answer_lines, checked_run

__all__ = ["BACKENDS", "NAME", "command", "environment", "export", "export_command"]

NAME = "openvino-genai"
# Continuous batching over paged attention with prefix caching, which is its default. The other, one stateful graph
# ("SDPA"), fails in the second turn of a Qwen3-VL conversation (2026.4.1: "conflicts with the reshape pattern").
BACKENDS = ("PA",)
# torch comes first, and is named again beside what would choose another build of it: optimum-intel asks for
# torchvision, which it does not need here.
_TORCH = "torch==2.13.0"
_PACKAGES = (
    (_TORCH,),
    (_TORCH, "optimum-intel==2.2.0", "openvino==2026.4.1", "nncf==3.4.0", "openvino-tokenizers==2026.4.1.0"),
    (_TORCH, "transformers==5.0.0"),
    ("openvino-genai==2026.4.1.0",),
)


def environment(cache: Path) -> Path:
    """The interpreter of an environment below `cache`, which gets what it hasn't yet (some minutes, 5 GB).

    Raises SystemExit with pip's own words.
    """
    home = cache / _PACKAGES[1][1].replace("==", "-")
    python, done = home / "bin" / "python", home / ".installed"
    if not done.is_file():
        print(f"setting up {home}", file=sys.stderr)
        checked_run([sys.executable, "-m", "venv", "--clear", home], f"no environment in {home}")
    there = done.read_text(encoding="utf-8").splitlines() if done.is_file() else []
    pip: list[str | Path] = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for packages in _PACKAGES:
        if not set(packages) <= set(there):
            checked_run([*pip, "install", *packages], f"pip cannot install {' '.join(packages)}")
    wanted = list(dict.fromkeys(package for packages in _PACKAGES for package in packages))
    if there != wanted:
        checked_run([*pip, "uninstall", "-y", "torchvision"], "pip cannot remove torchvision")
        done.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    return python


def export_command(python: Path, checkpoint: Path, folder: Path) -> list[str | Path]:
    """What exports a model with a decoder of 4 bits to `folder`; more options may follow."""
    model: list[str | Path] = ["--model", checkpoint, "--task", "image-text-to-text", "--weight-format", "int4"]
    cli: list[str | Path] = [python.with_name("optimum-cli"), "export", "openvino"]
    return [*cli, *model, folder]


def export(python: Path, checkpoint: Path, folder: Path) -> None:
    """Export a model with a decoder of 4 bits, and its tokenizer; raises SystemExit with the exporter's words."""
    checked_run(export_command(python, checkpoint, folder), f"optimum-intel cannot export {checkpoint}")


def command(python: Path, folder: Path, threads: int, backend: str) -> list[str]:
    """What starts the worker for a model that `export` wrote, with one of BACKENDS."""
    return [str(python), "-m", "benchmarks.peer_openvino", str(folder), str(threads), backend]


class _Chat:
    """One pipeline, and the conversation it holds."""

    def __init__(self, folder: str, threads: int, backend: str):
        import numpy
        import openvino  # type: ignore[import-not-found]
        import openvino_genai as genai  # type: ignore[import-not-found]

        class First(genai.StreamerBase):
            """When the first token came; the text's own streamer keeps back some tokens."""

            def __init__(self) -> None:
                super().__init__()
                self.at: float | None = None

            def write(self, token: int | list[int]) -> Any:
                self.at = self.at or time.perf_counter()
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        self._numpy, self._openvino, self._genai, self._first = numpy, openvino, genai, First
        options: dict[str, Any] = {"ATTENTION_BACKEND": backend, "INFERENCE_NUM_THREADS": threads}
        if backend == "PA":
            scheduler = genai.SchedulerConfig()
            scheduler.enable_prefix_caching = True
            scheduler.cache_size = 2  # GB
            options["scheduler_config"] = scheduler
        self._pipeline = genai.VLMPipeline(folder, "CPU", **options)
        self._history: Any = None
        self._former: Any = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One turn of {text, tokens, image}: an image, the path of an array [H, W, 3] of uint8, begins a conversation.
        The answer: seconds to the first token by a stopwatch and by the library's metrics, prompt tokens, text."""
        images = []
        if request["image"]:
            images = [self._openvino.Tensor(self._numpy.load(request["image"])[None])]
            # What was encoded for a conversation is kept as long as that is.
            self._former, self._history = self._history, self._genai.ChatHistory()
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = request["tokens"], True
        first = self._first()
        began = time.perf_counter()
        self._history.append({"role": "user", "content": request["text"]})
        result = self._pipeline.generate(self._history, images=images, generation_config=config, streamer=first)
        self._history.append({"role": "assistant", "content": result.texts[0]})
        metrics = result.perf_metrics
        return {
            "ttft": first.at and first.at - began,
            "told": metrics.get_ttft().mean / 1000,
            "tokens": metrics.get_num_input_tokens(),
            "text": result.texts[0],
        }


if __name__ == "__main__":
    answer_lines(lambda: _Chat(sys.argv[1], int(sys.argv[2]), sys.argv[3]).answer)
