"""Steps belong to the sample of their cache, and what cannot be followed is refused before it is
recorded.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StoppingCriteria

from avl.arguments import cache_parameter
from avl.hooks import HookError, Intervention, attached
from avl_analysis.capture.recorder import record
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError
from avl_analysis.models.loading import load_model
from tests import tiny
from tests.avl_analysis.recorded import close, model


@pytest.fixture(scope="module")
def llava():
    return model(kv_heads=2, attn="sdpa")


class Chat:
    """A conversation by hand: a prompt, then tokens one at a time or several at once."""

    def __init__(self, llava, **prompt):
        self.llava, self.cache = llava, DynamicCache(config=llava.config.text_config)
        self.fed = [int(i) for i in prompt["input_ids"][0]]
        self._call(**prompt)

    def say(self, *tokens):
        self.fed += tokens
        self._call(input_ids=torch.tensor([tokens]))

    @torch.no_grad()
    def _call(self, **inputs):
        name = cache_parameter(self.llava.get_decoder())
        self.llava(**inputs, **{name: self.cache}, use_cache=True)


def steps(recording):
    return (recording.tokens["phase"] >= 0).sum("step").values.tolist()


def tokens_of(recording, sample):
    ids = recording.tokens["token_id"].values[sample]
    return ids[ids >= 0].tolist()


def test_steps_of_two_conversations_in_turns_belong_to_the_sample_of_their_cache(llava):
    prompts = [tiny.inputs(llava, [5], seed=1), tiny.inputs(llava, [7], seed=2)]
    said = [[20, 21, 22], [30]]
    alone = []
    for prompt, tokens in zip(prompts, said, strict=True):
        with record(llava) as recording:
            chat = Chat(llava, **prompt)
            for token in tokens:
                chat.say(token)
        alone.append(recording)
    with record(llava) as recording:
        one, other = (Chat(llava, **prompt) for prompt in prompts)
        one.say(20)
        other.say(30)
        one.say(21)
        one.say(22)
    assert steps(recording) == [4, 2]
    assert [tokens_of(recording, s) for s in (0, 1)] == [one.fed, other.fed]
    for sample, expected in enumerate(alone):
        for name in ("modality_mass", "text_age_profile", "value_weighted_mass"):
            found, own = recording[name][sample].values, expected[name][0].values
            close(found[tuple(slice(size) for size in own.shape)], own, 1e-5)


def test_later_turns_of_two_conversations_belong_to_their_own_samples(llava):
    with record(llava, statistics=["modality_mass"]) as recording:
        one = Chat(llava, **tiny.inputs(llava, [5], seed=1))
        other = Chat(llava, **tiny.inputs(llava, [7], seed=2))
        one.say(20)
        other.say(30)
        one.say(21, 22, 23)
        other.say(31, 32)
        one.say(24)
    assert [tokens_of(recording, s) for s in (0, 1)] == [one.fed, other.fed]
    assert recording.tokens["phase"].values.tolist() == [[0, 1, 2, 1], [0, 1, 2, -1]]


def test_working_memory_of_a_sample_is_let_go_once_its_cache_is_gone(llava):
    with record(llava) as recording:
        recorder = recording._source
        for _ in range(3):
            llava.generate(**tiny.inputs(llava), max_new_tokens=3)
        held = [len(one.samples) for one in recorder._conversations._all]
    assert held == [0, 0, 1]  # the last one is noticed at the next prompt, or at the end
    assert len(recording) == 3


def test_an_end_token_that_a_caller_feeds_to_a_single_row_is_a_token_like_others(llava):
    with record(llava, stop=[tiny.EOS], statistics=["modality_mass"]) as recording:
        chat = Chat(llava, **tiny.inputs(llava))
        chat.say(20)
        chat.say(tiny.EOS)
        chat.say(21, 22, 23, 24)
        chat.say(25)
    assert tokens_of(recording, 0) == chat.fed
    assert steps(recording) == [5]


def test_a_later_turn_of_a_batch_of_which_a_row_had_ended_is_refused():
    llava = model(kv_heads=2)
    batch = tiny.inputs(llava, [9, 4])
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    stop = int(llava.generate(**batch, **options).sequences[0, -4])
    with record(llava, stop=[stop]) as recording:
        out = llava.generate(**batch, **options, eos_token_id=stop)
        name = cache_parameter(llava.get_decoder())
        with pytest.raises(HookError, match="row 0 of the batch had ended before the others"):
            llava(input_ids=torch.full((2, 3), 9), **{name: out[name]})
    assert len(recording) == 2


# -- without a cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["argument", "generation_config"])
def test_generating_without_a_cache_is_refused_before_anything_is_recorded(where):
    llava = model(kv_heads=2, attn="sdpa")
    options = {"use_cache": False} if where == "argument" else {}
    if where == "generation_config":
        llava.generation_config.use_cache = False
    with record(llava) as recording:
        with pytest.raises(HookError, match="use_cache=True while recording"):
            llava.generate(**tiny.inputs(llava), max_new_tokens=4, **options)
        assert len(recording) == 0
        llava.generate(**tiny.inputs(llava), max_new_tokens=4, use_cache=True)
    assert steps(recording) == [4]


def test_a_loop_without_a_cache_is_refused_at_its_second_step(llava):
    batch = tiny.inputs(llava)
    with record(llava) as recording, torch.no_grad():
        llava(**batch, use_cache=False)
        longer = torch.cat([batch["input_ids"], torch.tensor([[9]])], 1)
        with pytest.raises(HookError, match="would take for new prompts"):
            llava(
                input_ids=longer,
                attention_mask=torch.ones_like(longer),
                pixel_values=batch["pixel_values"],
                use_cache=False,
            )
    assert len(recording) == 1


def test_a_folder_that_turns_the_cache_off_gives_one_sample_per_question(tmp_path):
    folder = tiny.save_folder(tmp_path / "model")
    settings = {"use_cache": False, "pad_token_id": 0, "num_beams": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    vlm = load_model(folder)
    samples = [Sample(str(i), (tiny.picture(seed=i),), "what is red", ("red",)) for i in range(3)]
    recording = record_samples(vlm, samples, max_new_tokens=4, batch_size=2)
    assert len(recording) == 3
    assert [recording.facts(i)["id"] for i in range(3)] == ["0", "1", "2"]


# -- generations that fail -------------------------------------------------------------------------


class Breaks(StoppingCriteria):
    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_generation_that_broke_off_leaves_no_sample(llava, error):
    batch = tiny.inputs(llava, [5, 3])
    with record(llava) as recording:
        llava.generate(**batch, max_new_tokens=3)
        with pytest.raises(type(error)):
            llava.generate(**batch, max_new_tokens=5, stopping_criteria=[Breaks(error)])
        with pytest.raises(HookError, match="num_beams=2"):
            llava.generate(**batch, max_new_tokens=3, num_beams=2)
        assert recording.samples == ["000000", "000001"]
        llava.generate(**batch, max_new_tokens=3)
    assert recording.samples == ["000000", "000001", "000002", "000003"]
    close(recording["modality_mass"][:2], recording["modality_mass"][2:])


def test_a_generation_refused_by_somebody_else_leaves_earlier_samples_alone(llava):
    class Refuses(Intervention):
        def begin_generation(self, generation):
            raise HookError("not like this")

    batch = tiny.inputs(llava)
    with record(llava) as recording:
        llava.generate(**batch, max_new_tokens=3)
        with attached(llava, Refuses()), pytest.raises(HookError, match="not like this"):
            llava.generate(**batch, max_new_tokens=3)
        assert len(recording) == 1
        llava.generate(**batch, max_new_tokens=3)
    assert len(recording) == 2


def test_a_prompt_in_several_parts_is_refused(llava):
    batch = tiny.inputs(llava)
    with record(llava) as recording:
        with pytest.raises(HookError, match="prefill_chunk_size=4 feeds a prompt in several parts"):
            llava.generate(**batch, max_new_tokens=3, prefill_chunk_size=4)
        assert len(recording) == 0
        chat = Chat(llava, input_ids=batch["input_ids"][:, :2])
        with pytest.raises(HookError, match="a later part of a prompt brought an image"):
            chat._call(input_ids=batch["input_ids"][:, 2:], pixel_values=batch["pixel_values"])


# -- caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("move", "argument"),
    [
        ("reorder_cache", torch.tensor([1, 0])),
        ("batch_select_indices", torch.tensor([1, 0])),
        ("batch_repeat_interleave", 2),
    ],
)
def test_moving_the_rows_of_a_recorded_cache_is_refused_and_works_afterwards(llava, move, argument):
    batch = {**tiny.inputs(llava, [5, 4])}
    with record(llava):
        chat = Chat(llava, **batch)
        with pytest.raises(HookError, match="which a recording cannot follow"):
            getattr(chat.cache, move)(argument)
    before = chat.cache.layers[0].keys.clone()
    getattr(chat.cache, move)(argument)
    repeated = isinstance(argument, int)
    expected = before.repeat_interleave(2, 0) if repeated else before[[1, 0]]
    assert torch.equal(chat.cache.layers[0].keys, expected)


def test_a_step_whose_prompt_ran_under_a_policy_before_the_recording_is_refused(llava):
    import avl

    with avl.adaptive(llava, avl.FullPolicy()):
        chat = Chat(llava, **tiny.inputs(llava))
        with (
            record(llava),
            pytest.raises(HookError, match="begin to record before the prompt"),
        ):
            chat.say(20)


# -- options and surroundings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": 5}, r"layers must be a list of layer numbers, such as \[0, 2\]; got 5"),
        ({"layers": "0"}, "layers must be a list"),
        ({"layers": [0.5]}, "layers must be a list"),
        ({"statistics": [5]}, "5 is neither the name of a statistic nor a statistic"),
        ({"statistics": "entropy"}, r"such as \['entropy'\]; got a single text"),
        ({"keep": "attention", "queries": 5}, "queries 5 is not one of"),
        ({"keep": "attention", "queries": [-1]}, r"queries \[-1\]: name at least one"),
        ({"keep": "attention", "queries": []}, r"queries \[\]: name at least one"),
        ({"keep": "attention", "heads": 3}, r"heads must be a list of head numbers"),
    ],
)
def test_options_of_the_wrong_kind_are_refused_with_what_is_possible(llava, options, says):
    with pytest.raises(InputError, match=says), record(llava, **options):
        pass


def test_the_default_dtype_of_torch_changes_nothing_recorded(llava):
    batch = tiny.inputs(llava, [5, 3])
    with record(llava) as expected:
        llava.generate(**batch, max_new_tokens=3, do_sample=False)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with record(llava) as found:
            llava.generate(**batch, max_new_tokens=3, do_sample=False)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in expected.names:
        assert np.array_equal(found[name], expected[name], equal_nan=True), name
    for name in expected.tokens:
        assert np.array_equal(found.tokens[name], expected.tokens[name], equal_nan=True), name
