"""A-VL beyond the paper: drift, shares per layer, sparse refreshes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import avl
from avl.attention import Attend, AttentionCall, attention_weights
from avl.hooks import Intervention, attached
from avl.tokens import Modality
from tests import tiny
from tests.avl.generating import difference, generate, rows_alone

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
    assert same(
        model, tiny.inputs(model, [30, 9]), Policy(secondary=(0.5,) * 3, core=(0.3,) * 3), Policy()
    )


def test_every_layer_holds_its_own_share() -> None:
    model = tiny.llava(layers=3, grid=5)
    with avl.adaptive(
        model, Policy(secondary=(0.8, 0.4, 0.2), core=(0.4, 0.4, 0.1), refresh_every=2, text=None)
    ) as session:
        generate(model, tiny.inputs(model, [9]), 4)
    steps = session.usage().steps
    assert [layer[0] - 12 for layer in steps[0].held] == [20, 10, 5]
    assert [layer[0] - 13 for layer in steps[1].attended] == [10, 10, 2]
    assert [layer[0] - 14 for layer in steps[2].attended] == [20, 10, 5]


def test_shares_for_too_few_layers_are_refused() -> None:
    model = tiny.llava(layers=3)
    with (
        pytest.raises(ValueError, match="shares for 2 layers were given"),
        avl.adaptive(model, Policy(secondary=(0.5, 0.5))),
    ):
        generate(model, tiny.inputs(model, [9]), 2)


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
    policy = Policy(
        secondary=1.0 if cold is None else 0.1,
        core=0.2,
        refresh_every=1,
        text=None,
        sparse_refresh=True,
        cold=cold,
    )
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
    assert same(
        model,
        inputs,
        Policy(secondary=1.0, core=1.0, refresh_every=1, text=None, sparse_refresh=True),
        avl.FullPolicy(),
    )


# -- settings refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"cold": 3}, "cold must be one of 8, 4, 2, 16, 'host'"),
        ({"cold": True}, "cold must be one of"),
        ({"secondary": 0}, "share that is kept"),
        ({"drift": 0}, "share that is kept"),
        ({"drift": 0.9, "core": None}, "watches the core, and there is none"),
        ({"sparse_refresh": True, "refresh_every": 0}, "pass e.g. core=0.1, refresh_every=1"),
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


@pytest.mark.parametrize("wrong", [{"sparse_refresh": "yes"}, {"core": ("0.1",)}])
def test_settings_of_the_wrong_type_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        Policy(**wrong)
