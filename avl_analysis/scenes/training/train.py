"""Train the embedded model.

``python -m avl_analysis.scenes.training.train --minutes 95 --out runs/scenes``.

Made for a machine with a couple of CPU cores and nothing else: one process of one thread per core,
gradients summed over gloo, everything scheduled by the wall clock, so that a run ends when it was
told to. Pictures come from ``TRAINING_SEED`` and up, fresh every step; nothing is seen twice.

What the loss is made of:

* answers: cross entropy on answer tokens and their end marks, nothing else of the text;
* patches: a linear classifier on the vision features names each image token's colour, look and
  character (thrown away after training). On its own for the first minutes, at full weight
  afterwards: dropped, it lets everything keyed by shape stay at chance for a long while;
* words: each projected image token should agree with the decoder's own vectors of the words that
  are true of it (its colour, shape, size, place, character) better than with the other words of the
  group. This ties the pictures to the vocabulary from the start and hastens the day on which "the
  circle" finds the circle.

What is asked changes on the way: until held-out questions show that objects are found, scenes are
easy and many questions find their object by shape (the kind that is learned last); relations and
counts weigh more in the second half, counting and existence at the very end. ``soften`` shrinks the
decoder's query and key matrices once, on resuming: the remedy where heads have become so sharp that
nothing new is learned, which ``weight_decay`` is there to prevent.

There is **no loss on attention weights**: where heads look is what they came to by themselves. What
one should know when reading attention from this model is that image tokens were asked to resemble
words.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from avl_analysis.scenes.drawing import CHARACTERS, COLOURS
from avl_analysis.scenes.questions import TASKS
from avl_analysis.scenes.samples import SPLITS, TRAINING_SEED
from avl_analysis.scenes.training import batches, launch, packed
from avl_analysis.scenes.training.architecture import build_model, export
from avl_analysis.scenes.training.batches import WORD_GROUPS, Batch
from avl_analysis.scenes.training.muon import Muon

WATCH_SEED = SPLITS["watch"]
"""Held-out scenes looked at during training; evaluation uses others."""
PATCH_CLASSES = {"colour": len(COLOURS), "look": len(batches.LOOKS), "character": len(CHARACTERS)}


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run. Shares are of the whole wall-clock budget."""

    minutes: float
    processes: int = 2
    pictures: int = 16
    early_pictures: int = 8
    early_share: float = 0.45
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    warm_up_steps: int = 60
    patches_only_minutes: float = 2.0
    easy_objects: int = 4
    decay_from: float = 0.45
    last_mix_from: float = 0.5
    final_mix_from: float = 0.9
    patch_weight: float = 1.0
    word_weight: float = 1.0
    background_weight: float = 0.15
    by_shape: float = 0.5
    by_shape_until: float = 0.9
    by_shape_latest: float = 0.82
    weight_decay: float = 0.1
    soften: float = 1.0
    spelled: int = 0
    """1: the words of answers are cut into letters."""
    seed: int = 0


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Weighted mean cross entropy over scored tokens."""
    each = F.cross_entropy(logits.float(), batch.targets, reduction="none")
    return (each * batch.weights).sum() / batch.weights.sum()


def patch_loss(head: nn.Linear, features: Tensor, batch: Batch, background: float) -> Tensor:
    """Cross entropy of naming what is on each image token.

    The last class of each group is "nothing of the kind".
    """
    logits = head(features.float()).split([size + 1 for size in PATCH_CLASSES.values()], -1)
    labels = batch.patches
    # Shape and size as one class, in the order of `batches.LOOKS`: all shapes of one size first.
    look = torch.where(
        labels["shape"] >= 0, labels["size"] * (PATCH_CLASSES["look"] // 2) + labels["shape"], -1
    )
    total = features.new_zeros((), dtype=torch.float32)
    for scores, (group, size) in zip(logits, PATCH_CLASSES.items(), strict=True):
        label = (look if group == "look" else labels[group]).flatten()
        # The class "nothing", which most image tokens are of, counts `background_weight` times.
        weight = torch.ones(size + 1)
        weight[-1] = background
        total = total + F.cross_entropy(
            scores.flatten(0, 1), torch.where(label < 0, size, label), weight
        )
    return total


def word_loss(table: Tensor, image: Tensor, batch: Batch) -> Tensor:
    """How well projected image tokens agree with the vectors of the words that are true of them."""
    image = image.float()
    # Tokens of equal length, so that they cannot agree more by growing.
    unit = image * (image.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    total = image.new_zeros(())
    for group, ids in WORD_GROUPS.items():
        # (B, tokens, words of the group): a softmax among these words only. The gradient reaches
        # the decoder's table as well.
        scores = unit @ table[list(ids)].T
        total = total + F.cross_entropy(
            scores.flatten(0, 1), batch.patches[group].flatten(), ignore_index=-1
        )
    return total / len(WORD_GROUPS)


class Trainer:
    """One process's share of a run."""

    def __init__(self, settings: Settings, rank: int, out: Path) -> None:
        self.settings, self.rank, self.out = settings, rank, out
        self.model = build_model(settings.seed)
        # One class more per group, for "nothing of the kind".
        self.head = nn.Linear(
            self.model.config.vision_config.hidden_size, sum(PATCH_CLASSES.values()) + 3
        )
        # The norm behind the vision tower acts on the class token only, which nothing here reads.
        named = {n: p for n, p in self.model.named_parameters() if "post_layernorm" not in n}
        # Muon is for hidden matrices; embeddings, norms, biases and the patch classifier go to
        # AdamW.
        matrices = {n: p for n, p in named.items() if p.dim() == 2 and "embed" not in n}
        self.named, self.matrices = named, matrices
        self.others = [p for n, p in named.items() if n not in matrices] + list(
            self.head.parameters()
        )
        self.muon = Muon(
            {n: p.data for n, p in matrices.items()}, rank=rank, world=settings.processes
        )
        self.adam = torch.optim.AdamW(
            self.others, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.step, self.elapsed = 0, 0.0
        self.looked: dict[str, float] = {}

    def share(self) -> float:
        """How much of the budget is used, 0 to 1."""
        return self.elapsed / (60 * self.settings.minutes)

    def rate(self) -> float:
        """The schedule's factor on both learning rates: warm-up, constant, then linear to zero."""
        s = self.settings
        return min(1.0, (self.step + 1) / s.warm_up_steps) * min(
            1.0, max(0.0, (1 - self.share()) / (1 - s.decay_from))
        )

    def batch(self) -> Batch:
        s, share = self.settings, self.share()
        # A function of rank and step, so that processes see different scenes and a resumed run goes
        # on with new ones.
        rng = np.random.default_rng([TRAINING_SEED + s.seed, self.rank, self.step])
        mix = batches.FIRST_MIX if share < s.last_mix_from else batches.LAST_MIX
        pictures = s.early_pictures if share < s.early_share else s.pictures
        spelled = bool(s.spelled)
        # `looked` is empty until the first look at held-out questions, so a resumed run is taken
        # for one that does not find objects yet, until it has looked.
        found = min(self.looked.get(task, 0.0) for task in ("colour", "where")) >= s.by_shape_until
        if not found and share < s.by_shape_latest:
            return batches.make(rng, pictures, mix, s.easy_objects, s.by_shape, spelled)
        if share >= s.final_mix_from:
            return batches.make(rng, pictures, batches.FINAL_MIX, spelled=spelled)
        return batches.make(rng, pictures, mix, by_shape=0.1, spelled=spelled)

    def losses(self, batch: Batch, patches_only: bool) -> dict[str, Tensor]:
        # The parameters stay float32; their gradients pass back through this conversion.
        weights = {n: p.to(torch.bfloat16) for n, p in self.named.items()}
        features = packed.vision(weights, self.model.config, batch.pixels)
        found = {"patches": patch_loss(self.head, features, batch, self.settings.background_weight)}
        if not patches_only:
            image = packed.project(weights, features)
            # With the float32 table, not its bfloat16 copy, as `word_loss` computes in float32.
            found["words"] = word_loss(
                self.named[packed.DECODER + "embed_tokens.weight"], image, batch
            )
            found["answers"] = answer_loss(
                packed.decode(weights, self.model.config, image, batch), batch
            )
        return found

    def update(self, seconds: float) -> dict[str, float]:
        """One step; ``seconds`` is the time the run has taken, agreed between the processes."""
        s, batch = self.settings, self.batch()
        found = self.losses(batch, self.elapsed < 60 * s.patches_only_minutes)
        loss = (
            found.get("answers", 0.0)
            + s.patch_weight * found["patches"]
            + s.word_weight * found.get("words", 0.0)
        )
        # None rather than zero: parameters that a step does not use, such as the decoder's while
        # only patches are named, are filled with zeros below, since all processes must send buffers
        # of one length.
        for p in [*self.named.values(), *self.head.parameters()]:
            p.grad = None
        loss.backward()
        parameters = [*self.matrices.values(), *self.others]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # The clock of process 0 and the losses travel with the gradients. The others add 0 to the
        # clock, so that after the sum all processes have the same time and end at the same step.
        told = torch.tensor(
            [seconds if self.rank == 0 else 0.0, *(float(f.detach()) for f in found.values())]
        )
        flat = torch.cat([g.flatten() for g in gradients] + [told])
        if s.processes > 1:
            dist.all_reduce(flat)
            flat[: -len(told)] /= s.processes
        now, *values = flat[-len(told) :].tolist()
        # After the sum, so that every process stops and none waits for the others.
        if not torch.isfinite(flat).all():
            raise FloatingPointError(
                f"step {self.step}: a gradient is not finite; resume with a lower rate"
            )
        self._apply(flat)
        self.elapsed, self.step = now, self.step + 1
        return {name: value / s.processes for name, value in zip(found, values, strict=True)}

    def _apply(self, flat: Tensor) -> None:
        s, factor, at = self.settings, self.rate(), 0
        gradients: dict[str, Tensor] = {}
        for name, p in self.matrices.items():
            # In the order in which `update` has flattened them: matrices first.
            gradients[name], at = flat[at : at + p.numel()].view_as(p), at + p.numel()
        for p in self.others:
            p.grad, at = flat[at : at + p.numel()].view_as(p).clone(), at + p.numel()
        directions = self.muon.directions(gradients)
        # Each process has filled in its own share and zeros elsewhere; the sum is the whole update.
        if s.processes > 1:
            dist.all_reduce(directions)
        self.muon.apply(directions, s.muon_rate * factor, s.weight_decay)
        for group in self.adam.param_groups:
            group["lr"] = s.adam_rate * factor
        self.adam.step()

    @torch.no_grad()
    def watch(self, pictures: int = 64) -> dict[str, float]:
        """Held-out exact match by task, and the losses, over all processes.

        Exact: each answer token is the most likely one.
        """
        right, asked = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
        weights = {n: p.to(torch.bfloat16) for n, p in self.named.items()}
        for part in range(pictures // 16):
            # The same pictures at every look, other ones in every process.
            rng = np.random.default_rng([WATCH_SEED, self.rank, part])
            mix, spelled = {task: 1.0 for task in TASKS if task != "caption"}, self.settings.spelled
            batch = batches.make(rng, 16, mix, spelled=bool(spelled))
            image = packed.project(weights, packed.vision(weights, self.model.config, batch.pixels))
            hit = (
                packed.decode(weights, self.model.config, image, batch).argmax(-1) == batch.targets
            )
            # Wrong tokens per branch. Branches of several turns have no task and are left out.
            wrong = torch.zeros(len(batch.tasks)).index_add_(0, batch.owner, (~hit).float())
            for i, task in enumerate(batch.tasks):
                if task:
                    asked[TASKS.index(task)] += 1
                    right[TASKS.index(task)] += float(wrong[i] == 0)
        both = torch.stack([right, asked])
        if self.settings.processes > 1:
            dist.all_reduce(both)
        return {
            task: round(float(r / max(float(n), 1.0)), 4)
            for task, r, n in zip(TASKS, *both, strict=True)
        }

    def save(self) -> None:
        """A checkpoint a run can resume from, replaced at once or not at all."""
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "velocity": self.muon.velocity,
            "adam": self.adam.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        torch.save(state, self.out / "checkpoint.tmp")
        # Within a file system a rename is atomic: a run that is killed meanwhile leaves the old
        # file.
        os.replace(self.out / "checkpoint.tmp", self.out / "checkpoint.pt")
        export(self.model, self.out / "model")

    def resume(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.adam.load_state_dict(state["adam"])
        self.muon.velocity, self.step, self.elapsed = (
            state["velocity"],
            state["step"],
            state["elapsed"],
        )
        with torch.no_grad():
            for name, p in self.matrices.items():
                if name.startswith(packed.DECODER) and ("q_proj" in name or "k_proj" in name):
                    # Queries and keys both, so attention logits shrink by the square of it.
                    p.mul_(self.settings.soften)


def _run(rank: int, settings: Settings, out: Path, resume: bool, rendezvous: str) -> None:
    torch.set_num_threads(1)
    if settings.processes > 1:
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=settings.processes
        )
    trainer = Trainer(settings, rank, out)
    if resume:
        trainer.resume()
    # Time before a resumed run counts towards the budget.
    began = time.monotonic() - trainer.elapsed
    line_at, look_at, save_at = 0.0, trainer.elapsed + 120, trainer.elapsed + 300
    while trainer.share() < 1:
        found = trainer.update(time.monotonic() - began)
        looked = {}
        # `watch` sums over processes, so all of them must call it at the same step; `elapsed` is
        # equal in all of them.
        if trainer.elapsed >= look_at or trainer.share() >= 1:
            trainer.looked = looked = trainer.watch()
            look_at = trainer.elapsed + 180
        if rank == 0 and (looked or trainer.elapsed >= line_at):
            line: dict[str, Any] = {
                "step": trainer.step,
                "minutes": round(trainer.elapsed / 60, 2),
                "rate": round(trainer.rate(), 3),
            }
            line |= {name: round(value, 4) for name, value in found.items()} | (
                {"held_out": looked} if looked else {}
            )
            launch.append(out / "log.jsonl", line)
            line_at = trainer.elapsed + 20
        if rank == 0 and (trainer.elapsed >= save_at or trainer.share() >= 1):
            trainer.save()
            save_at = trainer.elapsed + 300
    if settings.processes > 1:
        dist.destroy_process_group()


def train(settings: Settings, out: Path, resume: bool = False) -> LlavaForConditionalGeneration:
    """Run to the end of the budget.

    ``out`` gets ``log.jsonl``, ``checkpoint.pt`` and ``model/``.
    """
    line = {"resumed" if resume else "started": asdict(settings)}
    launch.open_run(out / "checkpoint.pt", out / "log.jsonl", line, resume)
    launch.in_processes(_run, (settings, out, resume), settings.processes, out / "rendezvous")
    return LlavaForConditionalGeneration.from_pretrained(out / "model", dtype=torch.float32)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded scenes model on CPU cores.")
    parser.add_argument(
        "--minutes", type=float, required=True, help="wall-clock budget; the schedule ends with it"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for log, checkpoint and weights"
    )
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    option = launch.SettingsOption(parser, Settings, without=2)
    chosen = parser.parse_args()
    settings = Settings(chosen.minutes, chosen.processes, **option.read(chosen.set))
    train(settings, chosen.out, chosen.resume)


if __name__ == "__main__":
    main()
