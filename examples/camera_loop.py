"""A question that stays, about the newest frame: python examples/camera_loop.py BUNDLE FOLDER

A thread stands for the camera and takes the pictures of FOLDER by turns. Frames that come while an answer is made are
dropped but for the last: a model that is slower than the camera answers about now, and not about a queue.
"""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge import BGR, VLM


class Latest:
    """Holds one frame; a newer one takes its place."""

    def __init__(self) -> None:
        self._condition, self._frame, self._closed = threading.Condition(), None, False
        self.dropped = 0

    def put(self, frame: Any) -> None:
        with self._condition:
            self.dropped += self._frame is not None
            self._frame = frame
            self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()

    def take(self) -> Any:
        """The newest frame, as soon as there is one; None when the camera is closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._frame is not None or self._closed)
            frame, self._frame = self._frame, None
            return frame


def camera(frames: Latest, files: list[Path], stop: threading.Event, period: float = 0.03) -> None:
    """Frames as OpenCV gives them, in BGR order."""
    shot = 0
    while not stop.wait(period):
        picture = np.asarray(Image.open(files[shot % len(files)]).convert("RGB"))
        frames.put(np.ascontiguousarray(picture[..., ::-1]))
        shot += 1
    frames.close()


def main(bundle: str, folder: str, answers: int = 4) -> None:
    frames, stop = Latest(), threading.Event()
    files = sorted(Path(folder).glob("*.png"))
    thread = threading.Thread(target=camera, args=(frames, files, stop))
    with VLM.load(bundle) as vlm:
        thread.start()
        try:
            for _ in range(answers):
                frame = frames.take()
                if frame is None:
                    break
                result = vlm.generate("What is in the picture?", BGR(frame), max_new_tokens=16)
                print(f"{1000 * result.metrics.total:4.0f} ms  {result.text}")
        finally:
            stop.set()
            thread.join()
    print(f"{frames.dropped} frames were dropped")


if __name__ == "__main__":
    main(*sys.argv[1:3])
