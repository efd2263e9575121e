"""A node in the shape that ROS 2 gives them, without ROS: python examples/robot_node.py BUNDLE FOLDER

Callbacks return at once: the newest frame waits for a worker, which asks a question that stays and publishes what it
finds. An answer has a deadline; a question of the operator cancels the one under way, and is answered first. With rclpy
the three `on_…` methods are callbacks of subscriptions and a service, and `publish` is a publisher's.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge import BGR, VLM, Cancel
from mllm_edge.errors import CancelledError, MllmEdgeError

WATCH = "What is in the picture?"


class Node:
    """Answers about the newest frame; `publish(topic, text)` gets what it finds."""

    def __init__(self, vlm: VLM, publish: Callable[[str, str], None], deadline: float = 5.0):
        self._vlm, self._publish, self._deadline = vlm, publish, deadline
        self._condition = threading.Condition()
        self._frame: Any = None
        self._asked: list[str] = []
        self._fresh, self._closed, self._cancel = False, False, Cancel()
        self._worker = threading.Thread(target=self._work)
        self._worker.start()

    def on_image(self, frame: np.ndarray) -> None:
        """A frame [H, W, 3] uint8 BGR, as a camera's driver gives it."""
        with self._condition:
            self._frame, self._fresh = frame, True
            self._condition.notify()

    def on_question(self, text: str) -> None:
        """The operator's question comes before all frames."""
        with self._condition:
            self._asked.append(text)
            self._cancel.cancel()
            self._condition.notify()

    def on_shutdown(self) -> None:
        """Answers the operator's last questions, and returns when the worker has ended."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._worker.join()

    def _next(self) -> tuple[str, Any, Cancel] | None:
        """What to ask, of which frame; None at the end."""
        with self._condition:
            self._condition.wait_for(lambda: self._closed or (self._frame is not None and (self._fresh or self._asked)))
            if self._closed and not (self._asked and self._frame is not None):
                return None
            self._fresh, self._cancel = False, Cancel()
            return (self._asked.pop(0) if self._asked else WATCH), self._frame, self._cancel

    def _work(self) -> None:
        while (work := self._next()) is not None:
            question, frame, cancel = work
            cancelling = cancel if question == WATCH else None
            try:
                result = self._vlm.generate(
                    question, BGR(frame), max_new_tokens=24, timeout=self._deadline, cancel=cancelling
                )
                self._publish("watch" if question == WATCH else "answer", f"{result.text} ({result.finish_reason})")
            except CancelledError:
                self._publish("watch", "gave way to a question")
            except MllmEdgeError as error:  # a node goes on
                self._publish("error", error.message)


def main(bundle: str, folder: str) -> None:
    pictures = [np.asarray(Image.open(path).convert("RGB"))[..., ::-1] for path in sorted(Path(folder).glob("*.png"))]
    watched, answered = threading.Event(), threading.Event()

    def publish(topic: str, text: str) -> None:
        print(f"{topic}: {text}")
        (answered if topic == "answer" else watched).set()

    with VLM.load(bundle) as vlm:
        vlm.warm_up(pictures[0].shape[:2])
        node = Node(vlm, publish)
        node.on_image(pictures[0])
        watched.wait(60)
        for picture in pictures:
            node.on_image(picture)
        node.on_question("How many circles are there?")
        answered.wait(60)
        node.on_shutdown()
        print(f"{vlm.health().done} calls were done")


if __name__ == "__main__":
    main(*sys.argv[1:3])
