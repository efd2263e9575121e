"""A bundle beside the checkpoint it came from: the source model leads."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mllm_edge.bundle import Bundle
from mllm_edge.compare.cases import Case, fitting, synthetic_cases
from mllm_edge.compare.compare import Comparison, recipe_tolerance, summarize
from mllm_edge.compare.outputs import bundle_outputs
from mllm_edge.export.checkpoint.source import open_source
from mllm_edge.export.source_model import Reference, Scope, source_outputs
from mllm_edge.runtime.backends.choose import open_backend
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

    Arguments and errors as in `mllm_edge.compare.compare.compare`; SourceError and its kinds for the checkpoint.
    """
    with VLM(Bundle.load(bundle), open_backend(backend, threads, target)) as vlm:
        reference = Reference(open_source(str(source)), Scope(None))
        own = fitting(synthetic_cases(vlm.spec.image is not None), vlm.spec)
        chosen = own if cases is None else list(cases)
        expected, found = [], []
        for case in chosen:
            prompt = vlm.processor.process(case.prompt, case.images)
            expected.append(source_outputs(vlm.bundle, reference.run(case.prompt, case.images, prompt.text)))
            progress(1)
            found.append(bundle_outputs(vlm, case, expected[-1].tokens))
            progress(1)
        limit = recipe_tolerance(vlm.bundle) if tolerance is None else tolerance
        return summarize(str(source), str(bundle), chosen, expected, found, limit, target)
