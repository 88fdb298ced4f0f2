"""Train a larger scenes model, stage by stage:
``python -m avl_analysis.scenes.training.large.train STAGE --steps N --out DIR``.

Three stages, each resumable, each with AdamW:

* ``text``: the decoder on procedural text, loss on all tokens;
* ``vision``: the vision tower with a reader of whole scenes (can run beside ``text``);
* ``tune``: both joined by the projector, on packed conversations about pictures, a few rows of text
  in every step.

The rate is constant after a warm-up; ``--anneal`` lets it fall linearly to zero over the steps of
this call. SIGTERM saves and stops. No loss looks at attention weights.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from avl_analysis.scenes import world
from avl_analysis.scenes.language import pixel_values
from avl_analysis.scenes.samples import TRAINING_SEED
from avl_analysis.scenes.training import launch, packed
from avl_analysis.scenes.training.large import conversations, measure, reader, texts
from avl_analysis.scenes.training.large.forward import packed_logits, text_logits
from avl_analysis.scenes.training.large.model import build_model

STAGES = ("text", "vision", "tune")


@dataclass(frozen=True)
class Settings:
    """What shapes a stage."""

    rate: float = 2e-3
    weight_decay: float = 0.1
    warm_up: int = 100
    text_rows: int = 16
    text_length: int = 224
    bare: float = 0.7
    pictures: int = 16
    tune_text_rows: int = 3
    text_weight: float = 0.3
    reader_weight: float = 0.5
    vision_rate: float = 1e-3
    seed: int = 0
    processes: int = 1
    log_seconds: float = 20.0
    watch_seconds: float = 150.0
    save_seconds: float = 150.0


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of every next token of rows (B, S)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class Trainer:
    """One process's share of a stage."""

    def __init__(self, stage: str, settings: Settings, rank: int, out: Path, **sizes: int) -> None:
        self.stage, self.settings, self.rank, self.out = stage, settings, rank, out
        self.model = build_model(settings.seed, **sizes)
        self.reader = reader.Reader(self.model.config.vision_config.hidden_size)
        prefixes = {"text": (packed.DECODER,), "vision": (packed.VISION,), "tune": ("model.",)}[
            stage
        ]
        self.named = {
            n: p
            for n, p in self.model.named_parameters()
            if n.startswith(prefixes) and "post_layernorm" not in n
        }
        extra = [] if stage == "text" else list(self.reader.parameters())
        self.parameters = [*self.named.values(), *extra]
        towers = [p for n, p in self.named.items() if n.startswith(packed.VISION)] + extra
        seen = {id(p) for p in towers}
        groups = []
        for parameters, rate in (
            (towers, settings.vision_rate),
            ([p for p in self.parameters if id(p) not in seen], settings.rate),
        ):
            for matrices in (True, False):
                chosen = [p for p in parameters if (p.dim() >= 2) == matrices]
                if chosen:
                    groups.append(
                        {
                            "params": chosen,
                            "weight_decay": settings.weight_decay * matrices,
                            "rate": rate,
                        }
                    )
        self.adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
        self.step, self.seconds, self.processor_seconds = 0, 0.0, 0.0

        self.asked_to_stop = self.stop = False

    def losses(self) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of each part of the loss on a fresh batch."""
        s = self.settings
        rng = np.random.default_rng(
            [TRAINING_SEED + 1000 * s.seed, STAGES.index(self.stage), self.rank, self.step]
        )
        weights = {n: p.to(torch.bfloat16) for n, p in self.named.items()}
        found: dict[str, tuple[float, Tensor]] = {}
        if self.stage == "text" or (self.stage == "tune" and s.tune_text_rows):
            count = s.text_rows if self.stage == "text" else s.tune_text_rows
            ids, positions = texts.rows(rng, count, s.text_length, s.bare)
            loss = token_loss(text_logits(weights, self.model.config, ids, positions), ids)
            found["text"] = (1.0 if self.stage == "text" else s.text_weight, loss)
        if self.stage == "vision":
            scenes = [world.draw(rng) for _ in range(s.pictures)]
            pixels = pixel_values(np.stack([scene.image for scene in scenes]))
            features = packed.vision(weights, self.model.config, pixels)
            found["reader"] = (
                1.0,
                reader.loss(self.reader(features.float()), reader.labels(scenes)),
            )
        if self.stage == "tune":
            batch = conversations.make(rng, s.pictures)
            features = packed.vision(weights, self.model.config, batch.pixels)
            if s.reader_weight:
                loss = reader.loss(self.reader(features.float()), reader.labels(batch.scenes))
                found["reader"] = (s.reader_weight, loss)
            logits = packed_logits(
                weights, self.model.config, packed.project(weights, features), batch
            )
            used = batch.weights > 0
            each = F.cross_entropy(
                logits[used].float(), batch.ids.roll(-1, -1)[used], reduction="none"
            )
            found["answers"] = (1.0, (each * batch.weights[used]).sum() / batch.weights.sum())
        return found

    def update(self, factor: float) -> dict[str, float]:
        """One step at ``factor`` times the set rates; the parts of the loss."""
        found = self.losses()
        for p in self.parameters:
            p.grad = None
        torch.stack([weight * loss for weight, loss in found.values()]).sum().backward()
        if self.settings.processes > 1:
            stop = torch.tensor([float(self.asked_to_stop)])
            flat = torch.cat(
                [
                    torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                    for p in self.parameters
                ]
                + [stop]
            )
            dist.all_reduce(flat)
            self.stop = bool(flat[-1] > 0)  # every process stops after the same step
            flat /= self.settings.processes
            at = 0
            for p in self.parameters:
                p.grad, at = flat[at : at + p.numel()].view_as(p), at + p.numel()
        else:
            self.stop = self.asked_to_stop
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: the gradient is {float(norm)}; resume with a lower rate"
            )
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * factor
        self.adam.step()
        self.step += 1
        return {name: round(float(loss.detach()), 4) for name, (_, loss) in found.items()} | {
            "norm": round(float(norm), 3)
        }

    def watch(self) -> dict[str, Any]:
        """What is logged now and then; held-out samples."""
        if self.stage == "text":
            return {
                "text": measure.text_attention(self.model),
                "text_answers": measure.text_answers(self.model),
                "bare_text": measure.text_attention(self.model, bare=1.0),
            }
        if self.stage == "vision":
            rng = np.random.default_rng([measure.WATCH_SEED, 3])
            scenes = [world.draw(rng) for _ in range(64)]
            weights = dict(self.named)
            with torch.no_grad():
                features = packed.vision(
                    weights, self.model.config, pixel_values(np.stack([s.image for s in scenes]))
                )
                found = reader.accuracy(self.reader(features), reader.labels(scenes))
            return {"reader": {group: round(value, 4) for group, value in found.items()}}
        return {
            "text": measure.text_attention(self.model, rows=8),
            "image": measure.image_attention(self.model),
            "answers": measure.answers(self.model),
        }

    def save(self) -> None:
        """A checkpoint to resume from, replaced at once or not at all."""
        state = {
            "model": self.model.state_dict(),
            "reader": self.reader.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
        }
        torch.save(state, self.out / f"{self.stage}.tmp")
        os.replace(self.out / f"{self.stage}.tmp", self.out / f"{self.stage}.pt")

    def resume(self) -> None:
        state = torch.load(self.out / f"{self.stage}.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        rates = [group["rate"] for group in self.adam.param_groups]
        decays = [group["weight_decay"] for group in self.adam.param_groups]
        self.adam.load_state_dict(state["adam"])
        for group, rate, decay in zip(self.adam.param_groups, rates, decays, strict=True):
            group["rate"], group["weight_decay"] = rate, decay
        self.step, self.seconds, self.processor_seconds = (
            state["step"],
            state["seconds"],
            state["processor_seconds"],
        )

    def join(self) -> None:
        """Begin tuning from the two earlier stages; image tokens enter as long as words are."""
        text, vision = (
            torch.load(self.out / f"{stage}.pt", weights_only=True) for stage in ("text", "vision")
        )
        state = self.model.state_dict()
        state.update(
            {
                n: v
                for n, v in text["model"].items()
                if n.startswith(packed.DECODER) or n.startswith("lm_head")
            }
        )
        state.update({n: v for n, v in vision["model"].items() if n.startswith(packed.VISION)})
        self.model.load_state_dict(state)
        self.reader.load_state_dict(vision["reader"])
        rng = np.random.default_rng([TRAINING_SEED, 9])
        pixels = pixel_values(np.stack([world.draw(rng).image for _ in range(8)]))
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            image = packed.project(weights, packed.vision(weights, self.model.config, pixels))
            words = self.model.get_input_embeddings().weight[texts.FIRST_WORD :]
            factor = words.pow(2).mean().sqrt() / image.pow(2).mean().sqrt()
            for part in ("weight", "bias"):
                weights[f"{packed.PROJECTOR}linear_2.{part}"].mul_(factor)


def _run(
    rank: int,
    stage: str,
    settings: Settings,
    out: Path,
    resume: bool,
    steps: int,
    anneal: bool,
    sizes: dict[str, int],
    meet: str,
) -> None:
    torch.set_num_threads(1)
    if settings.processes > 1:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=settings.processes)
    trainer = Trainer(stage, settings, rank, out, **sizes)
    if resume:
        trainer.resume()
    elif stage == "tune":
        trainer.join()
    signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "asked_to_stop", True))
    first, began, worked = (
        trainer.step,
        time.monotonic() - trainer.seconds,
        time.process_time() - trainer.processor_seconds,
    )
    line_at, watch_at, save_at = (
        0.0,
        trainer.seconds + settings.watch_seconds,
        trainer.seconds + settings.save_seconds,
    )
    while trainer.step < first + steps and not trainer.stop:
        done = (trainer.step - first) / steps
        factor = min(1.0, (trainer.step + 1) / settings.warm_up) * (1 - done if anneal else 1.0)
        found: dict[str, Any] = trainer.update(factor)
        trainer.seconds, trainer.processor_seconds = (
            time.monotonic() - began,
            time.process_time() - worked,
        )
        if rank:
            continue
        last = trainer.step == first + steps
        watched = trainer.watch() if trainer.seconds >= watch_at or last else {}
        if watched or trainer.seconds >= line_at:
            line = {
                "step": trainer.step,
                "minutes": round(trainer.seconds / 60, 2),
                "processor_minutes": round(trainer.processor_seconds / 60, 2),
                "factor": round(factor, 3),
            }
            launch.append(out / f"{stage}.jsonl", line | found | watched)
            line_at = trainer.seconds + settings.log_seconds
            watch_at = trainer.seconds + settings.watch_seconds if watched else watch_at
        if trainer.seconds >= save_at or last or trainer.stop:
            trainer.save()
            save_at = trainer.seconds + settings.save_seconds
    if settings.processes > 1:
        dist.destroy_process_group()


def train(
    stage: str,
    settings: Settings,
    out: Path,
    steps: int,
    resume: bool = False,
    anneal: bool = False,
    sizes: dict[str, int] | None = None,
) -> None:
    """Run ``steps`` steps of a stage; ``out`` gets ``STAGE.jsonl`` and ``STAGE.pt``.

    Args:
        stage: one of ``STAGES``; "tune" reads the checkpoints of the other two from ``out``.
        settings: rates, batch sizes, processes.
        out: the run's folder.
        steps: how many to make in this call.
        resume: continue from the stage's checkpoint in ``out``.
        anneal: let the rates fall linearly to zero over these steps.
        sizes: of the model, where they are not ``model.SIZES``.

    Raises:
        ValueError: unknown stage.
        FileNotFoundError: no checkpoint to resume, or none of an earlier stage.
        FileExistsError: there is a checkpoint, and ``resume`` is not set.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: choose one of {', '.join(STAGES)}")
    missing = [
        s for s in STAGES[:2] if stage == "tune" and not resume and not (out / f"{s}.pt").exists()
    ]
    if missing:
        raise FileNotFoundError(f"{out} holds no {missing[0]}.pt: run that stage before tune")
    line = {"resumed" if resume else "started": asdict(settings), "steps": steps, "anneal": anneal}
    launch.open_run(out / f"{stage}.pt", out / f"{stage}.jsonl", line, resume)
    arguments = (stage, settings, out, resume, steps, anneal, sizes or {})
    launch.in_processes(_run, arguments, settings.processes, out / f"{stage}.rendezvous")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a stage's log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the larger embedded model, stage by stage.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue the stage in --out")
    parser.add_argument(
        "--anneal", action="store_true", help="let the rate fall to zero over these steps"
    )
    option = launch.SettingsOption(parser, Settings)
    chosen = parser.parse_args()
    settings = Settings(**option.read(chosen.set))
    train(chosen.stage, settings, chosen.out, chosen.steps, chosen.resume, chosen.anneal)


if __name__ == "__main__":
    main()
