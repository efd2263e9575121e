"""Asks a bundle about the example images and shows the answers with what they cost.

python examples/demo.py BUNDLE
"""

import json
import sys
from pathlib import Path

from mllm_edge import VLM
from mllm_edge.runtime.trace import Metrics

IMAGES = Path(__file__).parent / "images"
PICTURES, QUESTIONS = 3, 2


def questions() -> dict[str, list[tuple[str, str]]]:
    """Image name → its questions with their answers, for the first few images."""
    asked: dict[str, list[tuple[str, str]]] = {}
    for entry in json.loads((IMAGES / "questions.json").read_text(encoding="utf-8")):
        asked.setdefault(entry["image"], []).append((entry["question"], entry["answer"]))
    return {image: pairs[:QUESTIONS] for image, pairs in list(asked.items())[:PICTURES]}


def latencies(metrics: Metrics) -> str:
    """The stages up to the first token, and the rate behind it."""
    seconds = {**metrics.stages, "ttft": metrics.ttft}
    stages = ("preprocess", "vision_encoder", "connector", "prefill", "ttft")
    parts = [f"{name} {1000 * seconds[name]:.1f}" for name in stages]
    rate = f"   {metrics.tokens_per_second:.0f} tok/s" if metrics.token_seconds else ""
    return f"ms: {'  '.join(parts)}{rate}"


def main() -> None:
    bundle = sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__)
    with VLM.load(bundle) as vlm:
        asked = questions()
        vlm.generate("Hello", images=[IMAGES / next(iter(asked))], max_new_tokens=2)  # the first call warms up
        for image, pairs in asked.items():
            print(f"\n{IMAGES.name}/{image}")
            for question, expected in pairs:
                result = vlm.generate(question, images=[IMAGES / image], max_new_tokens=48)
                print(f"  {question}\n    {result.text.strip()}   (expected: {expected})")
                print(f"    {latencies(result.metrics)}")


if __name__ == "__main__":
    main()
