"""Train a larger scenes model, stage by stage.

``python -m avl_analysis.scenes.training.large.train STAGE --steps N --out DIR``.

Three stages, each resumable, each with AdamW:

* ``text``: the decoder on procedural text, loss on all tokens;
* ``vision``: the vision tower with a reader of whole scenes (can run beside ``text``);
* ``tune``: both joined by the projector, on packed conversations about pictures, a few rows of text
  in every step.

The rates are constant after a warm-up; from step ``anneal_from`` on (``--set``) they fall linearly
to zero at the last step. SIGTERM and SIGINT save and stop. No loss looks at attention weights.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avl_analysis.scenes import world
from avl_analysis.scenes.samples import TRAINING_SEED
from avl_analysis.scenes.training import launch, packed
from avl_analysis.scenes.training.architecture import export
from avl_analysis.scenes.training.large import measure, reader, texts
from avl_analysis.scenes.training.large.forward import packed_logits, text_logits
from avl_analysis.scenes.training.large.language import build_processor
from avl_analysis.scenes.training.large.model import build_model
from avl_analysis.scenes.training.large.steps import STAGES, StageSettings, Step, Steps
from avl_analysis.scenes.training.muon import Muon


def mean_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy of each token's successor, 0 where nothing has weight.

    Logits are (..., length, vocabulary), ids and weights (..., length).
    """
    each = F.cross_entropy(
        logits[..., :-1, :].flatten(0, -2).float(), ids[..., 1:].flatten(), reduction="none"
    )
    # A weight stands at a token and counts for its successor, as the logits do.
    used = weights[..., :-1].flatten()
    return (each * used).sum() / used.sum().clamp_min(1e-6)


class StageTrainer:
    """One process's share of a stage."""

    def __init__(
        self, stage: str, settings: StageSettings, rank: int, out: Path, **sizes: int
    ) -> None:
        self.stage, self.settings, self.rank, self.out = stage, settings, rank, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.steps = Steps(stage, settings, rank)
        self.model = build_model(settings.seed, **sizes).to(self.device)
        self.reader = reader.Reader(self.model.config.vision_config.hidden_size).to(self.device)
        # What a stage does not train is left out of `named`, gets no optimiser state and is not
        # decayed.
        trained = {"text": packed.DECODER, "vision": packed.VISION, "tune": "model."}[stage]
        self.named = {
            n: p
            for n, p in self.model.named_parameters()
            if n.startswith(trained) and "post_layernorm" not in n
        }
        self.parameters = list(self.named.values())
        if stage != "text":
            self.parameters += self.reader.parameters()
        matrices = {
            n: p
            for n, p in self.named.items()
            # The decoder's hidden matrices, without the embedding table.
            if n.startswith(f"{packed.DECODER}layers") and p.dim() == 2
        }
        # Unlike in `training.train` the work is not shared out: gradients are equal in all
        # processes after `_agree`, and each computes every update itself.
        self.muon = Muon({n: p.data for n, p in matrices.items()}) if settings.muon_rate else None
        self.matrices = matrices if self.muon else {}
        # The rate given here is never used: `update` sets that of every group before each step.
        self.adam = torch.optim.AdamW(self._groups(), lr=1.0, betas=(0.9, 0.95))
        self.step, self.seconds, self.processor_seconds = 0, 0.0, 0.0
        self.asked_to_stop = self.stop = False

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by rate (vision tower and reader have their own) and by whether they decay."""
        # By identity, since tensors compare element by element.
        s, by_muon = self.settings, {id(p) for p in self.matrices.values()}
        decoder = {id(p) for n, p in self.named.items() if not n.startswith(packed.VISION)}
        groups: list[dict[str, Any]] = []
        for in_decoder, rate in ((False, s.vision_rate), (True, s.rate)):
            # Matrices decay, norms and biases do not.
            for decays in (True, False):
                chosen = [
                    p
                    for p in self.parameters
                    if ((id(p) in decoder), p.dim() >= 2) == (in_decoder, decays)
                    and id(p) not in by_muon
                ]
                decay = s.weight_decay * decays
                groups += (
                    [{"params": chosen, "weight_decay": decay, "rate": rate}] if chosen else []
                )
        return groups

    def losses(self, step: Step) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of each part of the loss."""
        s, config = self.settings, self.model.config
        weights = {n: p.to(torch.bfloat16) for n, p in self.named.items()}
        found: dict[str, tuple[float, Tensor]] = {}
        # Logits are (rows, length, vocabulary) here, (B, R, L, vocabulary) for packed rows below.
        if step.text:
            logits = text_logits(weights, config, step.text.ids, step.text.positions)
            loss = mean_loss(logits, step.text.ids, step.text.weights)
            found["text"] = (1.0 if self.stage == "text" else s.text_weight, loss)
        if step.pixels is None or step.labels is None:
            return found
        features = packed.vision(weights, config, step.pixels)
        if self.stage == "vision" or s.reader_weight:
            loss = reader.loss(self.reader(features.float()), step.labels)
            found["reader"] = (1.0 if self.stage == "vision" else s.reader_weight, loss)
        if step.batch:
            image = packed.project(weights, features)
            logits = packed_logits(weights, config, image, step.batch, step.hidden)
            found["answers"] = (1.0, mean_loss(logits, step.batch.ids, step.batch.weights))
        return found

    def update(self, factor: float, step: Step | None = None) -> dict[str, float]:
        """One step at ``factor`` times the set rates; the parts of the loss.

        ``step`` is the data of the step, made here if None.
        """
        found = self.losses((step or self.steps[self.step]).to(self.device))
        for p in self.parameters:
            p.grad = None
        torch.stack([weight * loss for weight, loss in found.values()]).sum().backward()
        # Before the norm is taken, so that all processes clip by the same factor.
        self._agree()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        # Before any parameter is changed.
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: the gradient is {float(norm)}; resume with a lower rate"
            )
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * factor
        self.adam.step()
        if self.muon:
            gradients = {n: p.grad for n, p in self.matrices.items() if p.grad is not None}
            directions = self.muon.directions(gradients)
            self.muon.apply(
                directions, self.settings.muon_rate * factor, self.settings.weight_decay
            )
        self.step += 1
        return {name: round(float(loss.detach()), 4) for name, (_, loss) in found.items()} | {
            "norm": round(float(norm), 3)
        }

    def _agree(self) -> None:
        """Average gradients over processes, and stop them after the same step."""
        if self.settings.processes == 1:
            self.stop = self.asked_to_stop
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        # One process that is asked to stop stops all after this step; the others would otherwise
        # wait for it in the next sum.
        asked = torch.tensor([float(self.asked_to_stop)], device=self.device)
        flat = torch.cat([*(part.flatten() for part in parts), asked])
        dist.all_reduce(flat)
        self.stop = bool(flat[-1] > 0)
        flat /= self.settings.processes
        start = 0
        for p in self.parameters:
            p.grad, start = flat[start : start + p.numel()].view_as(p), start + p.numel()

    def watch(self) -> dict[str, Any]:
        """What is logged now and then; held-out samples."""
        if self.stage == "text":
            return {
                "text": measure.text_attention(self.model),
                "text_answers": measure.text_answers(self.model),
                "bare_text": measure.text_attention(self.model, bare=1.0),
            }
        # The decoder has no part in this stage.
        if self.stage == "vision":
            found = measure.reading(self.model, self.reader)
            return {"reader": {group: round(value, 4) for group, value in found.items()}}
        return {
            "text": measure.text_attention(self.model, rows=8),
            "image": measure.image_attention(self.model, build_processor()),
            "answers": measure.answers(self.model),
        }

    def save(self) -> None:
        """A checkpoint to resume from, replaced at once or not at all."""
        state = {
            "model": self.model.state_dict(),
            "reader": self.reader.state_dict(),
            "adam": self.adam.state_dict(),
            "muon": self.muon.velocity if self.muon else {},
            "step": self.step,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
        }
        # Written beside the old one and renamed, which is atomic within a file system.
        torch.save(state, self.out / f"{self.stage}.tmp")
        os.replace(self.out / f"{self.stage}.tmp", self.out / f"{self.stage}.pt")
        if self.stage == "tune":
            export(self.model, self.out / "model", build_processor())

    def resume(self) -> None:
        state = torch.load(
            self.out / f"{self.stage}.pt", weights_only=True, map_location=self.device
        )
        self.model.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        # Loading the optimiser's state also loads the rates and decays of the earlier run, over
        # those that this run was given, so they are put back below.
        rates = [group["rate"] for group in self.adam.param_groups]
        decays = [group["weight_decay"] for group in self.adam.param_groups]
        self.adam.load_state_dict(state["adam"])
        if self.muon:
            self.muon.velocity = state["muon"]
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
            torch.load(self.out / f"{stage}.pt", weights_only=True, map_location=self.device)
            for stage in ("text", "vision")
        )
        state = self.model.state_dict()
        for name in state:
            # The projector is in neither: it begins untrained.
            if name.startswith((packed.DECODER, "lm_head")):
                state[name] = text["model"][name]
            elif name.startswith(packed.VISION):
                state[name] = vision["model"][name]
        self.model.load_state_dict(state)
        self.reader.load_state_dict(vision["reader"])
        rng = np.random.default_rng([TRAINING_SEED, 9])
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            image = measure.image_tokens(weights, self.model, [world.draw(rng) for _ in range(8)])
            words = self.model.get_input_embeddings().weight[texts.FIRST_WORD :]
            # Root mean square of words over that of image tokens. Scaling weight and bias of the
            # projector's last layer scales its output by exactly that.
            factor = words.pow(2).mean().sqrt() / image.pow(2).mean().sqrt()
            for part in ("weight", "bias"):
                weights[f"{packed.PROJECTOR}linear_2.{part}"].mul_(factor)

    def clock(self, began: float, worked: float) -> None:
        """Take the time since two readings of the wall's and the processor's clock."""
        self.seconds = time.monotonic() - began
        self.processor_seconds = time.process_time() - worked


def _run(
    rank: int,
    stage: str,
    settings: StageSettings,
    out: Path,
    resume: bool,
    steps: int,
    sizes: dict[str, int],
    meet: str,
) -> None:
    torch.set_num_threads(1)
    if settings.processes > 1:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=settings.processes)
    trainer = StageTrainer(stage, settings, rank, out, **sizes)
    if resume:
        trainer.resume()
    elif stage == "tune":
        trainer.join()

    def ask(*_: Any) -> None:
        trainer.asked_to_stop = True

    # SIGINT, too: it is what the processes of a run get when the one that started them has ended.
    # The handler only leaves a note; the step that is being made is finished first.
    before = {name: signal.signal(name, ask) for name in (signal.SIGTERM, signal.SIGINT)}
    first, last = trainer.step, steps
    # Both clocks go on from where the checkpoint left them.
    began = time.monotonic() - trainer.seconds
    worked = time.process_time() - trainer.processor_seconds
    line_at, watch_at, save_at = (
        trainer.seconds + every for every in (0.0, settings.watch_seconds, settings.save_seconds)
    )
    # Data of a step depends on its number alone, so workers may make it ahead, and a resumed run
    # gets what it would have had.
    data = DataLoader(
        trainer.steps,
        # An item is a whole step already.
        batch_size=None,
        sampler=range(first, last),
        num_workers=settings.workers,
        multiprocessing_context="spawn" if settings.workers else None,
    )
    for step in data:
        factor = settings.factor(trainer.step, last)
        found: dict[str, Any] = trainer.update(factor, step)
        trainer.clock(began, worked)
        ends = trainer.stop or trainer.step == last
        # Measuring sums nothing over processes, so one may do it alone while the others wait at
        # their next sum.
        if rank == 0 and (ends or trainer.seconds >= watch_at):
            found["held_out"] = trainer.watch()
            watch_at = trainer.seconds + settings.watch_seconds
            line_at = trainer.seconds
        if rank == 0 and trainer.seconds >= line_at:
            line = {
                "step": trainer.step,
                "minutes": round(trainer.seconds / 60, 2),
                "processor_minutes": round(trainer.processor_seconds / 60, 2),
                "factor": round(factor, 3),
            }
            launch.append(out / f"{stage}.jsonl", line | found)
            line_at = trainer.seconds + settings.log_seconds
        if rank == 0 and (ends or trainer.seconds >= save_at):
            trainer.save()
            save_at = trainer.seconds + settings.save_seconds
        if ends:
            break
    # The caller may be this very process, where `processes` is 1; its handlers come back.
    for name, handler in before.items():
        signal.signal(name, handler)
    if settings.processes > 1:
        dist.destroy_process_group()


def train(
    stage: str,
    settings: StageSettings,
    out: Path,
    steps: int,
    resume: bool = False,
    sizes: dict[str, int] | None = None,
) -> None:
    """Run a stage up to step ``steps``; ``out`` gets ``STAGE.jsonl`` and ``STAGE.pt``.

    Args:
        stage: one of ``STAGES``; "tune" reads the checkpoints of the other two from ``out``.
        settings: rates, batch sizes, processes.
        out: the run's folder.
        steps: how many the stage has in the end, those before a stop included.
        resume: continue from the stage's checkpoint in ``out``.
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
    line = {"resumed" if resume else "started": asdict(settings), "steps": steps}
    launch.open_run(out / f"{stage}.pt", out / f"{stage}.jsonl", line, resume)
    arguments = (stage, settings, out, resume, steps, sizes or {})
    launch.in_processes(_run, arguments, settings.processes, out / f"{stage}.rendezvous")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a stage's log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description="Train the larger embedded model, stage by stage.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--steps", type=int, required=True, help="steps of the stage in the end")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue the stage in --out")
    option = launch.SettingsOption(parser, StageSettings)
    chosen = parser.parse_args()
    settings = StageSettings(**option.read(chosen.set))
    train(chosen.stage, settings, chosen.out, chosen.steps, chosen.resume)


if __name__ == "__main__":
    main()
