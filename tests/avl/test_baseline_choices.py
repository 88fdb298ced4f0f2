"""What each baseline holds, against its rule written out with loops over rows, heads and keys.

The rules are given the softmax weights that an observer saw beside the policy, in a left-padded
batch with grouped-query attention, several images and text between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import avl
from avl.attention import AttentionCall, attention_weights
from avl.hooks import Observer, attached
from avl.policies.base import Choice
from avl.ragged_buffer import RaggedBuffer
from avl.tokens import Modality
from tests import tiny
from tests.avl.generating import generate

HEADS, LAYERS, GROUP = 2, 4, 2


@dataclass
class Row:
    """One row of the batch in one layer, padding left out.

    Attributes:
        positions: sequence index of each token.
        kinds: modality of each token.
        weights: (query heads, tokens, tokens) softmax weights of the prompt.
        keys: (key/value heads, tokens, width).
        values: (key/value heads, tokens, width).
    """

    positions: list[int]
    kinds: list[Modality]
    weights: Tensor
    keys: Tensor
    values: Tensor

    def received(self, head: int, rows: Sequence[int]) -> list[float]:
        """Weight each key got from some query rows, over the query heads of a key/value head."""
        group = range(head * GROUP, (head + 1) * GROUP)
        return [
            sum(float(self.weights[h, r, k]) for h in group for r in rows)
            for k in range(len(self.positions))
        ]

    def last_row(self) -> list[float]:
        heads = range(self.weights.shape[0])
        return [
            sum(float(self.weights[h, -1, k]) for h in heads) / len(heads)
            for k in range(len(self.positions))
        ]

    def text_rows(self) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind == Modality.TEXT]


class Watch(Observer):
    """Softmax weights of every call, by layer: first those of the prompt."""

    def __init__(self) -> None:
        self.prompt: dict[int, list[Row]] = {}
        self.steps: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        weights = attention_weights(call)
        if call.forward.kind == "decode":
            positions = call.key_positions
            assert positions is not None
            heads = positions if positions.dim() == 3 else positions[:, None]
            heads = heads.expand(-1, HEADS, -1).clone()
            self.steps.setdefault(call.layer, []).append((heads, weights[:, :, 0].clone()))
            return
        layout = call.forward.layout
        rows = []
        for row in range(layout.batch):
            if call.forward.rows is None:
                index = layout.valid[row].nonzero()[:, 0]
                positions = index
            else:
                index = (call.forward.rows[row] >= 0).nonzero()[:, 0]
                positions = call.forward.rows[row, index]
            kinds = [Modality(int(code)) for code in layout.modality[row, positions]]
            among = weights[row][:, index][:, :, index]
            pairs = call.key[row][:, index].clone(), call.value[row][:, index].clone()
            rows.append(Row(positions.tolist(), kinds, among, *pairs))
        self.prompt[call.layer] = rows


def best(scores: Sequence[float], count: int, always: Sequence[int] = ()) -> set[int]:
    """Numbers of the `count` keys to hold: those in `always`, then the best of the others."""
    others = [k for k in range(len(scores)) if k not in always]
    others.sort(key=lambda k: -scores[k])
    return {*always, *others[: max(count - len(always), 0)]}


def newest(row: Row, count: int) -> list[int]:
    return list(range(len(row.positions)))[len(row.positions) - count :]


def images_first(row: Row, scores: Sequence[float]) -> list[float]:
    """Scores by which any image key goes before any other key."""
    return [s + 1000 * (k != Modality.IMAGE) for s, k in zip(scores, row.kinds, strict=True)]


# -- the rules: (row, key/value head, keys to hold) -> numbers of the keys held --------------------


def streaming(row: Row, head: int, count: int) -> set[int]:
    """The newest one, the first four, then the newest."""
    tokens = len(row.positions)
    return best([1000 - k if k < 4 else k for k in range(tokens)], count, newest(row, 1))


def h2o(row: Row, head: int, count: int) -> set[int]:
    """Half of them the newest, the others those that got most from all rows."""
    received = row.received(head, range(len(row.positions)))
    return best(received, count, newest(row, max(count // 2, 1)))


def h2o_older(row: Row, head: int, count: int) -> set[int]:
    """A quarter of them the newest, the others those that got most from all rows."""
    received = row.received(head, range(len(row.positions)))
    return best(received, count, newest(row, max(count // 4, 1)))


def snapkv(row: Row, head: int, count: int) -> set[int]:
    """The window of the last eight, then what its rows look at, averaged over five neighbours."""
    tokens = len(row.positions)
    received = row.received(head, range(max(tokens - 8, 0), tokens))
    pooled = [sum(received[max(k - 2, 0) : k + 3]) / 5 for k in range(tokens)]
    scores = [1000 * k if k >= tokens - 8 else pooled[k] for k in range(tokens)]
    return best(scores, count)


def vl_cache(row: Row, head: int, count: int) -> set[int]:
    """A tenth of them the newest, the others those that got most from the text rows."""
    return best(row.received(head, row.text_rows()), count, newest(row, max(count // 10, 1)))


def mixkv(row: Row, head: int, count: int) -> set[int]:
    """The window of the last eight, then a mix of importance and diversity of the other keys."""
    tokens = len(row.positions)
    ranked = range(tokens - 8)
    received = row.received(head, range(tokens - 8, tokens))
    pooled = [sum(received[max(k - 2, 0) : k + 3]) / 5 for k in range(tokens)]
    unit = [row.keys[head, k] / row.keys[head, k].norm() for k in range(tokens)]
    mean = sum(unit[k] for k in ranked)
    cosines = [float(unit[i] @ unit[j]) for i in ranked for j in ranked if i != j]
    redundancy = max(sum(cosines) / len(cosines), 0.0)
    lengths = [float(row.values[head, k].norm()) for k in ranked]
    unlike = [-float(unit[k] @ mean) / float(mean.norm()) for k in ranked]

    def matched(numbers: list[float]) -> list[float]:
        scaled = [(n - min(numbers)) / (max(numbers) - min(numbers)) for n in numbers]
        factor = sum(pooled[k] for k in ranked) / sum(scaled)
        return [factor * s for s in scaled]

    diverse, long = matched(unlike), matched(lengths)
    scores = [redundancy * diverse[k] + (1 - redundancy) * (pooled[k] + long[k]) for k in ranked]
    return best([*scores, *(1000 * k for k in range(tokens - 8, tokens))], count)


RULES: list[tuple[avl.BudgetPolicy, Callable[[Row, int, int], set[int]]]] = [
    (avl.StreamingPolicy(budget=0.4), streaming),
    (avl.StreamingPolicy(budget=0.05), streaming),
    (avl.H2OPolicy(budget=0.4), h2o),
    (avl.H2OPolicy(budget=0.4, recent_share=0.25), h2o_older),
    (avl.SnapKVPolicy(budget=0.4, window=8), snapkv),
    (avl.SnapKVPolicy(budget=0.05, window=8), snapkv),
    (avl.MixKVPolicy(budget=0.4, window=8), mixkv),
]


def run(policy: avl.Policy, steps: int = 1) -> tuple[Watch, avl.AdaptiveSession]:
    model = tiny.llava(grid=5, kv_heads=HEADS, layers=LAYERS)
    inputs = tiny.inputs(model, [25, 40, 9], images=[1, 2, 0], between=4)
    watch = Watch()
    with attached(model, watch), avl.adaptive(model, policy) as session:
        generate(model, inputs, steps)
    return watch, session


def held(session: avl.AdaptiveSession, layer: int, row: int, head: int, step: int = 0) -> set[int]:
    state = session.selection.state(layer, step)[row]
    state = state[min(head, len(state) - 1)]
    return set((state > avl.State.MINOR).nonzero()[:, 0].tolist())


def check(
    watch: Watch,
    session: avl.AdaptiveSession,
    rule: Callable[[Row, int, int], set[int]],
    count_of: Callable[[int, int, Row], int],
) -> None:
    """Every layer, row and head holds what a rule says.

    Args:
        watch: saw the prompt.
        session: of the policy.
        rule: says what to hold.
        count_of: (layer, number of the row, row) -> how many keys to hold.
    """
    for layer, rows in watch.prompt.items():
        for number, row in enumerate(rows):
            count = count_of(layer, number, row)
            for head in range(HEADS):
                expected = {row.positions[k] for k in rule(row, head, count)}
                assert held(session, layer, number, head) == expected, (layer, number, head)


@pytest.mark.parametrize(("policy", "rule"), RULES)
def test_a_baseline_holds_what_its_rule_says_head_by_head(
    policy: avl.BudgetPolicy, rule: Callable[[Row, int, int], set[int]]
) -> None:
    watch, session = run(policy)
    check(watch, session, rule, lambda _, __, row: max(int(policy.budget * len(row.positions)), 1))


def test_h2o_drops_the_least_attended_of_the_older_half_as_the_answer_grows() -> None:
    policy = avl.H2OPolicy(budget=0.4)
    watch, session = run(policy, steps=12)
    for layer, rows in watch.prompt.items():
        for number, row in enumerate(rows):
            for head in range(HEADS):
                received = row.received(head, range(len(row.positions)))
                count = int(0.4 * len(row.positions))
                scores = {row.positions[k]: received[k] for k in h2o(row, head, count)}
                for step, (positions, weights) in enumerate(watch.steps[layer], start=1):
                    start = row.positions[-1] + step
                    scores[start] = 0.0
                    for k, position in enumerate(positions[number, head].tolist()):
                        group = weights[number, head * GROUP : (head + 1) * GROUP, k]
                        if position >= 0:
                            scores[position] += float(group.sum())
                    limit = int(0.4 * (len(row.positions) + step))
                    if len(scores) > limit:
                        older = sorted(scores)[: -(limit // 2)]
                        del scores[min(older, key=scores.__getitem__)]
                    assert held(session, layer, number, head, step) == set(scores)


def test_fastv_holds_the_image_tokens_its_layer_ranks_best_in_every_layer() -> None:
    policy = avl.FastVPolicy(budget=0.7, prefill_layer=2)
    watch, session = run(policy)
    for number in range(3):
        count = int(0.7 * len(watch.prompt[1][number].positions))
        for layer in range(LAYERS):
            # A row without image tokens passes in full, and later layers rank it for themselves.
            row = watch.prompt[max(layer, 1)][number]
            scores = images_first(row, row.last_row())
            expected = {row.positions[k] for k in best(scores, count, newest(row, 1))}
            assert held(session, layer, number, 0) == expected
            if number < 2:
                assert expected == held(session, 0, number, 0)


def test_vl_cache_gives_each_layer_its_density_s_share_and_keeps_what_text_rows_see() -> None:
    policy = avl.VLCachePolicy(budget=0.4, threshold=0.02)
    watch, session = run(policy)
    shares: dict[int, list[float]] = {}
    for number in range(3):
        densities = []
        for layer in range(LAYERS):
            row = watch.prompt[layer][number]
            visible = reached = 0.0
            for r in row.text_rows():
                visible += r + 1
                for h in range(HEADS * GROUP):
                    largest = float(row.weights[h, r].max())
                    above = [float(row.weights[h, r, k]) >= 0.02 * largest for k in range(r + 1)]
                    reached += sum(above) / (HEADS * GROUP)
            densities.append(reached / visible)
        shares[number] = [0.4 * LAYERS * d / sum(densities) for d in densities]
        assert 0.01 < min(shares[number]) < max(shares[number]) < 1  # no bound is reached
    counts = [
        [int(shares[n][layer] * len(watch.prompt[layer][n].positions)) for n in range(3)]
        for layer in range(LAYERS)
    ]
    assert len(set(map(tuple, counts))) > 1
    check(watch, session, vl_cache, lambda layer, number, _: counts[layer][number])


def prefix_sizes(importance: Sequence[Sequence[float]], share: float) -> list[int]:
    """Length of each layer's shortest prefix that reaches a share of its importance."""
    sizes = []
    for scores in importance:
        total, count = 0.0, 0
        for score in sorted(scores, reverse=True):
            total, count = total + score / sum(scores), count + 1
            if total >= share:
                break
        sizes.append(count)
    return sizes


def test_prefixkv_gives_every_layer_the_keys_that_reach_one_common_share() -> None:
    watch, session = run(avl.PrefixKVPolicy(budget=0.4))
    differing = set()
    for number in range(3):
        rows = [watch.prompt[layer][number] for layer in range(LAYERS)]
        budget = int(0.4 * LAYERS * len(rows[0].positions))
        importance = [row.weights.sum((0, 1)).tolist() for row in rows]
        sizes = [1] * LAYERS
        for n in range(4001):
            longer = prefix_sizes(importance, n / 4000)
            sizes = longer if sum(longer) <= budget else sizes
        for layer, row in enumerate(rows):
            scores = [1000 - k if k < 4 else s for k, s in enumerate(importance[layer])]
            expected = best(scores, sizes[layer], newest(row, 1))
            assert held(session, layer, number, 0) == {row.positions[k] for k in expected}
        differing.add(len(set(sizes)))
    assert max(differing) > 1  # layers differ


def test_ada_snapkv_guarantees_each_head_a_fifth_and_divides_the_rest_by_score() -> None:
    watch, session = run(avl.AdaSnapKVPolicy(budget=0.4, window=8))
    differing = set()
    for layer, rows in watch.prompt.items():
        for number, row in enumerate(rows):
            tokens = len(row.positions)
            count = int(0.4 * tokens)
            scores = {}
            for head in range(HEADS):
                received = row.received(head, range(tokens - 8, tokens))
                for k in range(tokens):
                    pooled = sum(received[max(k - 2, 0) : k + 3]) / 5
                    scores[head, k] = 1000 * k if k >= tokens - 8 else pooled
            by_score = sorted(scores, key=lambda entry: -scores[entry])
            expected: list[tuple[int, int]] = []
            for head in range(HEADS):
                own = [entry for entry in by_score if entry[0] == head]
                expected += own[: int(0.2 * count)]
            others = [entry for entry in by_score if entry not in expected]
            expected += others[: HEADS * count - len(expected)]
            for head in range(HEADS):
                keys = {row.positions[k] for h, k in expected if h == head}
                assert held(session, layer, number, head) == keys
            differing.add(len({sum(h == head for h, _ in expected) for head in range(HEADS)}))
    assert max(differing) > 1  # heads hold different numbers of keys


def test_heads_of_different_lengths_take_no_more_memory_than_their_keys() -> None:
    model = tiny.llava(grid=8, kv_heads=HEADS, layers=LAYERS)
    policy = avl.AdaSnapKVPolicy(budget=0.3, window=8)
    for batch, images in (([13], [1]), ([25, 40, 9], [1, 2, 0])):
        with avl.adaptive(model, policy) as session:
            out = model.generate(
                **tiny.inputs(model, batch, images=images),
                max_new_tokens=80,
                do_sample=False,
                return_dict_in_generate=True,
            )
        usage = session.usage()
        buffers = [layer.buffer for layer in out.past_key_values.layers]
        entry = 2 * 16 * 4  # bytes of a key and its value
        counts = [(b.positions[:, :, : b.filled] >= 0).sum((0, 2)).tolist() for b in buffers]
        assert len({tuple(c) for c in counts}) > 1
        assert any(len(set(c)) > 1 for c in counts)
        in_use = sum(b.entries * entry for b in buffers)
        assert usage.filled == in_use
        slack = len(batch) * HEADS * LAYERS * entry  # a slot of each head that was just freed
        assert sum(map(sum, counts)) * entry <= in_use <= sum(map(sum, counts)) * entry + slack
        assert usage.allocated == sum(b.keys.nbytes + b.values.nbytes for b in buffers)
        assert sum(usage.steps[-1].by_row) == sum(map(sum, counts)) * entry


def test_heads_of_different_lengths_follow_beams_and_are_continued() -> None:
    model = tiny.llava(kv_heads=HEADS, layers=2, grid=5)
    inputs = tiny.inputs(model, [30, 22])
    policy = avl.AdaSnapKVPolicy(budget=1)
    with avl.adaptive(model, policy):
        beams, _ = generate(model, inputs, 12, num_beams=3)
    assert torch.equal(beams, generate(model, inputs, 12, num_beams=3)[0])
    with avl.adaptive(model, avl.AdaSnapKVPolicy(budget=0.4, window=6)) as session:
        out = model.generate(
            **inputs, max_new_tokens=8, num_beams=3, do_sample=False, return_dict_in_generate=True
        )
    layer = out.past_key_values.layers[0]
    state = session.selection.state(0)
    state = state if layer.conversation.moved is None else state[layer.conversation.moved]
    for row in range(6):
        for head in range(HEADS):
            positions = layer.buffer.positions[row, head, : layer.buffer.filled]
            kept = (state[row, head] > avl.State.MINOR).nonzero()[:, 0].tolist()
            assert kept == sorted(positions[positions >= 0].tolist())


def test_an_empty_slot_of_a_head_holds_finite_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 4, 3, generator=generator)
    index = torch.tensor([[[0, 1, 2], [-1, 1, 3]], [[-1, -1, 2], [-1, 0, 1]]])
    choice = Choice(
        always_attended=[index],
        scores=torch.zeros(2, 2, 4),
        evictable=[2, 1],
        ragged_heads=True,
    )
    positions = torch.arange(4).expand(2, 1, -1)
    buffer = RaggedBuffer.from_choice(keys, keys.clone(), positions, choice, 2)
    for tensor in (buffer.keys, buffer.values):
        tensor[buffer.entries :] = torch.nan  # what memory may hold that was never written
    new = torch.ones(2, 2, 1, 3)
    buffer.append(new, new, 4, 0.0)
    buffer.evict([True, False], newest=4)
    buffer.append(new, new, 5, 0.0)  # row 0 takes its free slot, row 1 a new one
    read_keys, read_values = buffer.attended(refresh=True)
    assert bool(read_keys.isfinite().all() & read_values.isfinite().all())
    assert buffer.held() == [3, 3]
    held = buffer.positions[:, :, : buffer.filled]
    assert bool((read_keys[held >= 4] == 1).all())
    assert torch.equal(read_keys[0, 1][held[0, 1] == 3], keys[0, 1, 3:])
