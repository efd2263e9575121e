"""transformers' own models and video processors, run as a program of its own, with torchvision on its path.

Arguments: a folder of checkpoints, and where the results go. Each checkpoint's `asked.json` lists cases: see `Asked` in
`test_videos.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.families.torchvision_processor import declared

STEPS = 12


def inputs_of(processor: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What the processor makes of a question about videos and images."""
    from transformers.video_utils import VideoMetadata

    from tests.families.test_videos import shown

    given = shown(case)
    videos = [one for one in given if isinstance(one, list)]
    images = [one for one in given if not isinstance(one, list)]
    entries = [{"type": "video" if isinstance(one, list) else "image"} for one in given]
    message = {"role": "user", "content": [*entries, {"type": "text", "text": case["question"]}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    for old, new in case.get("replaced", []):
        text = text.replace(old, new)
    numbers = [len(video) for video in videos]
    known = [
        VideoMetadata(total_num_frames=n, fps=case["fps"], duration=case["duration"], frames_indices=list(range(n)))
        for n in numbers
    ]
    return dict(
        processor(
            text=[text],
            images=images or None,
            videos=[np.stack(video) for video in videos],
            video_metadata=known,
            do_sample_frames=False,
            return_tensors="pt",
        )
    )


def answered(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens [n] and the logits [n, V] that they were chosen from."""
    given = {k: v for k, v in inputs.items() if k not in ("video_metadata",)}
    with torch.no_grad():
        out = model.generate(
            **given, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return {"answer": out.sequences[0, -STEPS:], "logits": torch.cat(out.logits)}


def taken(processor: Any, checkpoint: Path) -> list[np.ndarray]:
    """The frames that the video processor takes of each recording [total, frames a second]."""
    from transformers.video_utils import VideoMetadata

    recordings = json.loads((checkpoint / "recordings.json").read_text())
    known = [VideoMetadata(total_num_frames=n, fps=fps, duration=n / fps) for n, fps in recordings]
    return [np.array(processor.video_processor.sample_frames(one)) for one in known]


def of_file(processor: Any, checkpoint: Path) -> dict[str, Any]:
    """What becomes of the file beside the checkpoints, whose frames the processor takes of all of them."""
    from transformers.video_utils import load_video

    def every(metadata: Any, **_: Any) -> np.ndarray:
        return np.arange(metadata.total_num_frames)

    file = str(checkpoint.parent.parent / "clip.mp4")
    frames, known = load_video(file, backend="pyav", sample_indices_fn=every)
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    for old, new in json.loads((checkpoint / "asked.json").read_text())[0].get("replaced", []):
        text = text.replace(old, new)
    made = processor(text=[text], videos=[frames], video_metadata=[known], do_sample_frames=True, return_tensors="pt")
    return {
        f"file.{name}": made[name].numpy()
        for name in ("input_ids", "pixel_values", "pixel_values_videos")
        if name in made
    }


def main(folder: Path, out: Path) -> None:
    _library = declared()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for checkpoint in sorted(folder.iterdir()):
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        found = {f"taken.{i}": indices for i, indices in enumerate(taken(processor, checkpoint))}
        found |= of_file(processor, checkpoint)
        for i, case in enumerate(json.loads((checkpoint / "asked.json").read_text())):
            inputs = inputs_of(processor, case)
            tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            found |= {f"{i}.{name}": tensor.numpy() for name, tensor in tensors.items()}
            if case["runs"]:
                found |= {f"{i}.{name}": tensor.numpy() for name, tensor in answered(model, tensors).items()}
        np.savez(out / f"{checkpoint.name}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
