"""Run in llama.cpp's environment (real_weights_llama.py): quantizes a GGUF file, or scores answers with one.

python real_weights_llama_worker.py quantize FROM TO FTYPE
python real_weights_llama_worker.py score FILE: JSON lines {"prompt": ids, "answer": ids} come in, and for each the
logits [answer, vocabulary] float32 go out as bytes.
"""

import json
import sys
from collections.abc import Sequence

import numpy as np
from cyllama.llama import llama_cpp

_THREADS, _LONGEST = 2, 2048


def _quantize(source: str, out: str, ftype: int) -> None:
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = ftype, _THREADS
    llama_cpp.model_quantize(source, out, params)


class _Vocabulary(llama_cpp.LlamaModel):
    """LlamaContext.get_logits_ith of cyllama 0.2.18 reads an attribute that its models do not have."""

    @property
    def n_vocab(self) -> int:
        return int(self.get_vocab().n_vocab)


class _Model:
    def __init__(self, path: str):
        params = llama_cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = _LONGEST
        params.n_threads = params.n_threads_batch = _THREADS
        self._model = _Vocabulary(path_model=path, params=llama_cpp.LlamaModelParams())
        self._context = llama_cpp.LlamaContext(model=self._model, params=params)

    def score(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Logits [answer, vocabulary] that each token of the answer gets behind what is before it."""
        ids = [*prompt, *answer[:-1]]
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        first = len(prompt) - 1
        for i, token in enumerate(ids):
            batch.add(token, i, [0], i >= first)
        self._context.kv_cache_clear(True)
        self._context.decode(batch)
        return np.array([self._context.get_logits_ith(i) for i in range(first, len(ids))], np.float32)


def main() -> None:
    if sys.argv[1] == "quantize":
        source, out, ftype = sys.argv[2:]
        _quantize(source, out, int(ftype))
        return
    model = _Model(sys.argv[2])
    for line in sys.stdin:
        sys.stdout.buffer.write(model.score(**json.loads(line)).tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
