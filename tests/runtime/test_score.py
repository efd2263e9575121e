"""Logits along an answer: those that single steps give."""

from pathlib import Path

import numpy as np

from mllm_edge.export.pipeline import export
from mllm_edge.runtime.score import score
from mllm_edge.runtime.vlm import VLM
from tests.tiny import save_tiny_llava


def test_rows_are_those_of_single_steps(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out", recipe_name="fp32", targets=("cpu",), verify_mode="off")
    with VLM.load(tmp_path / "out", threads=1) as vlm:
        prompt = vlm.processor.process("What is it?")
        answer = np.array([5, 9, 7, 11])
        found = score(vlm, prompt, answer)
        vlm.decoder.reset(len(prompt.token_ids) + len(answer))
        steps = [vlm.decoder.forward(vlm.prompt_embeds(prompt)).copy().ravel()]
        steps += [vlm.decoder.forward(vlm.embed(np.array([token]))).copy().ravel() for token in answer[:-1]]
        np.testing.assert_allclose(found, np.stack(steps), atol=1e-4)
        # One token alone needs no more than the prompt.
        np.testing.assert_allclose(score(vlm, prompt, answer[:1]), found[:1], atol=1e-4)
