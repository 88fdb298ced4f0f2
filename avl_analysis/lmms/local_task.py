"""Questions as a task folder of lmms-eval: a YAML file, the questions, their pictures, the scoring.

The scoring is this project's own (`corpus.scoring.correct`), so that lmms-eval's score and
`avl compare`'s accuracy of the same questions are the same number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.files import atomic_write, write_text
from avl_analysis.models.images import open_image
from avl_analysis.models.videos import Video

_YAML = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: "answer"
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: correct
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
# Stands beside the YAML file, whose "!function utils.NAME" entries lmms-eval looks up here.
_UTILS = """\
from pathlib import Path

from PIL import Image

from avl_analysis.lmms.local_task import score

HERE = Path(__file__).parent


def doc_to_visual(doc):
    return [Image.open(HERE / name).convert("RGB") for name in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]


def process_results(doc, results):
    return {"correct": score(results[0], doc)}
"""


def write_task(
    folder: Path, name: str, samples: Sequence[Sample], *, max_new_tokens: int = 64
) -> Path:
    """Write a task that `lmms-eval --include_path FOLDER --tasks NAME` runs.

    Args:
        folder: made if it does not exist.
        name: of the task; letters, digits and underscores.
        samples: questions with known answers.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The YAML file.

    Raises:
        InputError: a name that is none, no samples, or one without a known answer.
    """
    if not name.isidentifier():
        raise InputError(f"task name {name!r}: use letters, digits and underscores")
    if not samples:
        raise InputError("no questions to write: pass at least one")
    if unknown := [sample.id for sample in samples if not sample.answers]:
        raise InputError(f"question {unknown[0]} has no known answer, so it cannot be scored")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(samples):
        names = []
        for place, source in enumerate(sample.images):
            if isinstance(source, Video):
                raise InputError(
                    f"question {sample.id} is about a video, which lmms-eval's tasks of this"
                    " toolkit do not take: leave it out"
                )
            names.append(f"{number:05d}-{place}.png")
            with atomic_write(folder / names[-1]) as unfinished:
                open_image(source).save(unfinished)
        lines.append(_document(sample, names))
    questions = folder / f"{name}.jsonl"
    write_text(questions, "".join(json.dumps(line) + "\n" for line in lines))
    write_text(folder / "utils.py", _UTILS)
    # The path is absolute, since lmms-eval may be started in any folder.
    text = _YAML.format(name=name, questions=questions.resolve(), max_new_tokens=max_new_tokens)
    return write_text(folder / f"{name}.yaml", text)


def _document(sample: Sample, images: list[str]) -> dict[str, Any]:
    answers = list(sample.answers or ())
    return {
        "id": sample.id,
        "images": images,
        "prompt": sample.prompt,
        "answer": answers[0],
        "answers": answers,
        "strict": sample.strict,
    }


def score(text: str, document: dict[str, Any]) -> float:
    """1.0 if the text is a right answer to a question that `write_task` wrote, else 0.0."""
    from avl_analysis.corpus.scoring import correct

    sample = Sample(
        document["id"],
        (),
        document["prompt"],
        tuple(document["answers"]),
        strict=bool(document["strict"]),
    )
    return correct(text, sample)
