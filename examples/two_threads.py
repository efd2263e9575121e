"""One model, two threads: a watch and a person who asks: python examples/two_threads.py BUNDLE IMAGE

Calls wait their turn, first come, first served. The watch asks only when nobody else does (`wait=False`), so that the
person never waits for more than what is under way.
"""

import sys
import threading

from mllm_edge import VLM, EncodedImage
from mllm_edge.errors import BusyError


def watch(vlm: VLM, picture: EncodedImage, stop: threading.Event, begun: threading.Event, seen: list[float]) -> None:
    """Asks again and again, and steps back for others."""
    while not stop.is_set():
        try:
            yes, _ = vlm.score_answers("Is there a circle?", picture, answers=["yes", "no"], wait=False)
            seen.append(yes.share)
            begun.set()
        except BusyError:
            stop.wait(0.01)


def main(bundle: str, image: str) -> None:
    stop, begun, seen = threading.Event(), threading.Event(), list[float]()
    with VLM.load(bundle) as vlm:
        vlm.warm_up()
        thread = threading.Thread(target=watch, args=(vlm, vlm.encode_image(image), stop, begun, seen))
        thread.start()
        try:
            begun.wait(60)
            chat = vlm.chat()
            chat.attach(image)
            for question in ("What is in the picture?", "How many circles are there?"):
                print(f"{question} {''.join(chunk.text for chunk in chat.ask(question, max_new_tokens=24))}")
        finally:
            stop.set()
            thread.join()
    print(f"the watch looked {len(seen)} times: a circle with {100 * seen[-1]:.0f}%")


if __name__ == "__main__":
    main(*sys.argv[1:3])
