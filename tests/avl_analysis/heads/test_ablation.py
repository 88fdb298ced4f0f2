"""Silencing heads: exactly those, exactly while asked to, and what is counted from the answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from avl_analysis import InputError, load_model
from avl_analysis.capture.recorder import record
from avl_analysis.cli.main import main
from avl_analysis.corpus.questions import Sample
from avl_analysis.evaluation.generation import attention_modules
from avl_analysis.heads.ablation import (
    Ablation,
    Silenced,
    ablate,
    find_heads,
    load_ablation,
    plan,
    silenced,
)
from avl_analysis.heads.taxonomy import KINDS
from avl_analysis.recordings.recording import Recording
from tests import tiny

LAYERS, HEADS = 3, 4
EVERY = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


@pytest.fixture(scope="module")
def model():
    return tiny.llava(layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def batch(model):
    return tiny.inputs(model, batch=[9, 5])


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def head_outputs(model, batch):
    """What goes into every output projection: (layers, batch, positions, heads, head dim)."""
    seen, handles = [], []
    for module in attention_modules(model):
        handles.append(
            module.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        )
    try:
        logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen).unflatten(-1, (HEADS, -1))


def test_silencing_no_head_leaves_the_logits_as_they_are(model, batch):
    before = logits(model, batch)
    with silenced(model, []):
        inside = logits(model, batch)
    assert torch.equal(inside, before)


def test_silencing_all_heads_leaves_nothing_of_attention(model, batch):
    with silenced(model, EVERY):
        assert head_outputs(model, batch).abs().max() == 0


def test_only_the_named_heads_are_silent_and_earlier_layers_do_not_notice(model, batch):
    before = head_outputs(model, batch)
    with silenced(model, [(1, 2), (2, 0)]):
        inside = head_outputs(model, batch)
    silent = {(layer, head) for layer, head in EVERY if inside[layer, :, :, head].abs().max() == 0}
    assert silent == {(1, 2), (2, 0)}
    assert torch.equal(inside[0], before[0])
    others = [head for head in range(HEADS) if head != 2]
    assert torch.equal(inside[1][:, :, others], before[1][:, :, others])
    assert not torch.equal(
        inside[2][:, :, 1], before[2][:, :, 1]
    )  # layer 2 reads what layer 1 wrote


def test_the_model_is_restored_also_after_an_exception(model, batch):
    before = logits(model, batch)
    with pytest.raises(ZeroDivisionError), silenced(model, EVERY):
        _ = 1 / 0
    assert torch.equal(logits(model, batch), before)


def test_decoding_step_by_step_equals_one_pass_over_all_tokens(model, batch):
    with torch.no_grad(), silenced(model, [(0, 1), (2, 3)]):
        stepwise = model.generate(
            **batch,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        length = batch["input_ids"].shape[1]
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
        whole = logits(model, {**batch, "input_ids": stepwise.sequences, "attention_mask": mask})
    torch.testing.assert_close(
        torch.stack(stepwise.logits, 1), whole[:, length - 1 : -1], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("head", [(LAYERS, 0), (0, HEADS), (-1, 0)])
def test_a_head_that_is_not_there_is_refused(model, head):
    with (
        pytest.raises(InputError, match=r"layers 0 to 2 with heads 0 to 3"),
        silenced(model, [head]),
    ):
        pass


@pytest.fixture(scope="module")
def recording(model, batch):
    with record(model) as recorded:
        model.generate(**batch, max_new_tokens=4, do_sample=False)
    return recorded


def test_heads_of_a_kind_come_with_the_most_visual_first_and_all_others_after(
    recording, monkeypatch
):
    named = np.full((LAYERS, HEADS), "text", dtype=object)
    named[0, 1] = named[2, 0] = named[2, 3] = "visual"
    monkeypatch.setattr("avl_analysis.heads.ablation.kinds", lambda *_: named)
    found, others = find_heads(recording)
    image = (
        recording["modality_mass"]
        .sel(key_modality="image", step=slice(1, None))
        .mean(("sample", "step"))
    )
    assert set(found) == {(0, 1), (2, 0), (2, 3)}
    shares = [float(image.sel(layer=layer, head=head)) for layer, head in found]
    assert shares == sorted(shares, reverse=True)
    assert sorted([*found, *others]) == EVERY
    with pytest.raises(InputError, match="unknown kind of heads 'blind'"):
        find_heads(recording, "blind")


def test_random_sets_are_as_large_as_the_kind_differ_and_hold_none_of_it():
    visual, others = EVERY[:3], EVERY[3:]
    nothing, of_kind, *random = plan(visual, others, "visual", 5, seed=1)
    assert (nothing.heads, of_kind.heads) == ((), tuple(visual))
    assert len({one.heads for one in random}) == 5
    assert all(len(set(one.heads)) == 3 and not set(one.heads) & set(visual) for one in random)
    assert plan(visual, others, "visual", 5, seed=1)[2:] == random
    assert plan(visual, others, "visual", 5, seed=2)[2:] != random


def test_of_a_large_kind_as_many_are_silenced_as_others_can_be_drawn():
    _, of_kind, *random = plan(EVERY[:9], EVERY[9:], "visual", 8)
    assert of_kind.heads == tuple(EVERY[:2])
    assert {one.heads for one in random} == {
        (EVERY[9], EVERY[10]),
        (EVERY[9], EVERY[11]),
        (EVERY[10], EVERY[11]),
    }
    with pytest.raises(InputError, match="0 visual heads, 12 others"):
        plan([], EVERY, "visual", 3)


def test_in_the_same_layers_every_layer_loses_as_many_of_both():
    visual = [(0, 0), (1, 2), (1, 0), (1, 1), *((2, head) for head in range(HEADS))]
    others = [head for head in EVERY if head not in visual]
    nothing, of_kind, *random = plan(visual, others, "visual", 9, same_layers=True)
    assert nothing.heads == ()
    assert of_kind.heads == ((0, 0), (1, 2))  # layer 1 has one other head, layer 2 none
    assert {one.heads for one in random} == {((0, head), (1, 3)) for head in (1, 2, 3)}
    with pytest.raises(InputError, match="in the same layers"):
        plan([(2, head) for head in range(HEADS)], EVERY[:8], "visual", 3, same_layers=True)


def made(kind: str, *random: str) -> Ablation:
    groups = [Silenced("nothing", (), "11111111"), Silenced("visual", ((0, 1),), kind)]
    groups += [Silenced(f"random {i}", ((1, i),), right) for i, right in enumerate(random, 1)]
    tasks = ("colour",) * 4 + ("shape",) * 4
    return Ablation(
        "visual",
        1,
        12,
        "tiny",
        tuple("abcdefgh"),
        tasks,
        tuple(groups),
        "nothing",
        False,
        "avl ablate",
    )


def test_the_contrast_is_the_mean_over_draws_and_questions_with_an_interval():
    result = made("10000000", "11110000", "11111100")
    assert result.contrast.mean == pytest.approx((3 + 5) / 2 / 8)
    assert result.loss.mean == pytest.approx(-7 / 8)
    assert result.random_loss.mean == pytest.approx(-3 / 8)
    assert result.contrast.low < result.contrast.mean < result.contrast.high
    same = made("11110000", "11110000", "11110000")
    assert (same.contrast.mean, same.contrast.low, same.contrast.high) == (0, 0, 0)


def test_one_task_is_what_was_answered_to_its_questions():
    part = made("10000000", "11110000", "11111100").select_task("shape")
    assert (part.samples, part.tasks) == (("e", "f", "g", "h"), ("shape",) * 4)
    assert [group.right for group in part.groups] == ["1111", "0000", "0000", "1100"]
    assert part.contrast.mean == pytest.approx(1 / 4)


def test_draws_that_disagree_widen_the_interval_of_the_contrast():
    alike, apart = made("0" * 8, "11110000", "00001111"), made("0" * 8, "11111111", "00000000")
    assert alike.contrast.mean == apart.contrast.mean
    width = [one.contrast.high - one.contrast.low for one in (alike, apart)]
    assert width[1] > 1.2 * width[0]


def test_a_question_that_was_not_measured_everywhere_does_not_count():
    result = made("0-000000", "11111111")
    assert (result.contrast.mean, result.contrast.n) == (1.0, 7)


def test_an_ablation_is_read_as_it_was_written(tmp_path):
    result = made("10000000", "11110000")
    assert load_ablation(result.save(tmp_path / "a.json")) == result
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(InputError, match="not an ablation"):
        load_ablation(tmp_path / "b.json")
    with pytest.raises(InputError, match="there is no ablation"):
        load_ablation(tmp_path / "c.json")


def test_a_model_is_asked_with_each_set_silenced(tmp_path, monkeypatch):
    vlm = load_model(tiny.save_folder(tmp_path / "model", tiny.llava(layers=LAYERS)))
    samples = [
        Sample(
            f"s{i}",
            (tiny.picture(seed=i),),
            "what is red?" if i % 2 else "where is the blue one?",
            ("red",),
        )
        for i in range(6)
    ]
    named = np.full((LAYERS, HEADS), "text", dtype=object)
    named[1, 1] = named[2, 3] = "visual"
    monkeypatch.setattr("avl_analysis.heads.ablation.kinds", lambda *_: named)
    result = ablate(vlm, samples, draws=3, max_new_tokens=3, batch_size=2)
    assert [group.name for group in result.groups] == [
        "nothing",
        "visual",
        "random 1",
        "random 2",
        "random 3",
    ]
    assert set(result.of_kind.heads) == {(1, 1), (2, 3)}
    assert result.samples == ("s0", "s1", "s3", "s4")
    assert all(
        set(group.right) == {"0"} and len(group.right) == 4 for group in result.groups
    )  # random weights
    assert (result.found, result.heads) == (2, 12)
    unknown = [Sample(f"x{i}", (), "what?" + i * " red") for i in range(6)]
    with pytest.raises(InputError, match="right answer"):
        ablate(vlm, unknown, draws=1, max_new_tokens=2)
    others = [replace(one, id=f"o{one.id}", prompt="what is blue?") for one in samples[:2]]
    result = ablate(vlm, samples, recorded=others, draws=1, max_new_tokens=2)
    assert result.samples == tuple(one.id for one in samples)
    assert result.found_on == "2 questions of their own"
    with pytest.raises(InputError, match="3 of the questions are also those the kinds of heads"):
        ablate(vlm, samples, recorded=samples[:3], draws=1, max_new_tokens=2)


def test_the_help_of_the_command_lists_every_kind_of_head(capsys):
    with pytest.raises(SystemExit) as done:
        main(["ablate", "--help"])
    assert done.value.code == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    described = told.split("Kind of heads:")[1].split(".")[0]
    assert [kind for kind in KINDS if kind not in described] == []


def test_the_command_finds_heads_by_other_scenes_than_it_asks_and_says_so(capsys):
    arguments = ["--scenes", "4", "--task", "colour", "--draws", "1", "--max-new-tokens", "4"]
    with pytest.raises(SystemExit) as done:
        main(["ablate", *arguments])
    assert not done.value.code
    told = " ".join(capsys.readouterr().out.split())
    assert "asked: 4 questions (split ablation)" in told
    assert "read from 2 questions (split heads) of their own" in told


def test_heads_are_not_judged_by_scenes_they_were_found_by():
    scene = {"seed": 5, "index": 0, "task": "colour"}
    recording = Recording({}, {})
    recording._data = {"tokens": xr.Dataset(coords={"sample": np.array(["a"], dtype=object)})}
    recording.annotate("a", scene=scene)
    asked = [Sample("q", (), "what?", ("red",), scene=scene)]
    with pytest.raises(InputError, match=r"1 of the questions are also those .* for example q"):
        ablate(None, asked, recording=recording)
