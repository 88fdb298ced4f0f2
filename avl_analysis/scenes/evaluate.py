"""Measure the embedded model on held-out scenes.

``python -m avl_analysis.scenes.evaluate --samples 500 --out FILE``.

Every prompt goes through the processor and the stock ``generate`` (greedy), as a user's would. Each
task is asked about its own picture and once more about *another* sample's picture, everything else
unchanged: what is still right then was not seen. Next to that stands the chance level, the share
one would get right without any picture by always giving the commonest answer to that kind of
question.

Scored strictly: a caption counts only if every word of it is right.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from avl_analysis.intervals import wilson
from avl_analysis.scenes import MODEL_DIR
from avl_analysis.scenes.language import conversation, load_processor
from avl_analysis.scenes.questions import TASKS
from avl_analysis.scenes.samples import SPLITS, SceneSample, samples

EVALUATION_SEED = SPLITS["model"]


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two texts agree word for word.

    Spaces and a final full stop do not count, capitals do.
    """

    def plain(text: str) -> list[str]:
        return text.strip().removesuffix(".").split()

    return plain(prediction) == plain(answer)


def chance(asked: Sequence[SceneSample]) -> float:
    """Share right without an image: each kind of question gets its commonest answer.

    Commonest among these samples.
    """
    by_kind: dict[str, Counter[str]] = {}
    for sample in asked:
        by_kind.setdefault(sample.question.kind, Counter())[sample.answer] += 1
    return sum(counts.most_common(1)[0][1] for counts in by_kind.values()) / len(asked)


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: Sequence[SceneSample],
    pictures: Sequence[SceneSample] | None = None,
    batch: int = 50,
) -> list[str]:
    """The model's greedy answers to the samples' prompts.

    About the samples' images or those of ``pictures``.

    Raises ValueError where ``pictures`` is given and not as long as ``asked``.
    """
    shown = asked if pictures is None else pictures
    if len(shown) != len(asked):
        raise ValueError(
            f"{len(asked)} prompts and {len(shown)} pictures: give one picture per prompt"
        )
    found: list[str] = []
    for at in range(0, len(asked), batch):
        prompts = [
            processor.apply_chat_template(conversation(sample.prompt), add_generation_prompt=True)
            for sample in asked[at : at + batch]
        ]
        images = [sample.picture for sample in shown[at : at + batch]]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        longest = (
            # Eight tokens more than the longest right answer, so that an answer that goes on too
            # long shows.
            max(len(processor.tokenizer(s.answer).input_ids) for s in asked[at : at + batch]) + 8
        )
        ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        # Prompts are padded on the left, so every answer begins in the same column.
        found += processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return [text.strip() for text in found]


def _score(given: Sequence[str], asked: Sequence[SceneSample]) -> dict[str, Any]:
    right = sum(exact_match(text, sample.answer) for text, sample in zip(given, asked, strict=True))
    low, high = wilson(right, len(asked))
    return {
        "exact_match": right / len(asked),
        "interval95": [round(low, 4), round(high, 4)],
        "right": right,
    }


def evaluate_task(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    task: str,
    n: int = 500,
    seed: int = EVALUATION_SEED,
) -> dict[str, Any]:
    """Exact match on ``n`` held-out samples of one task with 95 % intervals.

    Own picture, another sample's, chance.

    Raises ValueError for fewer than two samples, between which no pictures can be swapped.
    """
    if n < 2:
        raise ValueError(f"n={n}: need at least 2 samples per task to swap pictures between")
    # Every task has a seed of its own, so no picture is shared between tasks.
    asked = samples(n, task, seed + TASKS.index(task))
    others = asked[1:] + asked[:1]
    given = answers(model, processor, asked)
    wrong = [
        {"index": s.index, "prompt": s.prompt, "answer": s.answer, "given": text}
        for text, s in zip(given, asked, strict=True)
        if not exact_match(text, s.answer)
    ]
    return {
        "samples": n,
        "seed": seed + TASKS.index(task),
        **_score(given, asked),
        "other_picture": _score(answers(model, processor, asked, others), asked),
        "chance": round(chance(asked), 4),
        "first_mistakes": wrong[:5],
    }


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    n: int = 500,
    tasks: Sequence[str] = TASKS,
    seed: int = EVALUATION_SEED,
) -> dict[str, Any]:
    """``evaluate_task`` for each task, by name."""
    return {task: evaluate_task(model, processor, task, n, seed) for task in tasks}


def _one(job: tuple[Path, str, int, int]) -> tuple[str, dict[str, Any], int]:
    folder, task, n, seed = job
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    found = evaluate_task(model, load_processor(folder), task, n, seed)
    return task, found, sum(p.numel() for p in model.parameters())


def _line(task: str, found: dict[str, Any]) -> str:
    low, high = found["interval95"]
    return (
        f"{task:12} {found['exact_match']:.3f} [{low:.3f}, {high:.3f}]  "
        f"other picture {found['other_picture']['exact_match']:.3f}  chance {found['chance']:.3f}"
    )


def main() -> None:
    """Run the evaluation from the command line."""
    parser = argparse.ArgumentParser(
        description="Exact match of the scenes model on held-out scenes, per task."
    )
    parser.add_argument(
        "--model", type=Path, default=MODEL_DIR, help="model folder (default: the shipped one)"
    )
    parser.add_argument("--samples", type=int, default=500, help="samples per task, at least 2")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--processes", type=int, default=2, help="tasks measured at a time")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    chosen = parser.parse_args()
    if chosen.samples < 2 or not (chosen.model / "config.json").exists():
        parser.error(
            f"--samples {chosen.samples} --model {chosen.model}: need 2 samples or more and a model"
            " folder"
        )
    began, found, parameters = time.monotonic(), {}, 0
    jobs = [
        (chosen.model, task, chosen.samples, chosen.seed) for task in reversed(TASKS)
    ]  # the long one first
    with torch.multiprocessing.get_context("spawn").Pool(chosen.processes) as pool:
        for task, result, count in pool.imap_unordered(_one, jobs):
            found[task], parameters = result, count
            print(_line(task, result), flush=True)
    report = {
        "what": (
            "exact match of greedy answers on held-out scenes, 95 % Wilson intervals;"
            " `other_picture` shows the next sample's picture instead; `chance` always gives the"
            " commonest answer to that kind of question"
        ),
        "dtype": "float32",
        "parameters": parameters,
        "seconds": round(time.monotonic() - began),
        "tasks": {task: found[task] for task in TASKS},
    }
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
