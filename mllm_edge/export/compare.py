"""A bundle beside the checkpoint it came from: the source model leads."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mllm_edge.bundle import Bundle
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.source_model import source_runner
from mllm_edge.runtime.backends.choose import open_backend
from mllm_edge.runtime.compare import (
    Case,
    Comparison,
    Outputs,
    bundle_outputs,
    recipe_tolerance,
    summarize,
    synthetic_cases,
)
from mllm_edge.runtime.vlm import VLM

__all__ = ["compare_with_source"]


def compare_with_source(
    source: str | Path,
    bundle: str | Path,
    cases: Sequence[Case] | None = None,
    *,
    tolerance: float | None = None,
    target: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    progress: Callable[[int], None] = lambda calls: None,
) -> Comparison:
    """Compare the bundle's graphs for `target` with the checkpoint in directory `source`, which transformers runs in
    float32, in full.

    Arguments and errors as in `mllm_edge.runtime.compare.compare`; SourceError and its kinds for the checkpoint.
    """
    with VLM(Bundle.load(bundle), open_backend(backend, threads, target)) as vlm:
        run = source_runner(open_source(str(source)))
        chosen = synthetic_cases(vlm.spec.image is not None) if cases is None else list(cases)
        expected, found = [], []
        for case in chosen:
            prompt = vlm.processor.process(case.prompt, case.images)
            result = run(case.prompt, case.images, prompt.text)
            expected.append(
                Outputs(
                    result["input_ids"],
                    result["logits"],
                    result["tokens"],
                    result.get("vision_hidden"),
                    result.get("image_features"),
                )
            )
            progress(1)
            found.append(bundle_outputs(vlm, case, result["tokens"]))
            progress(1)
        limit = recipe_tolerance(vlm.bundle) if tolerance is None else tolerance
        return summarize(str(source), str(bundle), chosen, expected, found, limit, target)
