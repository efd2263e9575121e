"""Which frames of a recording a model is shown."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["FRAME_RULES", "FrameRule", "FrameSampling"]

FrameRule = Literal["rate", "even", "stride", "ends", "steps", "inner"]
FRAME_RULES: tuple[str, ...] = get_args(FrameRule)


@dataclass(frozen=True)
class FrameSampling:
    """Which frames are taken of `total` ones that come `rate` a second. `fps`: how many a second are wanted, `frames`:
    how many in all; where both are stated `frames` counts, where neither is, all are taken. `least` and `most` bound
    what `fps` asks for, and no more are taken than there are. `rule` says which these are:

    - `rate`: those on show every 1/fps seconds, from the first on; evenly `most` of all where that would be more.
    - `even`: frame i of n is floor(i · total / n), n = floor(total / rate · fps). transformers'
      `default_sample_indices_fn`, of the families that say nothing else.
    - `stride`: floor(shift + i · total / n) in float32, n a multiple of `multiple`; `shift` None: half a step. Of
      Qwen2-VL and InternVL.
    - `ends`: n from the first to the last, rounded. Of Qwen3-VL.
    - `steps`: the first behind each i / fps seconds; of a recording longer than `seconds`, fps · seconds from beginning
      to end. The last again where their number is odd. Of GLM-4V.
    - `inner`: n from first to last (floor), where n = round(total / rate · fps); of a recording that is longer than
      `most` · fps by twice `seconds`, without so many at both ends. Of SmolVLM.
    """

    rule: FrameRule = "even"
    fps: float | None = None
    frames: int | None = None
    least: int = 1
    most: int | None = None
    multiple: int = 1
    shift: float | None = 0.0
    seconds: float = 0.0
