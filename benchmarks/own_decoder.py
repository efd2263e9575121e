"""This package's decoder as a worker: written by the exporter's builder, run by the shipping runtime.

python -m benchmarks.own_decoder FOLDER THREADS CAPACITY
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.checkpoints import Geometry
from benchmarks.worker import serve
from mllm_edge.json_form import from_json, to_json
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.decode.decoder import Decoder
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.decode.generate import generate
from mllm_edge.runtime.decode.sampling import Sampler, SamplingParams
from mllm_edge.runtime.prompt.embedder import Embedder
from mllm_edge.runtime.trace import Trace
from mllm_edge.spec import EmbeddingSpec, ModelSpec, Variant

if TYPE_CHECKING:
    from mllm_edge.calibration.recipes import Recipe
    from mllm_edge.graph.decoder_spec import DecoderSpec

__all__ = ["build", "command", "open_decoder"]

_GRAPH, _EMBEDDINGS, _DESCRIPTION = "decoder.onnx", "embed_tokens.npy", "decoder.json"


def command(folder: Path, threads: int, capacity: int) -> list[str]:
    """What starts the worker for a decoder that `build` wrote."""
    return [sys.executable, "-m", "benchmarks.own_decoder", str(folder), str(threads), str(capacity)]


def build(geometry: Geometry, checkpoint: Path, recipe: "Recipe", folder: Path) -> None:
    """Write graph, weights, embeddings (float16) and description of a checkpoint's decoder into `folder`."""
    from mllm_edge.export.checkpoint.config import ConfigReader
    from mllm_edge.export.checkpoint.safetensors import open_weights
    from mllm_edge.export.decoders.build import build_decoder
    from mllm_edge.export.decoders.find import decoder_for
    from mllm_edge.export.decoders.place import Place
    from mllm_edge.graph.builder import save_model, tensor_specs
    from mllm_edge.graph.datafile import DataFile
    from mllm_edge.graph.dialects.contrib import Contrib

    folder.mkdir()
    weights = open_weights(checkpoint)
    reader = ConfigReader("config.json", geometry.config, {})
    spec = decoder_for(geometry.model_type, reader, weights, Place(tied=True), "model_type")
    with DataFile(folder / f"{_GRAPH}.data") as data:
        model = build_decoder(spec, weights, recipe, data, "contrib")
    save_model(model, folder / _GRAPH)
    embeddings = weights.use("model.embed_tokens.weight", (geometry.vocab_size, geometry.hidden_size))()
    np.save(folder / _EMBEDDINGS, embeddings.astype(np.float16))
    inputs, outputs = tensor_specs(model.graph.inputs), tensor_specs(model.graph.outputs)
    variant = Variant("cpu", "contrib", recipe.name, _GRAPH, inputs, outputs, "in_place", Contrib.minimum(spec))
    description = {"model": to_json(_model_spec(geometry, spec)), "variant": to_json(variant)}
    (folder / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def _model_spec(geometry: Geometry, spec: "DecoderSpec") -> ModelSpec:
    return ModelSpec(
        family="benchmark",
        model_type=geometry.model_type,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        context_length=geometry.config["max_position_embeddings"],
        parameters=0,
        embedding=EmbeddingSpec(_EMBEDDINGS, spec.vocab_size),
        positions=spec.position_spec(),
        state=spec.state_specs(),
        image=None,
    )


def open_decoder(folder: Path, threads: int) -> tuple[Decoder, Embedder]:
    """The decoder that `build` wrote, and its embeddings."""
    description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    model = from_json(ModelSpec, description["model"])
    variant = from_json(Variant, description["variant"])
    backend = open_backend("cpu", threads)
    decoder = Decoder(backend.open(folder / _GRAPH, variant), variant, model, backend)
    return decoder, Embedder(np.load(folder / _EMBEDDINGS, mmap_mode="r"), model.embedding)


class _Engine:
    def __init__(self, folder: Path, threads: int, capacity: int):
        self._capacity = capacity
        self._decoder, self._embed = open_decoder(folder, threads)
        self._tokens: Iterator[int] = iter(())

    def prefill(self, ids: Sequence[int]) -> None:
        prompt = self._prompt(ids)
        sampler, unlimited = Sampler(SamplingParams()), self._capacity - len(ids)
        self._tokens = generate(self._decoder, self._embed, prompt, sampler, (), unlimited, Trace())
        next(self._tokens)

    def step(self) -> None:
        next(self._tokens)

    def logits(self, ids: Sequence[int]) -> Sequence[float]:
        return self._decoder.forward(self._prompt(ids)).tolist()

    def _prompt(self, ids: Sequence[int]) -> Encoded:
        """A prompt for an empty sequence."""
        self._decoder.reset(self._capacity)
        return Encoded(self._embed(np.asarray(ids)))


if __name__ == "__main__":
    serve(lambda: _Engine(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
