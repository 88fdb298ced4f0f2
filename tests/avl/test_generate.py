"""generate() in full under policies that drop keys, and what is refused."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import avl
from tests import tiny
from tests.avl.generating import Inputs, difference, generate, rows_alone
from tests.avl.masked import masked_avl

DROPPING = [
    avl.AdaptivePolicy(text=0.4, refresh_every=2),
    avl.AdaptivePolicy.for_budget(0.5),
    avl.AdaptivePolicy(text=0.4, prefill=0.6, prefill_layer=1),
    avl.H2OPolicy(budget=0.4),
    avl.FastVPolicy(budget=0.5, prefill_layer=1),
    avl.VLCachePolicy(budget=0.4),
]


def test_beam_search_that_drops_keys_equals_beam_search_that_masks_them() -> None:
    # every hypothesis is scored again alone, its tokens forced: reordered caches must give the same
    # scores
    model = tiny.llava(kv_heads=2, grid=5)
    together, alone = rows_alone(model, [30, 22])
    policy = avl.AdaptivePolicy(secondary=0.5, core=0.3, refresh_every=2, text=0.4)
    with avl.adaptive(model, policy):
        out = model.generate(
            **together,
            max_new_tokens=12,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
        )
    new = out.sequences[:, together["input_ids"].shape[1] :]
    with masked_avl(model, secondary=0.5, core=0.3, every=2, text=0.4):
        for beam in range(6):
            score = forced_score(model, alone[beam // 3], new[beam])
            assert abs(score - float(out.sequences_scores[beam])) < 1e-3


def forced_score(model: Any, inputs: Inputs, tokens: torch.Tensor) -> float:
    """Log-probability of `tokens` after a prompt, fed one by one."""
    cache, total = DynamicCache(config=model.config.text_config), 0.0
    step, mask = dict(inputs), inputs["attention_mask"]
    for token in tokens:
        with torch.no_grad():
            logits = model(**{**step, "attention_mask": mask}, past_key_values=cache).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
        step = {"input_ids": token.view(1, 1)}
    return total


@pytest.mark.parametrize("policy", DROPPING, ids=lambda p: type(p).__name__)
def test_one_beam_of_equal_beams_follows_greedy_search(policy: avl.Policy) -> None:
    model = tiny.llava(grid=5)
    inputs = tiny.inputs(model, [30, 22])
    with avl.adaptive(model, policy):
        tokens, _ = generate(model, inputs, 16)
        scored, _ = generate(model, inputs, 16, num_beams=2)
        assert tokens.shape == scored.shape
        repeated, _ = generate(model, inputs, 16, num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(repeated[::2], tokens)
    assert torch.equal(repeated[1::2], tokens)


@pytest.mark.parametrize("policy", DROPPING, ids=lambda p: type(p).__name__)
def test_rows_that_stop_early_leave_the_others_alone(policy: avl.Policy) -> None:
    model = tiny.llava(grid=5)
    together, alone = rows_alone(model, [30, 22, 9])
    with avl.adaptive(model, policy):
        tokens, _ = generate(model, together, 16)
        stop = int(tokens[1, 5])
        stopped, _ = generate(model, together, 16, eos_token_id=stop)
        for row, one in enumerate(alone):
            its, _ = generate(model, one, 16, eos_token_id=stop)
            assert torch.equal(stopped[row, : its.shape[1]], its[0])


def test_the_rows_can_be_rearranged_between_steps() -> None:
    model = tiny.llava(kv_heads=2, grid=5)
    inputs = tiny.inputs(model, [30, 22, 9], images=[1, 2, 0])
    order = torch.tensor([2, 0, 2, 1])
    with torch.no_grad(), avl.adaptive(model, avl.AdaptivePolicy(text=0.3)):
        steps = []
        for rearranged in (False, True):
            cache, mask = DynamicCache(config=model.config.text_config), inputs["attention_mask"]
            step, logits = dict(inputs), []
            for number in range(14):
                output = model(**{**step, "attention_mask": mask}, past_key_values=cache).logits[
                    :, -1
                ]
                token = output.argmax(-1, keepdim=True)
                if rearranged and number == 6:
                    cache.batch_select_indices(order)
                    token, mask, output = token[order], mask[order], output[order]
                logits.append(output if rearranged and number >= 6 else output[order])
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                step = {"input_ids": token}
            steps.append(torch.stack(logits) if not rearranged else torch.stack(logits[6:]))
    assert difference(steps[0][6:], steps[1]) < 1e-4


def two_turns(
    model: Any,
    policy: avl.Policy | None,
    first: Inputs,
    later: list[list[int]],
    pixels: torch.Tensor | None,
) -> torch.Tensor:
    """Logits of a second turn's answer, continuing the cache of the first; shorter turns are padded
    on the left.
    """
    longest = max(map(len, later))
    turn = torch.tensor([[tiny.PAD] * (longest - len(ids)) + ids for ids in later])
    given = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in later])
    with avl.adaptive(model, policy) if policy is not None else nullcontext():
        out = model.generate(
            **first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        mask = torch.cat(
            [first["attention_mask"], torch.ones(len(later), 6, dtype=torch.long), given], 1
        )
        second = {"input_ids": torch.cat([out.sequences, turn], 1), "attention_mask": mask}
        if pixels is not None:
            second["pixel_values"] = pixels
        _, logits = generate(model, second, 6, past_key_values=out.past_key_values)
    return logits


@pytest.mark.parametrize(
    ("attn", "picture"), [("sdpa", False), ("eager", True)], ids=["text", "another picture"]
)
def test_a_returned_cache_is_continued_with_another_turn(attn: str, picture: bool) -> None:
    model = tiny.llava(kv_heads=2, attn=attn)
    together, alone = rows_alone(model, [30, 9])
    image = [tiny.IMAGE] * 16 if picture else []
    later = [[20, 30, *image, 40, 50, 60, 21, 22, 23], [33, *image, 44, 55, 66]]
    pixels = (
        torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3)) if picture else None
    )
    plain = two_turns(model, None, together, later, pixels)
    for policy in (avl.FullPolicy(), avl.AdaptivePolicy(secondary=1, core=1, text=1)):
        assert difference(plain, two_turns(model, policy, together, later, pixels)) < 1e-4
    for policy in (avl.RandomPolicy(budget=0.5), avl.StreamingPolicy(budget=0.5), *DROPPING):
        logits = two_turns(model, policy, together, later, pixels)
        for row, one in enumerate(alone):
            its = two_turns(
                model, policy, one, later[row : row + 1], pixels[row : row + 1] if picture else None
            )
            assert difference(its[:, 0], logits[:, row]) < 1e-4, policy


def test_a_later_turn_counts_images_and_text_of_all_turns() -> None:
    model = tiny.llava()
    first = tiny.inputs(model, [9])
    later = torch.tensor([[20, *[tiny.IMAGE] * 16, *range(20, 40)]])
    with avl.adaptive(model, avl.AdaptivePolicy(text=0.5)) as session:
        out = model.generate(
            **first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([out.sequences, later], 1)
        second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second["pixel_values"] = torch.randn(1, 3, 24, 24)
        generate(model, second, 2, past_key_values=out.past_key_values)
        (turn,) = [s for s in session.usage().steps if s.step == 5 and s.seen == ids.shape[1]]
    text = 9 + 6 + 1 + 20
    assert turn.held[0] == (3 + int(0.5 * 32) + max(round(0.5 * text), 20),)
    assert session.selection.state(0).shape[-1] == ids.shape[1] + 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_cache": False}, "use_cache=True"),
        ({"cache_implementation": "static"}, "not StaticCache"),
        ({"prompt_lookup_num_tokens": 3}, "crop"),  # transformers asks for it itself from 5.24 on
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], says: str) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [9])
    inputs["input_ids"][0, -8:] = torch.tensor([9, 10, 11, 12, 9, 10, 11, 12])
    with (
        pytest.raises((avl.HookError, ValueError), match=says),
        avl.adaptive(model, avl.AdaptivePolicy()),
    ):
        generate(model, inputs, **options)


def test_right_padding_is_refused() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [9, 9])
    inputs["attention_mask"][1, -3:] = 0
    with (
        pytest.raises(avl.HookError, match="padding_side='left'"),
        avl.adaptive(model, avl.AdaptivePolicy()),
    ):
        generate(model, inputs)


def test_a_cache_filled_before_the_policy_is_refused() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [9])
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with (
        pytest.raises(avl.HookError, match="empty cache"),
        avl.adaptive(model, avl.AdaptivePolicy()),
    ):
        generate(model, {"input_ids": out.sequences}, past_key_values=out.past_key_values)


def test_a_cache_of_a_policy_that_is_gone_is_refused() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [9])
    with avl.adaptive(model, avl.AdaptivePolicy()):
        out = model.generate(
            **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
        )
    with pytest.raises(avl.HookError, match="no longer on the model"):
        generate(model, {"input_ids": out.sequences}, past_key_values=out.past_key_values)


@pytest.mark.parametrize(
    "policy",
    [
        avl.AdaptivePolicy(),
        avl.AdaptivePolicy.with_cold_tier(),
        avl.FullPolicy(),
        avl.QuestPolicy(budget=0.5),
        avl.AdaSnapKVPolicy(budget=0.5, window=4),
    ],
    ids=lambda policy: policy.name,
)
def test_a_cache_of_inference_mode_is_continued_there_and_refused_outside(
    policy: avl.Policy,
) -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, [9])
    mask = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
    with avl.adaptive(model, policy) as session:
        with torch.inference_mode():
            cache = model(**inputs, use_cache=True).past_key_values

        def step() -> torch.Tensor:
            length = cache.get_seq_length() + 1
            token = torch.full((1, 1), 7)
            return model(
                input_ids=token, attention_mask=mask[:, :length], past_key_values=cache
            ).logits

        with torch.inference_mode():
            inside = [step() for _ in range(2)]
        for outside in (torch.no_grad, torch.enable_grad):
            with outside(), pytest.raises(avl.HookError, match=r"continue it inside torch\.infer"):
                step()
        with torch.inference_mode():  # the refused steps left no trace
            inside.append(step())
        assert [s.step for s in session.usage().steps] == [0, 1, 2, 3]
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            assert torch.equal(torch.cat([step() for _ in range(3)], 1), torch.cat(inside, 1))


def test_a_second_policy_on_a_model_is_refused_and_the_first_survives() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [30])
    with avl.adaptive(model, avl.AdaptivePolicy()):
        tokens, _ = generate(model, inputs)
        with (
            pytest.raises(avl.HookError, match="already on this"),
            avl.adaptive(model, avl.FullPolicy()),
        ):
            pass
        assert torch.equal(tokens, generate(model, inputs)[0])


def test_a_policy_must_be_a_policy() -> None:
    with pytest.raises(TypeError, match=r"avl\.AdaptivePolicy\(\)"):
        avl.AdaptiveSession(tiny.llava(), "A-VL")  # type: ignore[arg-type]
