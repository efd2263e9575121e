"""What the libraries take when they are used for the first time: pages of their code, pools of threads and memory.

That is the same for every bundle, and once a process has it, it cannot be told from what the bundle takes. So a process
of its own measures it: it imports what the runtime does on the CPU, then runs a graph of one small product, and
uses a tokenizer and a picture.
"""

import subprocess
import sys

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE

from mllm_edge.runtime.machine.cpu import resident

__all__ = ["first_use"]

_SECONDS = 60  # far more than a slow board takes


def first_use() -> int | None:
    """Bytes; None where the system does not tell, or the process fails."""
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _measure() -> int:
    """In the process of its own."""
    import mllm_edge.runtime.vlm  # noqa: F401  (what is imported is no first use)
    from mllm_edge.runtime.backends.onnxruntime_cpu import import_onnxruntime
    from mllm_edge.runtime.profiling.roofline import product_graph

    ort, size = import_onnxruntime(), 8
    before = resident()
    if not before:
        sys.exit("the system does not tell how much memory a process has")
    session = ort.InferenceSession(product_graph("float32", size), providers=["CPUExecutionProvider"])
    session.run(None, {"rows": np.ones((size, size), np.float32)})
    Tokenizer.from_str(Tokenizer(BPE()).to_str()).encode("a")
    Image.new("RGB", (size, size)).resize((2 * size, 2 * size), Image.Resampling.LANCZOS)
    return resident() - before


if __name__ == "__main__":
    print(_measure())
