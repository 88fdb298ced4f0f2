"""Pages read by what a query can make of them, against loops over pages and channels."""

from typing import Any

import pytest
import torch
from torch import Tensor

import avl
from avl.attention import Attend, AttentionCall
from avl.hooks import Intervention, attached
from tests import tiny
from tests.avl.generating import check_rows_alone, difference, generate, rows_alone

UNEVEN: dict[str, Any] = {"batch": [25, 50, 40, 8], "images": [1, 0, 2, 3], "between": 11}


class SlowQuest(Intervention):
    """Quest by masking: the stock cache keeps everything, and each step hides the other pages."""

    def __init__(self, budget: float, size: int, dense: int) -> None:
        self.budget, self.size, self.dense = budget, size, dense
        self.read: dict[tuple[int, int, int, int], set[int]] = {}

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        if call.forward.kind != "decode" or call.layer < self.dense:
            return inner(call)
        visible = torch.zeros(*call.query.shape[:2], 1, call.key.shape[2], dtype=torch.bool)
        for row in range(len(visible)):
            tokens = call.forward.layout.valid[row].nonzero()[:, 0].tolist()
            pages = [tokens[i : i + self.size] for i in range(0, len(tokens), self.size)]
            others = (int(self.budget * len(tokens)) - len(pages[-1])) // self.size
            for head in range(call.key.shape[1]):
                group = range(head * call.groups, (head + 1) * call.groups)
                worth = [self.worth(call, row, head, group, page) for page in pages[:-1]]
                order = sorted(range(len(worth)), key=lambda n, worth=worth: -worth[n])
                chosen = [pages[n] for n in order[: max(others, 0)]] + [pages[-1]]
                read = {token for page in chosen for token in page}
                self.read[call.forward.step, call.layer, row, head] = read
                for q in group:
                    visible[row, q, 0, list(read)] = True
        call.mask = visible
        return inner(call)

    def worth(
        self, call: AttentionCall, row: int, head: int, group: range, page: list[int]
    ) -> float:
        keys = call.key[row, head, page]
        bounds = []
        for q in group:
            query = call.query[row, q, 0]
            each = [
                max(float(query[c] * keys[:, c].min()), float(query[c] * keys[:, c].max()))
                for c in range(keys.shape[1])
            ]
            bounds.append(sum(each))
        return max(bounds)


@pytest.mark.parametrize(("budget", "size", "dense"), [(0.4, 4, 1), (0.05, 16, 0), (0.7, 7, 0)])
def test_each_step_reads_the_pages_that_the_slow_statement_reads(
    budget: float, size: int, dense: int
) -> None:
    model = tiny.llava(kv_heads=2, layers=3, grid=5)
    inputs = tiny.inputs(model, **UNEVEN)
    slow = SlowQuest(budget, size, dense)
    with attached(model, slow):
        tokens, logits = generate(model, inputs, 10)
    policy = avl.QuestPolicy(budget=budget, page_size=size, dense_layers=dense)
    with avl.adaptive(model, policy) as session:
        read_tokens, read_logits = generate(model, inputs, 10)
    assert torch.equal(tokens, read_tokens)
    assert difference(logits, read_logits) < 1e-4
    for (step, layer, row, head), read in slow.read.items():
        attended = session.usage().steps[step].attended[layer][row]
        assert attended == len(read)
        images = session.selection.state(layer, step)[row, head] == avl.State.CORE
        shown = set(images.nonzero()[:, 0].tolist())
        of_image = set((inputs["input_ids"][row] == tiny.IMAGE).nonzero()[:, 0].tolist())
        assert shown & of_image == read & of_image


@pytest.mark.parametrize("policy", [avl.QuestPolicy(budget=0.3, page_size=8, dense_layers=1)])
def test_every_row_of_a_padded_batch_equals_that_row_alone(policy: avl.Policy) -> None:
    model = tiny.llava(kv_heads=2, layers=3, grid=5)
    rows = rows_alone(model, [25, 50, 8], [1, 0, 2], between=11)
    check_rows_alone(model, *rows, policy, steps=40, tolerance=1e-4)


def test_the_whole_budget_changes_nothing() -> None:
    model = tiny.llava(kv_heads=2, layers=3, grid=5)
    inputs = tiny.inputs(model, [25, 8], images=[1, 2], between=3)
    tokens, logits = generate(model, inputs, 40)
    with avl.adaptive(model, avl.QuestPolicy(budget=1, dense_layers=0)) as session:
        same_tokens, same_logits = generate(model, inputs, 40)
    assert torch.equal(tokens, same_tokens)
    assert difference(logits, same_logits) < 1e-4
    assert session.usage().attended_share < 1  # of what was seen, padding included
    assert [s.attended[0] for s in session.usage().steps] == [
        s.held[0] for s in session.usage().steps
    ]


@pytest.mark.parametrize("setting", [{"budget": 0.4}, {"budget_tokens": 30}])
def test_keys_read_stay_within_the_budget_and_bytes_are_those_of_keys_and_bounds(
    setting: dict[str, Any],
) -> None:
    model = tiny.llava(kv_heads=2, grid=10, layers=3)
    policy = avl.QuestPolicy(**setting, page_size=4, dense_layers=1)
    with avl.adaptive(model, policy) as session:
        out = model.generate(
            **tiny.inputs(model, [9]),
            max_new_tokens=20,
            do_sample=False,
            return_dict_in_generate=True,
        )
    usage = session.usage()
    for step in usage.steps[1:]:
        tokens = 3 + 100 + 9 + step.step
        most = int(0.4 * tokens) if "budget" in setting else 3 + 30 + 9 + step.step
        first, *others = (layer[0] for layer in step.attended)
        assert first == tokens
        assert all(most - 4 < keys <= most for keys in others)
    buffers = [layer.buffer for layer in out.past_key_values.layers]
    pages = sum(b.pages.low.nbytes + b.pages.high.nbytes for b in buffers if b.pages is not None)
    keys = sum(t[:, :, : b.filled].nbytes for b in buffers for t in (b.keys, b.values))
    assert pages == 2 * 33 * 2 * 16 * 2 * 4  # layers, pages, heads, width, bounds, bytes
    assert usage.filled == keys + pages
    assert usage.steps[-1].by_row == (usage.filled,)


def test_a_cache_is_continued_with_another_turn_and_with_beams() -> None:
    model = tiny.llava(kv_heads=2, layers=3)
    inputs = tiny.inputs(model, [30, 22])
    with avl.adaptive(model, avl.QuestPolicy(budget=1, dense_layers=0)):
        beams, _ = generate(model, inputs, 12, num_beams=3)
    assert torch.equal(beams, generate(model, inputs, 12, num_beams=3)[0])
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    answers = []
    for policy in (avl.FullPolicy(), avl.QuestPolicy(budget=1, dense_layers=0)):
        with avl.adaptive(model, policy):
            out = model.generate(**inputs, max_new_tokens=6, **options)
            ids = torch.cat([out.sequences, torch.tensor([[20, 30], [33, 44]])], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
            more = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=out.past_key_values,
                max_new_tokens=6,
                **options,
            )
            answers.append(more.sequences)
    assert torch.equal(*answers)
