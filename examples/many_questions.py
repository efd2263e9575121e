"""Many questions about one picture, which is looked at once: python examples/many_questions.py BUNDLE IMAGE"""

import sys

from mllm_edge import VLM

QUESTIONS = ("What is in the picture?", "Which colours are there?", "How many objects are there?")


def main(bundle: str, picture: str) -> None:
    with VLM.load(bundle) as vlm:
        image = vlm.encode_image(picture)
        for question in QUESTIONS:
            result = vlm.generate(question, image, max_new_tokens=24)
            m = result.metrics
            print(f"{question} {result.text}")
            print(f"  TTFT {1000 * m.ttft:.0f} ms, {m.reused} of {m.prompt_tokens} prompt tokens were there")
        for score in vlm.score_answers("Is there a circle?", image, answers=("yes", "no")):
            print(f"Is there a circle? {score.answer}: {score.share:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
