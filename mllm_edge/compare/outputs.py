"""What one side of a comparison makes of a case, and the errors of the other's."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mllm_edge.bundle import Bundle
from mllm_edge.compare.cases import Case
from mllm_edge.compare.metrics import logits_errors, relative_error
from mllm_edge.errors import ContextError
from mllm_edge.runtime.decode.encoded import Encoded
from mllm_edge.runtime.encode import FEATURES
from mllm_edge.runtime.prompt.processor import Prompt
from mllm_edge.runtime.vlm import VLM

__all__ = ["LOGITS", "Outputs", "bundle_outputs", "errors_of", "in_order", "named_outputs", "seen"]

TOKENS = 16
# The errors of a decoder, in the order they come in; those of other components bear their names.
LOGITS = ("prefill_logits", "decode_logits")


@dataclass(frozen=True, eq=False)
class Outputs:
    """`token_ids` [S], `logits` [steps, V], `tokens` [steps] (greedy), and with images the output (any shape) of each
    component before the decoder, in the order they run. `encoded`: of a bundle, the prompt as its decoder gets it."""

    token_ids: np.ndarray
    logits: np.ndarray
    tokens: np.ndarray
    components: Mapping[str, np.ndarray] = field(default_factory=dict)
    encoded: Encoded | None = None


def bundle_outputs(vlm: VLM, case: Case, tokens: np.ndarray | None = None) -> Outputs:
    """Run a case along `tokens` [steps], or along its own greedy ones. Raises ContextError when it does not fit."""
    prompt = vlm.processor.process(case.prompt, case.images)
    room = vlm.context_length - vlm.spec.begun(len(prompt.token_ids))
    steps = min(TOKENS, room) if tokens is None else len(tokens)
    if steps < 2:
        raise ContextError(f"{case.description}: {len(prompt.token_ids)} tokens leave no room", "use a shorter prompt")
    encoded, components = seen(vlm, prompt)
    for name, output in _output_names(vlm.bundle).items():
        if name in components and output == FEATURES:  # as the decoder gets them
            components[name] = encoded.prompt[prompt.image_positions]
    logits = vlm.steps(encoded, vlm.greedy([encoded], steps, stop_ids=())[0] if tokens is None else tokens)
    return Outputs(prompt.token_ids, logits, logits.argmax(axis=1), components, encoded)


def seen(vlm: VLM, prompt: Prompt) -> tuple[Encoded, dict[str, np.ndarray]]:
    """A prompt as the decoder gets it, and what each component before that makes of its images, all runs together;
    empty without any."""
    encoded, found = vlm.encode_and_outputs(prompt)
    return encoded, {component: next(iter(outputs.values())) for component, outputs in found.items()}


def named_outputs(bundle: Bundle, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of tensors by the names of graph outputs those of the bundle's components, by the names of these."""
    return {component: tensors[name] for component, name in _output_names(bundle).items() if name in tensors}


def errors_of(expected: Outputs, found: Outputs) -> dict[str, float]:
    """Relative errors of components, and of logits those over the range of what is expected."""
    both = [name for name in expected.components if name in found.components]
    errors = {name: relative_error(expected.components[name], found.components[name]) for name in both}
    steps = logits_errors(expected.logits, found.logits)
    prefill, decode = LOGITS
    return {**errors, prefill: float(steps[0]), decode: float(steps[1:].max())}


def in_order(errors: Mapping[str, float]) -> dict[str, float]:
    """Those of components in the order they run, then the decoder's: a question without images has only these."""
    first = {name: error for name, error in errors.items() if name not in LOGITS}
    return {**first, **{name: errors[name] for name in LOGITS}}


def _output_names(bundle: Bundle) -> dict[str, str]:
    """Component → the first output of its graph, in the order they run."""
    names = [stage.component for stage in bundle.manifest.model.stages]
    return {name: bundle.manifest.components[name].variants[0].outputs[0].name for name in names}
