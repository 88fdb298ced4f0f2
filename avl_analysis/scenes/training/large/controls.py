"""Small runs of the text stage that differ in one thing each: what makes an attention sink appear?

``python -m avl_analysis.scenes.training.large.controls --out FILE [--only NAME]`` trains decoders
of width 64 for some seconds each and adds a line per run and measurement to ``FILE``. The numbers
compare these runs with each other; they say nothing about a trained model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from avl_analysis.scenes.training import launch
from avl_analysis.scenes.training.large import measure
from avl_analysis.scenes.training.large.steps import StageSettings
from avl_analysis.scenes.training.large.train import StageTrainer

LENGTH = 96
SIZES = {"width": 64, "vision_width": 32, "vision_layers": 1}
COMMON: dict[str, Any] = {
    "rate": 3e-3,
    "text_length": LENGTH,
    "chain": 1.0,
    "repeat": 0.0,
    "bare": 1.0,
}
CONTROLS: dict[str, dict[str, Any]] = {
    "one layer": {"text_layers": 1},
    "three layers": {"text_layers": 3},
    "system text in every row": {"text_layers": 1, "bare": 0.0},
    "Muon": {"text_layers": 1, "muon_rate": 0.02},
    "Muon, three layers": {"text_layers": 3, "muon_rate": 0.02},
    "Muon, three layers, all kinds of text": {
        "text_layers": 3,
        "muon_rate": 0.02,
        "chain": 0.2,
        "repeat": 0.2,
    },
    "Muon, three layers, chains for 400 steps, then all kinds": {
        "text_layers": 3,
        "muon_rate": 0.02,
        "chain": 0.2,
        "repeat": 0.2,
        "chains_until": 400,
    },
    "Muon, system text in every row": {"text_layers": 1, "muon_rate": 0.02, "bare": 0.0},
    "no weight decay": {"text_layers": 1, "weight_decay": 0.0},
    "Muon, scenes, loss on all tokens": {"text_layers": 3, "muon_rate": 0.02, "chain": 0.0},
    "Muon, scenes, loss on answers": {
        "text_layers": 3,
        "muon_rate": 0.02,
        "chain": 0.0,
        "answers_only": 1,
    },
}


def run(name: str, steps: int, every: int, log: Path) -> None:
    """One control; a line is added to ``log`` every ``every`` steps.

    Args:
        name: one of ``CONTROLS``.
        steps: how many to make.
        every: steps between two measurements.
        log: file of one JSON object a line.
    """
    changed = COMMON | CONTROLS[name]
    layers = changed.pop("text_layers")
    with tempfile.TemporaryDirectory() as folder:
        # Nothing is saved, so the folder need not outlive the trainer's making.
        trainer = StageTrainer(
            "text", StageSettings(**changed), 0, Path(folder), text_layers=layers, **SIZES
        )
    began = time.process_time()
    bare = changed["bare"]
    for step in range(1, steps + 1):
        # Rates warm up over 100 steps and stay; the trainer makes the data of each step itself.
        found: dict[str, Any] = trainer.update(min(1.0, step / 100))
        if step % every == 0 or step == steps:
            found |= measure.text_attention(trainer.model, 16, LENGTH, bare)
            line = {"control": name, "step": step} | found
            launch.append(log, line | {"seconds": round(time.process_time() - began, 1)})


def main() -> None:
    """Run the controls from the command line."""
    parser = argparse.ArgumentParser(description="Small runs that differ in one thing each.")
    parser.add_argument("--out", type=Path, required=True, help="file that lines are added to")
    parser.add_argument("--only", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=250)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.only:
        run(name, chosen.steps, chosen.every, chosen.out)


if __name__ == "__main__":
    main()
