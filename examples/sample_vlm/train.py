"""Trains the sample model from nothing, on two CPU cores, in about an hour.

    python examples/sample_vlm/train.py --out examples/sample_vlm/model

Needs torch, transformers, tokenizers, safetensors and Pillow. Every random choice comes from a
fixed seed and the length is counted in steps, so that the same versions on the same machine repeat
the run.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import layout
import numpy as np
import packing
import scenes
import torch
from learner import IMAGE_START, PREFIX, Learner
from questions import training_rounds
from torch import Tensor, nn
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.utils import logging

BATCH = 32
WARM_UP = 50
RATES = (0.006, 1.5e-3)
"""Peak rates of Muon and AdamW."""
VOCABULARY = 576


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own warm-up, hold and decay.

    `peak` scales both optimizers' rates; the decay, a cosine, begins after `hold` of the steps. The
    weight of the auxiliary heads falls over `patch_steps` to `patch_floor`.
    """

    steps: int
    peak: float = 1.0
    hold: float = 0.5
    patch_steps: int = 1200
    patch_floor: float = 0.02
    reads: bool = True
    weighs: bool = False

    def scale(self, step: int) -> float:
        """Factor on the rates: warm-up, hold, cosine to a hundredth."""
        warm = self.peak * min(1.0, (step + 1) / WARM_UP)
        done = (step / self.steps - self.hold) / max(1 - self.hold, 1e-9)
        if done <= 0:
            return warm
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def patch_weight(self, step: int) -> float:
        return max(self.patch_floor, 0.5 * (1 - step / self.patch_steps))


def stages(tower: int, reading: int, polish: int) -> list[Stage]:
    """First to name patches, then to answer, then again with the rarer questions weighed up."""
    return [
        Stage(tower, hold=1.0, reads=False),
        Stage(reading),
        Stage(polish, peak=0.7, hold=0.25, patch_steps=1, patch_floor=0.1, weighs=True),
    ]


def orthogonalize(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices to g [N, rows, columns], by Newton-Schulz in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal; matrices of one shape are handled together."""

    def __init__(self, matrices: list[nn.Parameter], rate: float, decay: float = 0.01) -> None:
        super().__init__(matrices, {"lr": rate, "decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                self._update(shape, parameters, group)

    def _update(self, shape: torch.Size, parameters: list[nn.Parameter], group: dict) -> None:
        for parameter in parameters:
            if "velocity" not in self.state[parameter]:
                self.state[parameter]["velocity"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        velocities = [self.state[parameter]["velocity"] for parameter in parameters]
        torch._foreach_lerp_(velocities, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, velocities, group["momentum"])
        steps = orthogonalize(torch.stack(list(ahead)))
        rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.mul_(1 - group["lr"] * group["decay"]).sub_(step, alpha=rate)


def split_parameters(learner: Learner) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices for Muon; embeddings, heads, norms, biases and the patch projection for AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in learner.named_parameters():
        inner = "layers" in name or "connector" in name
        (matrices if inner and parameter.ndim == 2 else others).append(parameter)
    return matrices, others


def batches(data: packing.Data, stage: int, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
    """Batches `start` to `stop` of an endless shuffle of its own for each stage."""
    count = len(data.pixels)
    per_epoch = count // BATCH
    for step in range(start, stop):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([10 + stage, epoch]).permutation(count)
        rows = np.sort(order[place * BATCH : (place + 1) * BATCH])
        turn = (epoch + stage // 2) % data.ids.shape[1]
        yield {
            "pixels": torch.from_numpy(data.pixels[rows]),
            "labels": torch.from_numpy(data.labels[rows]),
            "ids": torch.from_numpy(data.ids[rows, turn].astype(np.int64)),
            "block": torch.from_numpy(data.block[rows, turn]),
            "answer": torch.from_numpy(data.answer[rows, turn]),
        }


class Run:
    """The state of a training run: learner, optimizers, steps done in each stage."""

    def __init__(self, learner: Learner, stages: list[Stage], checkpoint: Path) -> None:
        self.learner, self.stages, self.checkpoint = learner, stages, checkpoint
        matrices, others = split_parameters(learner)
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, RATES[0]),
            torch.optim.AdamW(others, RATES[1], betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.done = [0] * len(stages)
        self.look = torch.compile(learner.look, dynamic=False)
        self.read = torch.compile(learner.read, dynamic=False)

    def save(self) -> None:
        state = {
            "learner": self.learner.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "done": self.done,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.done = state["done"]

    def update(self, loss: Tensor, scale: float) -> None:
        loss.backward()
        for optimizer, rate in zip(self.optimizers, RATES, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def step(self, stage: Stage, step: int, batch: dict[str, Tensor]) -> list[Tensor]:
        """One update; gives the losses to print."""
        with torch.autocast("cpu", torch.bfloat16):
            if not stage.reads:
                loss = self.look(batch["pixels"], batch["labels"])
                seen = [loss]
            else:
                if not stage.weighs:
                    batch["answer"] = batch["answer"].clamp(max=1)
                told, right, patches = self.read(**batch)
                loss = told + stage.patch_weight(step) * patches
                seen = [told, right, patches]
        self.update(loss, stage.scale(step))
        return [value.detach() for value in seen]

    def train(self, index: int, data: packing.Data, every: int) -> None:
        stage = self.stages[index]
        seen: list[list[float]] = []
        began, first = time.perf_counter(), self.done[index]
        for batch in batches(data, index, first, stage.steps):
            values = self.step(stage, self.done[index], batch)
            seen.append([float(value) for value in values])
            self.done[index] += 1
            step = self.done[index]
            if step % 25 == 0 or step == stage.steps:
                means = " ".join(f"{value:.4f}" for value in np.mean(seen, 0))
                pace = (time.perf_counter() - began) / (step - first)
                print(f"stage {index} step {step}/{stage.steps} {means} {pace:.3f} s", flush=True)
                seen = []
            if step % every == 0 or step == stage.steps:
                self.save()


def new_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(layout.build_config(processor.tokenizer))
    return model.float().train()


def conversation(question: str) -> list[dict]:
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def check_inputs(processor: Idefics3Processor, tokenizer_file: Path, count: int = 20) -> None:
    """Training inputs are what the processor makes of a PNG and a question, to the last bit."""
    encode = packing.encoder(str(tokenizer_file))
    for index in range(count):
        scene, rounds = training_rounds(index, 1)
        image, question = scenes.render(scene), rounds[0][0]
        turns = conversation(question.question)
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        expected = processor(text=text, images=[image], return_tensors="np")
        pixels = packing.shrink(image).astype(np.float64) * (1 / 255)
        pixels = (pixels.astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
        assert np.array_equal(expected["pixel_values"][0, 0], pixels.transpose(2, 0, 1))
        ids, block, answer = packing.pack([question], encode, 288)
        prompt = ids[(block != 255) & (answer == 0)]
        assert prompt.tolist() == expected["input_ids"][0].tolist(), question
        assert (ids[:PREFIX] == processor.image_token_id).sum() == layout.IMAGE_TOKENS
        assert ids[IMAGE_START] == processor.image_token_id
        assert block[PREFIX - 1] == 0
        assert block[PREFIX] == 1


@torch.no_grad()
def check_logits(learner: Learner, processor: Idefics3Processor, tokenizer_file: Path) -> float:
    """Largest difference between the training forward, packed, and transformers, one by one."""
    encode = packing.encoder(str(tokenizer_file))
    scene, rounds = training_rounds(1, 1)
    image = scenes.render(scene)
    ids, block, _answer = packing.pack(rounds[0], encode, 320)
    pixels = torch.from_numpy(packing.shrink(image).copy())[None]
    packed = torch.from_numpy(ids.astype(np.int64))[None]
    features = learner.connect(learner.tower(pixels))
    ours = learner.decode(features, packed, torch.from_numpy(block)[None])[0]
    worst = 0.0
    for number in range(1, int(block[block < 255].max()) + 1):
        rows = np.flatnonzero((block == 0) | (block == number))
        inputs = processor.image_processor(image, return_tensors="pt")
        theirs = learner.vlm(input_ids=packed[:, rows], **inputs).logits[0, PREFIX:]
        gap = (theirs - ours[rows[PREFIX:] - PREFIX]).abs().max()
        worst = max(worst, float(gap))
    return worst


def export(learner: Learner, processor: Idefics3Processor, out: Path) -> None:
    """Write the model directory, weights in float16."""
    out.mkdir(parents=True, exist_ok=True)
    model = Idefics3ForConditionalGeneration(learner.vlm.config)
    model.load_state_dict(learner.vlm.state_dict())
    model.half().save_pretrained(out)
    layout.write_side_files(processor, model.config, out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "model", help="model directory")
    scratch = Path(tempfile.gettempdir()) / "sample_vlm"
    parser.add_argument("--work", type=Path, default=scratch, help="data and checkpoint (5 GB)")
    parser.add_argument("--scenes", type=int, default=96_000)
    parser.add_argument("--tower-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=1_800)
    parser.add_argument("--polish-steps", type=int, default=1_100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer_file = options.work / "tokenizer.json"
    tokenizer = layout.build_tokenizer(packing.corpus(4000), VOCABULARY)
    tokenizer.backend_tokenizer.save(str(tokenizer_file))
    processor = layout.build_processor(tokenizer)
    check_inputs(processor, tokenizer_file)
    learner = Learner(new_model(processor))
    print(f"{sum(p.numel() for p in learner.vlm.parameters())} parameters")
    print(f"packed and single logits differ by {check_logits(learner, processor, tokenizer_file)}")
    plan = packing.DataPlan(options.scenes)
    data = packing.prepare(options.work / "data", plan, tokenizer_file, options.threads)
    plans = stages(options.tower_steps, options.steps, options.polish_steps)
    run = Run(learner, plans, options.work / "checkpoint.pt")
    if options.resume:
        run.load()
    for index in range(len(plans)):
        run.train(index, data, options.every)
    gap = check_logits(learner, processor, tokenizer_file)
    print(f"packed and single logits differ by {gap:.2e}")
    export(learner, processor, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
