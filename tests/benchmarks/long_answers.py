"""How long an answer the embedded model can give: conversations of several turns over one cache.

    python -m tests.benchmarks.long_answers --scenes 10

Each conversation is about one picture of the task `story` (six objects and a string) under full
attention. A later turn is put to the same cache, as a user's would be. Printed are the tokens of
all answers together with their end marks, the longest sequence, the share of conversations in which
every answer is right, and the share of right answers turn by turn. The model was trained on at most
72 tokens after the picture (`scenes.training.batches.ROW`); it has seen no position behind these.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from avl_analysis.models.loading import VLM, greedy, load_model
from avl_analysis.scenes import PLACES, SceneSample, samples
from avl_analysis.scenes.questions import caption, name
from avl_analysis.scenes.samples import SPLITS
from avl_analysis.scenes.world import text_cells

Turns = list[tuple[str, str]]
"""Questions and right answers."""


def _story(sample: SceneSample) -> Turns:
    return [("Describe the picture.", caption(sample.scene))]


def _objects(sample: SceneSample) -> Turns:
    return [(f"What is at {thing.place}?", name(thing)) for thing in sample.scene.things]


def _table(sample: SceneSample) -> Turns:
    at = {thing.cell: thing for thing in sample.scene.things}
    text = sample.scene.text
    covered = text_cells(text) if text else ()
    return [
        (f"What is at {PLACES[cell]}?", name(at[cell]) if cell in at else "nothing")
        for cell in range(len(PLACES))
        if cell not in covered
    ]


CONVERSATIONS: dict[str, Callable[[SceneSample], Turns]] = {
    "the story alone": _story,
    "every cell in turn": _table,
    "every object in turn, then the story": lambda sample: _objects(sample) + _story(sample),
    "the story, then every object in turn": lambda sample: _story(sample) + _objects(sample),
}


def converse(vlm: VLM, sample: SceneSample, turns: Turns) -> tuple[list[bool], int, int]:
    """Put the turns to the model, one after the other, over one cache.

    Returns:
        Whether each answer is right, tokens of the right answers with their ends, tokens in all.
    """
    tokenizer = vlm.processor.tokenizer
    inputs = dict(vlm.prepare([sample.image], [turns[0][0]]))
    ids, cache, right, length = inputs["input_ids"], None, [], 0
    for number, (question, answer) in enumerate(turns):
        if number:
            more = tokenizer(f"<user>{question}<assistant>", add_special_tokens=False)
            ids = torch.cat([ids, torch.tensor([more["input_ids"]])], 1)
            inputs = {"past_key_values": cache}
        expected = tokenizer(answer, add_special_tokens=False)["input_ids"]
        expected = [*expected, tokenizer.eos_token_id]
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options = {**greedy(vlm.model), "return_dict_in_generate": True}
        out = vlm.model.generate(**given, **options, max_new_tokens=len(expected))
        right.append(out.sequences[0, ids.shape[1] :].tolist() == expected)
        ids, cache, length = out.sequences, out.past_key_values, length + len(expected)
    return right, length, ids.shape[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per kind of conversation."""
    parser = argparse.ArgumentParser(description="How long an answer the embedded model can give.")
    parser.add_argument("--scenes", type=int, default=10)
    parser.add_argument("--model", default="scenes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    vlm = load_model(given.model)
    asked = samples(given.scenes, "story", SPLITS["model"] + 900)
    for title, turns_of in CONVERSATIONS.items():
        found = [converse(vlm, sample, turns_of(sample)) for sample in asked]
        by_turn = list(zip(*(right for right, _, _ in found), strict=False))
        shares = " ".join(f"{sum(turn) / len(turn):.2f}" for turn in by_turn)
        lengths = sorted(length for _, length, _ in found)
        whole = sum(all(right) for right, _, _ in found) / len(found)
        most = max(total for _, _, total in found)
        print(
            f"{title}: {lengths[0]} to {lengths[-1]} answer tokens, at most {most} in all;"
            f" all right {whole:.2f}; by turn {shares}",
            flush=True,
        )


if __name__ == "__main__":
    main()
