"""What a session tells: bytes, keys, selections; and a recorder beside a policy."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import avl
from avl.arguments import cache_parameter
from avl.attention import AttentionCall, attention_weights
from avl.cache import AdaptiveLayer
from avl.hooks import attached
from tests import tiny
from tests.avl.generating import generate
from tests.taps import Watch


def test_bytes_of_a_session_are_the_bytes_of_its_tensors() -> None:
    model = tiny.llava(kv_heads=2, grid=8)
    with avl.adaptive(model, avl.AdaptivePolicy()) as session:
        out = model.generate(
            **tiny.inputs(model, [30, 9]),
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
        )
        usage = session.usage()
    layers = out.past_key_values.layers
    assert all(isinstance(layer, AdaptiveLayer) for layer in layers)
    assert usage.allocated == sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
    buffers = [layer.buffer for layer in layers]
    assert usage.bookkeeping == sum(t.nbytes for b in buffers for t in (b.positions, b.scores))
    assert usage.filled == sum(
        t[:, :, : b.filled].nbytes for b in buffers for t in (b.keys, b.values)
    )
    assert usage.full == 2 * 2 * usage.steps[-1].seen * 2 * 16 * 2 * 4
    assert usage.peak >= max(step.allocated for step in usage.steps)


def test_the_paper_s_setting_holds_half_and_attends_to_less_at_length() -> None:
    model = tiny.llava(grid=16)
    with avl.adaptive(model, avl.AdaptivePolicy()) as session:
        generate(model, tiny.inputs(model, [9]), 10)
    usage = session.usage()
    assert usage.filled_share < 0.55
    assert usage.attended_share < 0.46
    for step in usage.steps[1:]:
        image = int(0.5 * 256) if step.step % 3 == 0 else int(0.3 * 256)
        assert step.attended == ((3 + image + 9 + step.step,),) * 2


def test_nothing_is_copied_at_an_ordinary_step() -> None:
    model = tiny.llava(grid=8)
    seen: list[tuple[bool, int]] = []

    def look(call: AttentionCall, output: Tensor) -> None:
        layer = call.forward.cache.layers[call.layer]
        if call.forward.kind == "decode":
            first, stop = layer.keys.data_ptr(), layer.keys.data_ptr() + layer.keys.nbytes
            seen.append((first <= call.key.data_ptr() < stop, call.key.shape[2]))
            assert call.mask is None

    with attached(model, Watch(look)), avl.adaptive(model, avl.AdaptivePolicy(text=None)):
        generate(model, tiny.inputs(model, [30]), 4)
    keys = [3 + 19 + 31, 3 + 19 + 32, 3 + 32 + 33]  # the third step is a refresh
    assert seen == [(True, count) for count in keys for _ in range(2)]


def _check(call: AttentionCall, output: Tensor) -> None:
    """Checks of what an observer sees under a policy."""
    weights = attention_weights(call)
    value = call.value.repeat_interleave(call.groups, 1)
    expected = torch.einsum("bhqk,bhkd->bqhd", weights, value)
    rows = weights.sum(-1)[:, 0] > 0.5
    assert (output.reshape(expected.shape) - expected)[rows].abs().max() < 1e-4
    if call.key_positions is not None:
        positions = call.key_positions
        positions = positions[:, None] if positions.dim() == 2 else positions
        empty = (positions < 0).expand(-1, call.key.shape[1], -1).repeat_interleave(call.groups, 1)
        assert float(weights.masked_select(empty[:, :, None].expand_as(weights)).sum()) == 0.0
        for row in positions.flatten(0, 1):
            held = row[row >= 0]
            assert len(held.unique()) == len(held)


@pytest.mark.parametrize("recorder_first", [True, False])
@pytest.mark.parametrize(
    "policy",
    [
        avl.FullPolicy(),
        avl.AdaptivePolicy(text=0.4, refresh_every=2),
        avl.AdaptivePolicy(text=0.4, prefill=0.6, prefill_layer=1),
        avl.AdaptivePolicy.for_budget(0.4),
        avl.VLCachePolicy(budget=0.4),
    ],
)
def test_a_recorder_sees_exactly_what_was_attended(
    policy: avl.Policy, recorder_first: bool
) -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, [30, 9], images=[1, 2], between=3)
    with avl.adaptive(model, policy):
        tokens, logits = generate(model, inputs, 14)
    checked: list[int] = []

    def check(call: AttentionCall, output: Tensor) -> None:
        _check(call, output)
        checked.append(call.layer)

    contexts: list[Any] = [attached(model, Watch(check)), avl.adaptive(model, policy)]
    first, second = contexts if recorder_first else reversed(contexts)
    with first, second:
        again, again_logits = generate(model, inputs, 14)
    assert len(checked) == 2 * 14
    assert torch.equal(tokens, again)
    assert torch.equal(logits, again_logits)


def test_selection_tells_core_secondary_and_minor_of_every_step() -> None:
    model = tiny.llava(kv_heads=2, grid=6)
    inputs = tiny.inputs(model, [30, 9], images=[1, 2])
    attended: dict[tuple[int, int], list[list[int]]] = {}

    def look(call: AttentionCall, output: Tensor) -> None:
        if call.forward.kind == "decode":
            assert call.key_positions is not None
            image = call.forward.layout.modality == avl.tokens.Modality.IMAGE
            rows = [set(row[row >= 0].tolist()) for row in call.key_positions[:, 0]]
            attended[call.layer, call.forward.step] = [
                sorted(p for p in row if image[b, p]) for b, row in enumerate(rows)
            ]

    with (
        attached(model, Watch(look)),
        avl.adaptive(model, avl.AdaptivePolicy(text=0.4)) as session,
    ):
        generate(model, inputs, 10)
    selection = session.selection
    assert selection.steps == 9
    assert selection.layers == (0, 1)
    for (layer, step), rows in attended.items():
        held = [
            sorted(core + secondary)
            for core, secondary in zip(
                selection.images(avl.State.CORE, layer, step - 1),
                selection.images(avl.State.SECONDARY, layer, step - 1),
                strict=True,
            )
        ]
        core = selection.images(avl.State.CORE, layer, step - 1)
        assert rows == (held if step % 3 == 0 else core)
    assert [len(row) for row in selection.images(avl.State.MINOR, 0)] == [18, 36]
    assert [len(row) for row in selection.images(avl.State.CORE, 1)] == [10, 21]
    state = selection.state(0, 0)
    assert state.shape == (2, 2, inputs["input_ids"].shape[1])
    assert torch.equal(state[:, 0] == avl.State.PADDING, inputs["attention_mask"] == 0)


def test_selection_follows_text_that_is_dropped() -> None:
    model = tiny.llava(kv_heads=2)
    with avl.adaptive(model, avl.AdaptivePolicy(text=0.4)) as session:
        out = model.generate(
            **tiny.inputs(model, [30]),
            max_new_tokens=14,
            do_sample=False,
            return_dict_in_generate=True,
        )
    for index, layer in enumerate(out.past_key_values.layers):
        state = session.selection.state(index)[0]
        for head in range(2):
            positions = layer.buffer.positions[0, head, : layer.buffer.filled]
            held = (state[head] > avl.State.MINOR).nonzero()[:, 0].tolist()
            assert held == sorted(positions[positions >= 0].tolist())


def test_selection_follows_beams() -> None:
    model = tiny.llava(kv_heads=2)
    with avl.adaptive(model, avl.AdaptivePolicy(text=0.4, refresh_every=2)) as session:
        out = model.generate(
            **tiny.inputs(model, [30, 22]),
            max_new_tokens=8,
            num_beams=3,
            do_sample=False,
            return_dict_in_generate=True,
        )
    # the last step's reordering came after its pass: the selection does not know it yet
    layer = out.past_key_values.layers[0]
    state = session.selection.state(0)
    rows = layer.conversation.moved
    state = state[rows] if rows is not None else state
    for row in range(6):
        positions = layer.buffer.positions[row, 0, : layer.buffer.filled]
        held = (state[row, 0] > avl.State.MINOR).nonzero()[:, 0].tolist()
        assert held == sorted(positions[positions >= 0].tolist())


def test_questions_before_anything_ran_or_about_nothing_are_refused() -> None:
    model = tiny.llava()
    with avl.adaptive(model, avl.AdaptivePolicy()) as session:
        with pytest.raises(ValueError, match="nothing has run"):
            session.usage()
        with pytest.raises(ValueError, match="nothing has run"):
            _ = session.selection
        generate(model, tiny.inputs(model, [9]), 3)
    with pytest.raises(ValueError, match="step must be 0"):
        session.selection.state(0, 5)
    with pytest.raises(ValueError, match="no policy acted on layer 7"):
        session.selection.state(7)


def test_a_session_can_be_attached_and_detached_by_hand() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [30])
    tokens, logits = generate(model, inputs)
    session = avl.AdaptiveSession(model, avl.AdaptivePolicy(text=0.4)).attach()
    with pytest.raises(avl.HookError, match="on its model already"):
        session.attach()
    adapted, _ = generate(model, inputs)
    session.detach()
    session.detach()
    assert not torch.equal(tokens, adapted)
    assert torch.equal(logits, generate(model, inputs)[1])
    session.attach()
    assert torch.equal(adapted, generate(model, inputs)[0])
    session.detach()


def test_buffers_grow_without_changing_what_they_hold() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [9])
    tokens, _ = generate(model, inputs, 80)
    with avl.adaptive(model, avl.FullPolicy()) as session:
        grown, _ = generate(model, inputs, 80)
    assert torch.equal(tokens, grown)
    assert len({step.allocated for step in session.usage().steps}) == 2
    assert session.usage().allocated_share < 1.7


def test_conversations_in_turns_keep_their_own_usage_and_selection() -> None:
    model = tiny.llava()
    prompts = [tiny.inputs(model, [length], seed=length) for length in (24, 40)]
    name = cache_parameter(model.get_decoder())

    def say(cache: DynamicCache, **inputs: Any) -> None:
        with torch.no_grad():
            model(**inputs, **{name: cache}, use_cache=True)

    def token(i: int) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[i]])}

    expected = []
    for prompt, count in zip(prompts, (3, 1), strict=True):
        with avl.adaptive(model, avl.AdaptivePolicy()) as session:
            cache = DynamicCache(config=model.config.text_config)
            say(cache, **prompt)
            for step in range(count):
                say(cache, **token(20 + step))
        expected.append((session.usage(), session.selection.state(0)))
    with avl.adaptive(model, avl.AdaptivePolicy()) as session:
        one, other = (DynamicCache(config=model.config.text_config) for _ in prompts)
        say(one, **prompts[0])
        say(one, **token(20))
        say(other, **prompts[1])
        say(one, **token(21))
        say(other, **token(20))
        assert session.usage() == expected[1][0]
        assert torch.equal(session.selection.state(0), expected[1][1])
        say(one, **token(22))
        assert session.usage() == expected[0][0]
        assert torch.equal(session.selection.state(0), expected[0][1])
