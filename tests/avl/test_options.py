"""A-VL beyond the paper: drift, shares per layer, other rankings, cores per
head, sparse refreshes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import avl
from avl.attention import Attend, AttentionCall, attention_weights
from avl.hooks import Intervention, Observer, attached
from avl.policies.scores import KINDS
from avl.tokens import Modality
from tests import tiny
from tests.avl.generating import difference, generate, rows_alone
from tests.avl.masked import masked_avl

Policy = avl.AdaptivePolicy
UNEVEN: dict[str, Any] = {"batch": [25, 50, 40, 8], "images": [1, 0, 2, 3], "between": 11}


def same(model: Any, inputs: Any, first: avl.Policy, second: avl.Policy, steps: int = 16) -> bool:
    found = []
    for policy in (first, second):
        with avl.adaptive(model, policy):
            found.append(generate(model, inputs, steps))
    return torch.equal(found[0][0], found[1][0]) and difference(found[0][1], found[1][1]) < 1e-4


# -- drift -----------------------------------------------------------------------------------------


def test_drift_of_one_refreshes_at_every_step_and_of_nearly_nothing_never() -> None:
    model = tiny.llava(grid=5, kv_heads=2)
    inputs = tiny.inputs(model, **UNEVEN)
    assert same(model, inputs, Policy(drift=1.0), Policy(refresh_every=1))
    assert same(model, inputs, Policy(drift=1e-6), Policy(refresh_every=1000))
    assert not same(model, inputs, Policy(drift=0.95), Policy(refresh_every=1000))
    assert not same(model, inputs, Policy(drift=0.95), Policy(refresh_every=1))


def test_a_row_that_has_not_drifted_is_not_refreshed_by_its_neighbours() -> None:
    model = tiny.llava(grid=5, kv_heads=2)
    together, alone = rows_alone(model, [30, 22, 9])
    refreshes = []
    with avl.adaptive(model, Policy(text=None, drift=0.9)) as session:
        tokens, logits = generate(model, together, 16)
        steps = session.usage().steps
        for row, one in enumerate(alone):
            its_tokens, its_logits = generate(model, one, 16)
            assert torch.equal(its_tokens[0], tokens[row])
            assert difference(its_logits[:, 0], logits[:, row]) < 1e-4
            its = session.usage().steps
            assert [s.attended[0][0] for s in its] == [s.attended[0][row] for s in steps]
            refreshes.append(tuple(s.attended[0][0] - s.step for s in its[1:]))
    assert len(set(refreshes)) > 1  # rows turn at different steps
    assert any(len(set(one)) == 2 for one in refreshes)  # some steps read the core, some everything


# -- shares per layer ------------------------------------------------------------------------------


def test_equal_shares_per_layer_are_one_share() -> None:
    model = tiny.llava(layers=3)
    assert same(model, tiny.inputs(model, [30, 9]), Policy((0.5,) * 3, (0.3,) * 3), Policy())


def test_every_layer_holds_its_own_share() -> None:
    model = tiny.llava(layers=3, grid=5)
    with avl.adaptive(model, Policy((0.8, 0.4, 0.2), (0.4, 0.4, 0.1), 2, None)) as session:
        generate(model, tiny.inputs(model, [9]), 4)
    steps = session.usage().steps
    assert [layer[0] - 12 for layer in steps[0].held] == [20, 10, 5]
    assert [layer[0] - 13 for layer in steps[1].attended] == [10, 10, 2]
    assert [layer[0] - 14 for layer in steps[2].attended] == [20, 10, 5]


def test_shares_for_too_few_layers_are_refused() -> None:
    model = tiny.llava(layers=3)
    with (
        pytest.raises(ValueError, match="shares for 2 layers were given"),
        avl.adaptive(model, Policy((0.5, 0.5))),
    ):
        generate(model, tiny.inputs(model, [9]), 2)


# -- cores per head --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch", [{"batch": [30, 60, 9]}, UNEVEN], ids=["unequal prompts", "unequal images"]
)
@pytest.mark.parametrize("text", [0.3, 1.0])
def test_a_core_per_head_equals_masking_head_by_head(batch: dict[str, Any], text: float) -> None:
    model = tiny.llava(grid=5, kv_heads=2)
    inputs = tiny.inputs(model, **batch)
    with masked_avl(model, secondary=0.5, core=0.2, every=3, text=text, own=True):
        tokens, logits = generate(model, inputs, 16)
    with avl.adaptive(
        model, Policy(0.5, 0.2, 3, text if text < 1 else None, own_cores=True)
    ) as session:
        dropped, dropped_logits = generate(model, inputs, 16)
    assert torch.equal(tokens, dropped)
    assert difference(logits, dropped_logits) < 1e-4
    states = session.selection.state(0)[0]
    assert not torch.equal(states[0], states[1])


def test_with_one_key_head_a_core_per_head_is_the_paper_s() -> None:
    model = tiny.llava(kv_heads=1)
    assert same(model, tiny.inputs(model, [30, 9]), Policy(own_cores=True), Policy())


# -- sparse refreshes ------------------------------------------------------------------------------


class FewOfAll(Intervention):
    """Every step attends to the best `share` of all image keys by its own row, chosen layer by
    layer, by masking.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        if call.forward.kind == "decode":
            weights = attention_weights(call)[:, :, 0].mean(1)
            image = call.forward.layout.mask(Modality.IMAGE)
            seen = call.forward.layout.valid.clone()
            for row in range(len(weights)):
                places = image[row].nonzero()[:, 0]
                order = sorted(places.tolist(), key=lambda p: -float(weights[row, p]))
                seen[row, order[int(self.share * len(order)) :]] = False
            call.mask = seen[:, None, None]
        return inner(call)


@contextmanager
def few_of_all(model: Any, share: float) -> Iterator[None]:
    with attached(model, FewOfAll(share)):
        yield


@pytest.mark.parametrize("cold", [None, 16])
def test_a_sparse_refresh_attends_to_the_best_of_its_own_row(cold: int | None) -> None:
    model = tiny.llava(grid=5, kv_heads=2)
    inputs = tiny.inputs(model, **UNEVEN)
    policy = Policy(1.0 if cold is None else 0.1, 0.2, 1, None, sparse_refresh=True, cold=cold)
    with few_of_all(model, 0.2):
        tokens, logits = generate(model, inputs, 16)
    with avl.adaptive(model, policy) as session:
        chosen, chosen_logits = generate(model, inputs, 16)
    assert torch.equal(tokens, chosen)
    assert difference(logits, chosen_logits) < 1e-4
    last = session.usage().steps[-1]
    text = (
        25,
        50,
        40 + 11,
        8 + 22,
    )  # of the prompts; then 3 system tokens, 15 steps, and a fifth of 25 to a picture
    assert last.attended[0] == tuple(
        3 + few + t + 15 for few, t in zip((5, 0, 10, 15), text, strict=True)
    )
    assert len(session.selection.images(avl.State.CORE, 1)[0]) == 5


def test_a_sparse_refresh_of_everything_is_a_plain_one() -> None:
    model = tiny.llava(grid=5)
    inputs = tiny.inputs(model, [30, 9])
    assert same(model, inputs, Policy(1.0, 1.0, 1, None, sparse_refresh=True), avl.FullPolicy())


# -- rankings --------------------------------------------------------------------------------------


class Seen(Observer):
    """Full weights, keys and values of the prompt, by layer."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        if call.forward.kind == "prefill":
            self.calls[call.layer] = (
                attention_weights(call)[0],
                call.key[0].clone(),
                call.value[0].clone(),
            )


def slow_scores(
    kind: str, weights: Tensor, keys: Tensor, values: Tensor, image: range, head: int | None
) -> list[float]:
    """Scores of the image tokens, loops only; `head` is a key/value head or None for all together.

    Args:
        weights: (query heads, rows, keys); image tokens are followed by text only.
    """
    groups = weights.shape[0] // keys.shape[0]
    heads = range(weights.shape[0]) if head is None else range(head * groups, (head + 1) * groups)
    last = {(h, p): float(weights[h, -1, p]) for h in heads for p in image}
    mean = {p: sum(last[h, p] for h in heads) / len(heads) for p in image}
    if kind == "last":
        return [mean[p] for p in image]
    if kind == "max":
        return [max(last[h, p] for h in heads) for p in image]
    if kind == "question":
        rows = range(image.stop, weights.shape[1])
        return [sum(float(weights[h, r, p]) for h in heads for r in rows) for p in image]
    if kind == "value":
        return [
            sum(last[h, p] * float(values[h // groups, p].norm()) for h in heads) for p in image
        ]
    if kind == "sink":
        return [sum(last[h, p] / sum(last[h, o] for o in image) for h in heads) for p in image]
    if kind == "position":
        x = torch.arange(len(image)) / len(image)
        y = torch.tensor([mean[p] for p in image]).log()
        sigma = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        return (y - y.mean() - sigma * (x - x.mean())).tolist()
    shared = range(keys.shape[0]) if head is None else [head]
    unlike = torch.zeros(len(image))
    for h in shared:
        unit = torch.stack([keys[h, p] / keys[h, p].norm() for p in image])
        direction = unit.mean(0) / unit.mean(0).norm()
        unlike -= unit @ direction / len(shared)
    order, other = sorted(mean.values()), sorted(unlike.tolist())
    return [
        order.index(mean[p]) + other.index(float(u)) for p, u in zip(image, unlike, strict=True)
    ]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_keeps_what_slow_scores_rank_best(kind: str, own: bool) -> None:
    model = tiny.llava(grid=5, kv_heads=2)
    inputs = tiny.inputs(model, [12])
    image, seen = range(3, 28), Seen()
    with (
        attached(model, seen),
        avl.adaptive(model, Policy(0.4, None, 0, None, score=kind, own_cores=own)) as s,
    ):
        generate(model, inputs, 1)
    for layer, (weights, keys, values) in seen.calls.items():
        for head in range(2) if own else [None]:
            scores = slow_scores(kind, weights, keys, values, image, head)
            ranked = sorted(scores, reverse=True)
            state = s.selection.state(layer)[0, head or 0]
            held = [scores[p - 3] for p in image if state[p] > avl.State.MINOR]
            assert sorted(held, reverse=True) == pytest.approx(ranked[:10])


def test_rankings_differ() -> None:
    model = tiny.llava(grid=10, kv_heads=2, layers=4, seed=3)
    inputs = tiny.inputs(model, [12])
    held = set()
    for kind in KINDS:
        with avl.adaptive(model, Policy(0.5, None, 0, None, score=kind)) as session:
            generate(model, inputs, 1)
        held.add(
            tuple(tuple(session.selection.images(avl.State.CORE, layer)[0]) for layer in range(4))
        )
    assert len(held) == len(KINDS)


# -- at the door -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cold": 3}, "cold must be one of 8, 4, 2, 16, 'host'"),
        ({"cold": True}, "cold must be one of"),
        ({"secondary": 0}, "share that is kept"),
        ({"drift": 0}, "share that is kept"),
        ({"drift": 0.9, "core": None}, "watches the core, and there is none"),
        ({"sparse_refresh": True, "refresh_every": 0}, "pass e.g. core=0.1, refresh_every=1"),
        ({"score": "best"}, "score must be one of 'last', 'question'"),
        ({"own_cores": True, "budget": 0.5}, "cannot be combined with budget"),
        ({"secondary": (0.5, 0.2), "core": 0.3}, "core=0.3 is larger than secondary=0.2"),
        ({"secondary": ()}, "empty tuple"),
        ({"secondary": (0.5, 1.2), "core": 0.1}, "got 1.2"),
        ({"cold": 4, "secondary": 0, "core": 0.1}, "larger than secondary=0"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_a_message_that_teaches(
    wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Policy(**wrong)


@pytest.mark.parametrize("wrong", [{"own_cores": 1}, {"sparse_refresh": "yes"}, {"core": ("0.1",)}])
def test_settings_of_the_wrong_type_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        Policy(**wrong)
