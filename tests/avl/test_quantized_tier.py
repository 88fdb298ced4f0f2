"""The cold tier: what is stored and read back, what a policy with it attends to, and
what it costs."""

from typing import Any

import pytest
import torch
from torch import Tensor

import avl
from avl import quantized_tier
from avl.buffer import KeyBuffer
from avl.kernels import backend_for
from avl.quantized_tier import KEY_GROUP, QuantizedTier, Storage
from tests import tiny
from tests.avl.generating import check_rows_alone, difference, generate, rows_alone
from tests.avl.masked import masked_avl
from tests.avl.test_generate import two_turns

Policy = avl.AdaptivePolicy
UNEVEN: dict[str, Any] = {"batch": [25, 50, 40, 8], "images": [1, 0, 2, 3], "between": 11}


def tier(
    bits: Storage, tokens: int = 300, width: int = 24, **changes: Any
) -> tuple[QuantizedTier, Tensor, Tensor]:
    """A tier of two rows and heads with all of some keys, and these keys; channels differ in size
    and offset.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 2, width)
    keys = torch.randn(2, 2, tokens, width, generator=generator) * scale + 3 * scale.flip(0)
    values = (
        torch.randn(2, 2, tokens, 64, generator=generator) * torch.logspace(-2, 1, tokens)[:, None]
    )
    positions = torch.arange(5, 5 + tokens).expand(2, 1, -1)
    chosen = torch.arange(tokens).expand(2, 1, -1)
    return (
        QuantizedTier.hold(
            bits, keys, values, positions, changes.get("chosen", chosen), [chosen[..., :0]]
        ),
        keys,
        values,
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_each_number_is_stored_to_half_a_step_of_its_own_group(bits: int) -> None:
    held, keys, values = tier(bits)
    read_keys, read_values = held.read()
    for start in range(0, 300, KEY_GROUP):
        part = keys[:, :, start : start + KEY_GROUP]
        step = (part.amax(2, keepdim=True) - part.amin(2, keepdim=True)) / (2**bits - 1)
        error = (part - read_keys[:, :, start : start + KEY_GROUP]).abs()
        assert bool((error <= 0.51 * step + 2e-3 * part.abs().amax(2, keepdim=True)).all())
    for part, read in zip(values.split(32, -1), read_values.split(32, -1), strict=True):
        step = (part.amax(-1, keepdim=True) - part.amin(-1, keepdim=True)) / (2**bits - 1)
        assert bool(
            ((part - read).abs() <= 0.51 * step + 2e-3 * part.abs().amax(-1, keepdim=True)).all()
        )
    assert not torch.equal(keys, read_keys)


@pytest.mark.parametrize("bits", [8, 4, 2, 16, "host"])
def test_a_key_that_leaves_and_comes_back_is_stored_as_it_was(bits: int | str) -> None:
    held, _, _ = tier(bits)
    before = [tensor.clone() for tensor in held.tensors()]
    slots, back = torch.tensor([3, 200, 299]), torch.tensor([299, 3, 200])
    keys, values = held.take(1, slots)
    positions = held.positions[1][:, slots]
    held.put(1, back, keys, values, positions)
    moved = held.take(1, back)
    assert torch.equal(moved[0], keys)
    assert torch.equal(moved[1], values)
    assert torch.equal(held.positions[1, 0, back], positions[0])
    held.put(1, slots, keys, values, positions)
    for old, new in zip(before, held.tensors(), strict=True):
        assert torch.equal(old, new)


def test_constant_channels_and_empty_slots_are_read_as_finite_numbers() -> None:
    chosen = torch.stack([torch.arange(40), torch.cat([torch.full((35,), -1), torch.arange(5)])])[
        :, None
    ]
    keys, values = torch.full((2, 2, 40, 8), 7.0), torch.zeros(2, 2, 40, 8)
    held = QuantizedTier.hold(4, keys, values, torch.arange(40).expand(2, 1, -1), chosen, [])
    read_keys, read_values = held.read()
    assert held.held() == [40, 5]
    assert bool(
        (read_keys[0] == 7).all() & (read_keys[1, :, 35:] == 7).all() & (read_values == 0).all()
    )


KEEPING = {
    "all in the tier": Policy.with_cold_tier(cold=16),
    "all in host memory": Policy.with_cold_tier(cold="host"),
    "some in full": Policy(secondary=0.3, core=None, refresh_every=3, text=None, cold=16),
    "core, but every step reads all": Policy(
        secondary=0.3, core=0.2, refresh_every=1, text=None, cold=16
    ),
    "budget of everything": Policy.with_cold_tier(1.0),
    "drift at every step": Policy(
        secondary=0.3, core=0.2, refresh_every=3, text=None, cold=16, drift=1.0
    ),
}


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize(
    ("batch", "options"),
    [(UNEVEN, {}), ({"batch": [9, 4]}, {"num_beams": 3}), ({"batch": [9, 30], "images": 0}, {})],
    ids=["unequal rows", "beams", "no image"],
)
def test_a_tier_that_loses_nothing_and_is_always_read_equals_no_policy(
    name: str, batch: dict[str, Any], options: dict[str, Any]
) -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, **batch)
    tokens, logits = generate(model, inputs, **options)
    with avl.adaptive(model, KEEPING[name]):
        same, same_logits = generate(model, inputs, **options)
    assert torch.equal(tokens, same)
    assert difference(logits, same_logits) < 1e-4


@pytest.mark.parametrize("secondary", [0.3, 0.5])
@pytest.mark.parametrize(
    "batch", [{"batch": [30, 60, 9]}, UNEVEN], ids=["unequal prompts", "unequal images"]
)
def test_a_tier_that_loses_nothing_takes_part_in_every_refresh(
    secondary: float, batch: dict[str, Any]
) -> None:
    model = tiny.llava(grid=5, kv_heads=2)
    inputs = tiny.inputs(model, **batch)
    with masked_avl(model, secondary=1.0, core=0.3, every=3, text=0.4):
        tokens, logits = generate(model, inputs, 16)
    with avl.adaptive(
        model, Policy(secondary=secondary, core=0.3, refresh_every=3, text=0.4, cold=16)
    ):
        kept, kept_logits = generate(model, inputs, 16)
    assert torch.equal(tokens, kept)
    assert difference(logits, kept_logits) < 1e-4


def test_fewer_bits_change_more_and_eight_change_little() -> None:
    model = tiny.llava(grid=8, kv_heads=2)
    inputs = tiny.inputs(model, [30])
    changes = []
    for bits in (8, 4, 2):
        with torch.no_grad(), avl.adaptive(model, Policy.with_cold_tier(cold=bits)):
            out = model(**inputs)
            step = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
            after = model(
                input_ids=torch.tensor([[77]]),
                attention_mask=step,
                past_key_values=out.past_key_values,
            )
        with torch.no_grad():
            plain = model(**inputs)
            exact = model(
                input_ids=torch.tensor([[77]]),
                attention_mask=step,
                past_key_values=plain.past_key_values,
            )
        assert torch.equal(out.logits, plain.logits)  # a prompt is read before anything is stored
        changes.append(difference(after.logits, exact.logits))
    assert 0 < changes[0] < 0.3 * changes[1] < 0.3 * changes[2]


COLD = {
    "preset": Policy.with_cold_tier(),
    "two bits, core and refreshes": Policy(
        secondary=0.4, core=0.2, refresh_every=2, text=0.4, cold=2
    ),
    "eight bits, sparse": Policy(
        secondary=0.2, core=0.1, refresh_every=2, text=None, cold=8, sparse_refresh=True
    ),
    "four bits, drift": Policy(
        secondary=0.4, core=0.2, refresh_every=3, text=None, cold=4, drift=0.9
    ),
    "budget 0.5": Policy.with_cold_tier(0.5),
    "budget 0.25": Policy.with_cold_tier(0.25),
    "prefill filter": Policy.with_cold_tier(prefill=0.6, prefill_layer=1),
}


@pytest.mark.parametrize("name", COLD)
def test_every_row_of_a_padded_batch_equals_that_row_alone(name: str) -> None:
    model = tiny.llava(kv_heads=2, layers=3, grid=5)
    check_rows_alone(model, *rows_alone(model, **UNEVEN), COLD[name], steps=20, tolerance=1e-3)


@pytest.mark.parametrize("name", ["preset", "two bits, core and refreshes", "budget 0.25"])
def test_a_cache_with_a_cold_tier_is_continued_with_another_turn(name: str) -> None:
    model = tiny.llava(kv_heads=2)
    together, alone = rows_alone(model, [30, 9])
    later = [[20, 30, *[tiny.IMAGE] * 16, 40, 50], [33, *[tiny.IMAGE] * 16, 44]]
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    plain = two_turns(model, None, together, later, pixels)
    assert (
        difference(plain, two_turns(model, Policy.with_cold_tier(cold=16), together, later, pixels))
        < 1e-4
    )
    logits = two_turns(model, COLD[name], together, later, pixels)
    for row, one in enumerate(alone):
        its = two_turns(model, COLD[name], one, later[row : row + 1], pixels[row : row + 1])
        assert difference(its[:, 0], logits[:, row]) < 1e-3


@pytest.mark.parametrize("name", COLD)
def test_bytes_are_those_of_the_real_tensors(name: str) -> None:
    model = tiny.llava(kv_heads=2, grid=8)
    with avl.adaptive(model, COLD[name]) as session:
        out = model.generate(
            **tiny.inputs(model, [30, 9]),
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
        )
        usage = session.usage()
    layers = out.past_key_values.layers
    buffers = [layer.buffer for layer in layers]
    stored = [t for b in buffers if b.quantized is not None for t in b.quantized.tensors()]
    assert stored
    assert usage.allocated == sum(
        t.nbytes for layer in layers for t in (layer.keys, layer.values)
    ) + sum(t.nbytes for t in stored)
    near = sum(
        t[:, :, buffer.first_used_slot : buffer.filled].nbytes
        for buffer in buffers
        for t in (buffer.keys, buffer.values)
    )
    assert usage.filled == near + sum(t.nbytes for t in stored)
    assert usage.host == 0
    assert sum(usage.steps[-1].by_row) <= usage.filled  # empty slots are no row's
    with avl.adaptive(model, COLD[name]) as session:
        generate(model, tiny.inputs(model, [30]), 8)
    (row,), key = session.usage().steps[-1].by_row, 2 * 2 * 16 * 4
    assert (
        session.usage().filled - 2 * key <= row <= session.usage().filled
    )  # a dropped key's slot is used again


@pytest.mark.parametrize(("bits", "most"), [(8, 0.44), (4, 0.3), (2, 0.23)])
def test_the_preset_holds_every_token_in_a_fraction_of_the_bytes(bits: int, most: float) -> None:
    model = tiny.llava(grid=16)
    with avl.adaptive(model, Policy.with_cold_tier(cold=bits)) as session:
        generate(model, tiny.inputs(model, [9]), 4)
    usage = session.usage()
    assert usage.steps[-1].held[0] == (3 + 256 + 9 + 3,)
    assert 0.5 * most < usage.filled_share < most
    assert usage.attended_share == 1.0


def test_what_a_tier_costs_is_known_before_it_is_made() -> None:
    for bits in (8, 4, 2, 16):
        held, keys, values = tier(bits, 150, chosen=torch.arange(100).expand(2, 1, -1))
        full = (keys[:, :, :1].nbytes + values[:, :, :1].nbytes) / 4
        image = 100 if bits != 16 else 150
        expected = quantized_tier.quantized_cost(bits, 100, image, (24, 64), 4)
        assert held.nbytes(host=False) / 4 == pytest.approx(expected * full)


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.35, 0.25])
@pytest.mark.parametrize("steps", [5, 90])
def test_a_budget_with_a_cold_tier_is_kept_at_every_step(budget: float, steps: int) -> None:
    model = tiny.llava(grid=12, kv_heads=2)
    with avl.adaptive(model, Policy.with_cold_tier(budget)) as session:
        generate(model, tiny.inputs(model, [9]), steps)
    usage = session.usage()
    key = usage.steps[0].full / usage.steps[0].seen
    assert all(step.filled <= budget * step.full + key for step in usage.steps)
    assert usage.steps[-1].filled > 0.6 * budget * usage.full or steps == 5


def test_states_tell_what_is_cold_and_what_is_attended() -> None:
    model = tiny.llava(grid=6)
    inputs = tiny.inputs(model, [12])
    with avl.adaptive(
        model, Policy(secondary=0.25, core=0.25, refresh_every=3, text=None, cold=4)
    ) as session:
        generate(model, inputs, 5)
    for layer in (0, 1):
        for step in range(5):
            core = session.selection.images(avl.State.CORE, layer, step)[0]
            cold_ones = session.selection.images(avl.State.SECONDARY, layer, step)[0]
            assert len(core) == 9
            assert sorted(core + cold_ones) == list(range(3, 39))
        moved = [session.selection.images(avl.State.CORE, layer, step)[0] for step in (2, 3)]
        assert moved[0] != moved[1]
    with avl.adaptive(model, Policy.with_cold_tier()) as session:
        generate(model, inputs, 5)
    assert session.selection.images(avl.State.CORE, 0)[0] == list(range(3, 39))


AS_STORED: dict[str, avl.Policy] = {
    **COLD,
    "keys in 8 bits, values in 2": Policy.with_cold_tier(cold=(8, 2)),
    "everything but the newest": avl.KIVIPolicy(bits=2, newest=4),
}


@pytest.mark.parametrize("name", AS_STORED)
@pytest.mark.parametrize(
    ("batch", "options"),
    [(UNEVEN, {}), ({"batch": [9, 4]}, {"num_beams": 3})],
    ids=["unequal rows", "beams"],
)
def test_a_step_attends_to_codes_as_it_would_to_what_they_stand_for(
    name: str, batch: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, **batch)
    decoded = []
    read = QuantizedTier.read
    monkeypatch.setattr(QuantizedTier, "read", lambda tier: decoded.append(1) or read(tier))
    with avl.adaptive(model, AS_STORED[name]):
        tokens, logits = generate(model, inputs, 8, **options)
    assert not decoded  # no observer asks for keys in full
    monkeypatch.setattr(KeyBuffer, "coded_tier", lambda buffer, refresh: None)
    with avl.adaptive(model, AS_STORED[name]):
        same, same_logits = generate(model, inputs, 8, **options)
    assert decoded
    assert torch.equal(tokens, same)
    assert difference(logits, same_logits) < 1e-4


def test_keys_and_values_may_have_bits_of_their_own() -> None:
    both, keys, values = tier((8, 2))
    read_keys, read_values = both.read()
    eight, two = tier(8)[0].read(), tier(2)[0].read()
    assert torch.equal(read_keys, eight[0])
    assert torch.equal(read_values, two[1])
    cost = quantized_tier.quantized_cost((8, 2), 300, 300, (24, 64), 4)
    full = (keys[:, :, :1].nbytes + values[:, :, :1].nbytes) / 4
    assert both.nbytes(host=False) / 4 == pytest.approx(cost * full)


@pytest.mark.parametrize("cold", [(8,), (8, 3), (True, 4), 3, [8, 4]])
def test_a_number_of_bits_that_there_is_not_is_refused(cold: Any) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        Policy(cold=cold)


def test_usage_says_which_kernels_ran() -> None:
    model = tiny.llava()
    with avl.adaptive(model, Policy.with_cold_tier()) as session:
        generate(model, tiny.inputs(model, [9]), 2)
    assert session.usage().kernels == backend_for("cpu")
