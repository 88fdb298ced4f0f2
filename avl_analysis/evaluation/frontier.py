"""Accuracy against bytes: every policy at every budget on the drawn scenes' tasks.

    avl frontier --out frontier.jsonl --scenes 200 --workers 2

A budget up to 1 is a share of the full cache's bytes, one above 1 a number of image tokens that
could be held beside all text. Options of policies beside the budget are their own defaults, or
those of a file that `python -m avl_analysis.evaluation.search` wrote.

Each policy answers the same questions, by default of the split `comparison`, by which no policy or
preset was chosen; what is plotted against accuracy is the share of
the full cache's bytes that was really in use (`bytes`: of each row when its answer ended), never
the budget asked for. Bytes and keys read are those of each row by itself, whatever padding or
other rows stand beside it. Some questions under one policy are a shard of a `sharded_run`: its
results go to a file of their own, written whole or not at all, and a run that was interrupted, or
that is asked for more questions, tasks or policies, goes on with the missing ones. Workers are
processes of one thread.

What makes it affordable: the picture is encoded once per group and not once per policy (times of
whole answers are therefore not measured here; `compare` does that), and an answer is cut where it
has become longer than any right one. The time of attention alone is measured, as processor time, so
that other work on the machine counts little.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import avl
from avl import Policy
from avl.families import describe as describe_family
from avl.kernels.codes import BITS
from avl.policies.before_decoder import BeforeDecoderPolicy
from avl.policies.registry import PRESETS, policies
from avl_analysis.corpus.batches import (
    ANSWER_SLACK,
    Failure,
    halve_on_failure,
    images_encoded_once,
    longest_right_answer,
)
from avl_analysis.corpus.process_workers import in_processes
from avl_analysis.corpus.questions import Sample, scene_samples
from avl_analysis.corpus.scoring import correct
from avl_analysis.corpus.sharded_run import Job, Shard, sharded_run
from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.evaluation.generation import (
    Run,
    bytes_share_of_row,
    decode_texts,
    generate,
)
from avl_analysis.evaluation.policy_files import changed, load_options, with_budget
from avl_analysis.files import user_path, write_text
from avl_analysis.intervals import paired_share_difference, share_interval
from avl_analysis.models.loading import VLM, load_model
from avl_analysis.scenes import ALL_TASKS, LONG_TASKS
from avl_analysis.scenes.samples import SPLITS

BUDGETS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.1)
"""Shares of the full cache's bytes."""
TOKENS = (128, 64, 32)
"""Image tokens that could be held beside all text."""

EQUAL_BYTES = 0.02
"""Relative difference of bytes up to which two policies count as using equally many."""

Line = dict[str, Any]


@dataclass(frozen=True)
class FrontierPoint:
    """One point of the plot.

    A policy, the budget it was asked for (None: its own settings; above 1: image tokens) and its
    name.
    """

    name: str
    budget: float | None
    policy: Policy


@dataclass(frozen=True)
class FrontierSettings:
    """What a run is made of; a run can only be continued with equal settings."""

    model: str = "scenes"
    tasks: tuple[str, ...] = ALL_TASKS
    samples: int = 200
    budgets: tuple[float, ...] = (*BUDGETS, *TOKENS)
    batch: int = 16
    seed: int = SPLITS["comparison"]
    options: str = ""
    """File of policies' options beside the budget; "": their defaults."""


@dataclass(frozen=True, eq=False)
class Unit(Shard):
    """Work that is done at once: some samples of a task under one policy's points.

    Attributes:
        task: what is asked.
        indices: numbers of the samples.
        points: the policy at its budgets.
        folder: where the results go.
    """

    task: str
    indices: tuple[int, ...]
    points: tuple[FrontierPoint, ...]
    folder: Path

    @property
    def count(self) -> int:
        return 1

    def done(self, folder: Path) -> bool:
        return self.target.exists()

    @property
    def target(self) -> Path:
        """The file of the results. Its name tells the points, so that other options are another."""
        digest = hashlib.sha256(repr(self.points).encode()).hexdigest()[:12]
        name = f"{self.task}-{self.indices[0]:05d}-{len(self.indices)}-{digest}.jsonl"
        return self.folder / name

    @property
    def size(self) -> int:
        """Roughly how long it takes; captions have ten times the tokens of other answers.

        Large ones go first.
        """
        return len(self.indices) * (3 if self.task in ("caption", *LONG_TASKS) else 1)


@dataclass(frozen=True)
class Prompts:
    """What a budget in image tokens needs to know: how long a prompt is, and how wide a number.

    Attributes:
        image_tokens: of a prompt.
        itemsize: bytes of a number in the cache.
    """

    # The embedded model's: a grid of 12 x 12 patches, and float32.
    image_tokens: int = 144
    itemsize: int = 4


def entries(
    budgets: Sequence[float] = (*BUDGETS, *TOKENS),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    prompts: Prompts | None = None,
) -> list[FrontierPoint]:
    """Full cache, A-VL with the paper's settings, presets, and every policy by budget.

    Presets stand at every budget, too.

    Args:
        budgets: shares of the full cache's bytes, or, above 1, image tokens.
        options: name of a policy or preset -> its fields beside the budget, at every budget. The
            paper's settings and a preset's own stay as they are.
        prompts: what is asked; None: the embedded model's.
    """
    options, prompts = options or {}, prompts or Prompts()
    found = [
        FrontierPoint("full", None, avl.FullPolicy()),
        FrontierPoint("A-VL (paper)", None, avl.AdaptivePolicy()),
    ]
    for name, preset in PRESETS.items():
        found.append(FrontierPoint(_shown(name), None, preset.make()))
    for name in (*PRESETS, *policies()):
        if name != avl.FullPolicy.name:
            found += [
                FrontierPoint(_shown(name), b, policy_at(name, b, options.get(name, {}), prompts))
                for b in budgets
            ]
    return found


def policy_at(
    name: str, budget: float, options: Mapping[str, Any], prompts: Prompts | None = None
) -> Policy:
    """A policy or preset at a budget, with other fields changed.

    Args:
        name: on the command line.
        budget: share of the full cache's bytes, or, above 1, image tokens beside all text.
        options: its fields beside the budget; they may not be what the budget decides.
        prompts: what is asked; None: the embedded model's.

    Raises:
        InputError: fields the policy does not have or does not accept.
    """
    prompts = prompts or Prompts()
    tokens, of = int(budget), prompts.image_tokens
    if budget <= 1:
        made = (
            PRESETS[name].make(budget) if name in PRESETS else with_budget(policies()[name], budget)
        )
    elif name in PRESETS:
        # A preset keeps all image keys; fewer bytes come from fewer bits for each.
        made = PRESETS[name].make(cold=_bits_within(tokens, prompts))
    else:
        made = policies()[name].for_image_tokens(tokens, of)
    return changed(made, options)


def _bits_within(tokens: int, prompts: Prompts) -> int:
    """Most bits in which all image keys take no more bytes than `tokens` of them in full.

    2 if none do. A tenth is added to the codes for their scales.
    """
    full = 8 * prompts.itemsize
    return next(
        (
            bits
            for bits in sorted(BITS, reverse=True)
            if 1.1 * bits / full * prompts.image_tokens <= tokens
        ),
        min(BITS),
    )


def _shown(name: str) -> str:
    """A policy's name on the command line, as a reader knows it."""
    return name.replace("a-vl", "A-VL").replace("-cold", " cold")


def run_unit(
    vlm: VLM, samples: Sequence[Sample], indices: Sequence[int], points: Sequence[FrontierPoint]
) -> list[Line]:
    """Every point's answers to some samples: which are right, and at what cost."""
    # Answers are cut where none of the batch can be right any more; a caption that goes on is wrong
    # already.
    longest = longest_right_answer(vlm, [samples[index] for index in indices])
    right = {index: longest_right_answer(vlm, [samples[index]]) - ANSWER_SLACK for index in indices}
    lines: list[Line] = []
    with images_encoded_once(vlm.model) as forget:
        # `ask` takes the policy as a default, which binds that of its own turn of the loop.
        for point in points:

            def ask(part: Sequence[int], policy: Policy = point.policy) -> list[Line]:
                if isinstance(policy, BeforeDecoderPolicy) and policy.reads_image_encoder:
                    forget()
                return _ask(vlm, [samples[i] for i in part], part, policy, longest)

            for index, found in zip(indices, halve_on_failure(ask, indices), strict=True):
                answer = {"failed": found.reason} if isinstance(found, Failure) else found
                lines.append(
                    {
                        "policy": point.name,
                        "budget": point.budget,
                        "sample": index,
                        "answer_tokens": right[index],
                        **answer,
                    }
                )
    return lines


def _ask(
    vlm: VLM, samples: Sequence[Sample], indices: Sequence[int], policy: Policy, longest: int
) -> list[Line]:
    # On a GPU the processor's time does not count what the device does.
    on_cpu = vlm.model.device.type == "cpu"
    run = generate(
        vlm,
        samples,
        policy,
        max_new_tokens=longest,
        time_attention=True,
        processor_time=on_cpu,
    )
    assert run.usage is not None
    usage = run.usage
    shares = {
        "filled": usage.filled_share,
        "allocated": usage.allocated_share,
        "bookkeeping": usage.bookkeeping / usage.full,
    }
    if len(run.attention) > 1:
        # The median, because kernels are compiled at the first step that needs them.
        shares["attention"] = float(np.median(run.attention[1:])) / len(samples)
    texts = decode_texts(vlm, run.tokens)
    return [
        {
            **shares,
            "right": int(correct(text, sample)),
            "held": _held(run, row),
            "bytes": bytes_share_of_row(run, row),
            "attended": _attended(run, row),
        }
        for row, (text, sample) in enumerate(zip(texts, samples, strict=True))
    ]


def _held(run: Run, row: int) -> float:
    """Keys a row held when its answer ended / tokens it had seen, whatever its neighbours held."""
    assert run.usage is not None
    # The pass that produced the row's last token: step 0 produced the first.
    end = run.usage.steps[len(run.tokens[row]) - 1]
    return float(np.mean([layer[row] for layer in end.held])) / (
        run.prompt_tokens[row] + len(run.tokens[row]) - 1
    )


def _attended(run: Run, row: int) -> float:
    """Keys that a row's newest token attended to / tokens it had seen.

    Mean over layers and the row's own decode steps; 1.0 where there are none.
    """
    assert run.usage is not None
    steps = run.usage.steps[1 : len(run.tokens[row])]
    read = [float(np.mean([layer[row] for layer in step.attended])) for step in steps]
    # Decode step n sees the prompt and n generated tokens.
    seen = [run.prompt_tokens[row] + number for number in range(1, len(steps) + 1)]
    return float(np.mean(np.array(read) / seen)) if read else 1.0


# -- the run ---------------------------------------------------------------------------------------


def one_token_tasks(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Tasks whose right answers are all one token long, in the order of the lines.

    Unknown lengths count as longer.

    The first token of an answer comes from the prompt's own pass, so such a task cannot show what a
    policy loses while decoding.
    """
    longest = {str(line["task"]): line.get("answer_tokens") for line in lines}
    return [task for task, tokens in longest.items() if tokens == 1]


def summarise(lines: Iterable[Line], points: Sequence[FrontierPoint], samples: int) -> list[Line]:
    """One line per task and point.

    Accuracy with its Wilson interval, paired difference to the full cache, bytes.
    """
    # By task, policy and budget; lines of all units of the task together.
    by_cell: dict[tuple[str, str, float | None], list[Line]] = {}
    for line in lines:
        by_cell.setdefault((line["task"], line["policy"], line["budget"]), []).append(line)
    found = []
    for (task, name, budget), cell in by_cell.items():
        # (samples,), in the order of the questions, so that policies can be compared question by
        # question.
        right = _right(cell, samples)
        full = _right(by_cell[task, "full", None], samples)
        share, change = share_interval(right), paired_share_difference(right, full)
        policy = next(
            point.policy for point in points if (point.name, point.budget) == (name, budget)
        )
        seconds, of_full = _mean(cell, "attention"), _mean(by_cell[task, "full", None], "attention")
        found.append(
            {
                "task": task,
                "policy": name,
                "budget": budget,
                "samples": share.n,
                "failed": len(cell) - share.n,
                "accuracy": round(share.mean, 4) if share.n else None,
                "low": round(share.low, 4) if share.n else None,
                "high": round(share.high, 4) if share.n else None,
                "difference": _rounded(change.mean),
                "difference_low": _rounded(change.low),
                "difference_high": _rounded(change.high),
                **{
                    key: _rounded(_mean(cell, key))
                    for key in ("bytes", "held", "filled", "allocated", "attended", "bookkeeping")
                },
                "attention_seconds": _rounded(seconds, 8),
                "attention_time": _rounded(seconds / of_full),
                # Longest right answer of the task: 1 marks tasks that cannot show losses in
                # decoding.
                "answer_tokens": max((line["answer_tokens"] for line in cell), default=None),
                "settings": repr(policy),
                # One letter for each question, so that differences can be paired again from the
                # file alone.
                "right": "".join("-" if np.isnan(value) else str(int(value)) for value in right),
            }
        )
    order = {(point.name, point.budget): place for place, point in enumerate(points)}
    return sorted(
        found,
        key=lambda line: (ALL_TASKS.index(line["task"]), order[line["policy"], line["budget"]]),
    )


def _right(cell: Sequence[Line], samples: int) -> np.ndarray:
    """(samples,) 1 right, 0 wrong, NaN failed."""
    right = np.full(samples, np.nan)
    for line in cell:
        right[line["sample"]] = line.get("right", np.nan)
    return right


def _mean(cell: Sequence[Line], key: str) -> float:
    values = [line[key] for line in cell if key in line]
    return float(np.mean(values)) if values else float("nan")


def _rounded(value: float, digits: int = 5) -> float | None:
    return round(value, digits) if np.isfinite(value) else None


@lru_cache(maxsize=len(ALL_TASKS))
def _samples(settings: FrontierSettings, task: str) -> list[Sample]:
    return scene_samples(settings.samples, [task], seed=settings.seed)


@dataclass(frozen=True)
class FrontierJob(Job[Unit]):
    """What a worker needs to know."""

    settings: FrontierSettings
    folder: Path

    def load(self) -> VLM:
        return load_model(self.settings.model)

    def do(self, vlm: VLM, shard: Unit) -> None:
        samples = _samples(self.settings, shard.task)
        lines = run_unit(vlm, samples, shard.indices, shard.points)
        text = "".join(json.dumps({"task": shard.task, **line}) + "\n" for line in lines)
        write_text(shard.target, text)


def run(
    settings: FrontierSettings,
    folder: Path,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    points: Sequence[FrontierPoint] | None = None,
) -> list[Line]:
    """Do the units that are missing in `folder`, then read all of them.

    Args:
        settings: what is asked of which policies.
        points: the policies; None: those of `entries`. The first must be the full cache's.
        folder: where finished units are kept; made if it does not exist.
        workers: processes of one thread each.
        progress: called with (units done, units in all).

    Returns:
        One line per task and point, as `summarise` makes them.

    Raises:
        InputError: the folder holds a run with other settings or other weights, or another process
            is at work in it.
    """
    # Loaded here for its revision and the length of prompts; the workers load their own.
    vlm = load_model(settings.model)
    if points is None:
        points = entries(settings.budgets, options_of(settings), _prompts(settings, vlm))
    planned = [
        Unit(task, batch, group, folder)
        for batch in _consecutive(settings.samples, settings.batch)
        for task in settings.tasks
        for group in _by_policy(points)
    ]

    def read_all(note: Mapping[str, Any]) -> list[Line]:
        return [
            json.loads(line)
            for unit in planned
            for line in unit.target.read_text(encoding="utf-8").splitlines()
        ]

    lines = sharded_run(
        FrontierJob(settings, folder),
        # The first questions of all tasks go first; among these the longest, so that no worker is
        # left with one at the end.
        sorted(planned, key=lambda unit: (unit.indices[0], -unit.size)),
        describe(settings, vlm),
        in_processes(workers),
        finish=read_all,
        progress=progress,
    )
    return summarise(lines, points, settings.samples)


def _consecutive(samples: int, batch: int) -> list[tuple[int, ...]]:
    """Indices of questions in units of work; those of a unit do not depend on how many follow."""
    return [tuple(range(start, min(start + batch, samples))) for start in range(0, samples, batch)]


def _by_policy(points: Sequence[FrontierPoint]) -> list[tuple[FrontierPoint, ...]]:
    """Points of one name together, in the order of their first."""
    groups: dict[str, list[FrontierPoint]] = {}
    for point in points:
        groups.setdefault(point.name, []).append(point)
    return [tuple(group) for group in groups.values()]


def describe(settings: FrontierSettings, vlm: VLM) -> dict[str, Any]:
    """What makes two runs the same one.

    Questions, tasks, budgets and options may change from one to the next: each file of results says
    by its name what it is of.
    """
    same = replace(settings, samples=0, tasks=(), budgets=(), options="")
    return {"settings": repr(same), "model_revision": vlm.revision}


def options_of(settings: FrontierSettings) -> dict[str, dict[str, Any]]:
    """Fields of policies beside their budget, from the file that the settings name."""
    return load_options(settings.options) if settings.options else {}


def _prompts(settings: FrontierSettings, vlm: VLM) -> Prompts:
    """Image tokens of the first question's prompt, and the width of the cache's numbers."""
    sample = _samples(settings, settings.tasks[0])[0]
    inputs = vlm.prepare([list(sample.images)], [sample.prompt])
    layout = describe_family(vlm.model).layout(
        inputs["input_ids"], inputs["attention_mask"], inputs
    )
    return Prompts(int(layout.counts()[0, 1]), vlm.model.dtype.itemsize)


def write(path: Path, lines: Sequence[Line], header: Mapping[str, Any]) -> None:
    """JSON lines, the first one saying where the others come from."""
    text = [json.dumps({"about": dict(header)}), *(json.dumps(line) for line in lines)]
    write_text(path, "\n".join(text) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Line]]:
    """Header and lines that `write` wrote.

    Raises:
        InputError: no such file, or not one of these.
    """
    path = user_path(path)
    if not path.is_file():
        raise InputError(f"there is no frontier {path}; make one with avl frontier --out {path}")
    with blamed_on_input(
        f"{path} is not a frontier, or was changed", ": make one with avl frontier"
    ):
        text = path.read_text(encoding="utf-8")
        first, *lines = [json.loads(line) for line in text.split("\n") if line]
        about = dict(first["about"])
        for line in lines:
            _check(line)
    return about, lines


def _check(line: Line) -> None:
    """Refuse a line that is none of `summarise`."""
    for name in ("task", "policy", "settings"):
        if not isinstance(line.get(name, ""), str):
            raise ValueError(f"{name} is no text")
    # Letters that `summarise` writes: 1 right, 0 wrong, - failed.
    if set(line.get("right", "")) - set("01-"):
        raise ValueError("what was right is told by other letters than 0, 1 and -")
    for name in line.keys() - {"task", "policy", "settings", "right"}:
        if line[name] is not None and not isinstance(line[name], (int, float)):
            raise ValueError(f"{name} is no number")
