"""One watched answer on tiny random models: what is shown is what the model computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import avl
from avl_analysis import live
from avl_analysis.capture.recorder import record
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.heads import taxonomy
from avl_analysis.models.loading import VLM, load_model
from tests import tiny
from tests.avl_analysis.models import folders

TOKENS = 7


def vlm(kv_heads: int = 2, attn: str = "sdpa") -> VLM:
    model = tiny.llava(kv_heads, attn=attn)
    return VLM("tiny", model, tiny.processor(model), "memory", None, "")


@pytest.fixture(scope="module")
def model() -> VLM:
    return vlm()


@pytest.fixture(scope="module")
def sample() -> Sample:
    return Sample("one", (tiny.picture(),), "what is the colour?")


@pytest.fixture(scope="module")
def seen(model: VLM, sample: Sample) -> live.Observation:
    return live.observe(model, sample, max_new_tokens=TOKENS)


def test_an_answer_is_what_generate_gives_and_every_token_has_its_time(
    model: VLM, sample: Sample
) -> None:
    heard: list[tuple[str, int]] = []
    said = live.answer(
        model, sample, max_new_tokens=TOKENS, on_token=lambda *event: heard.append(event)
    )
    inputs = model.prepare(list(sample.images), sample.prompt)
    out = model.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    assert said.ids == tuple(out[0, inputs["input_ids"].shape[1] :].tolist())
    assert (
        said.text
        == model.processor.decode(list(said.ids), skip_special_tokens=True).strip()
        == heard[-1][0]
    )
    assert [count for _, count in heard] == list(range(1, TOKENS + 1))
    assert all(np.diff(said.seconds) > 0)
    assert said.ttft == said.seconds[0]
    assert said.usage is None
    assert said.states is None


def test_watching_does_not_change_the_answer(
    model: VLM, sample: Sample, seen: live.Observation
) -> None:
    assert seen.answer.ids == live.answer(model, sample, max_new_tokens=TOKENS).ids


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_watched_weights_are_the_rows_of_eager_attention(kv_heads: int, sample: Sample) -> None:
    watched = live.observe(vlm(kv_heads), sample, max_new_tokens=TOKENS)
    eager = vlm(kv_heads, "eager")
    out = eager.model.generate(
        **eager.prepare(list(sample.images), sample.prompt),
        max_new_tokens=TOKENS,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    for step, layers in enumerate(out.attentions):
        rows = torch.stack([layer[0, :, -1] for layer in layers]).numpy()
        kept = watched.weights[step]
        np.testing.assert_allclose(
            kept[..., : rows.shape[-1]], rows, atol=1e-3
        )  # kept in half precision
        assert np.isnan(kept[..., rows.shape[-1] :]).all()


def test_rows_add_up_to_one_over_system_image_and_text(seen: live.Observation) -> None:
    for step in range(seen.steps):
        assert sum(seen.mass(step, 1, 2).values()) == pytest.approx(1, abs=2e-3)
        assert sum(seen.mass(step).values()) == pytest.approx(1, abs=2e-3)


def test_patches_stand_where_the_layout_says(seen: live.Observation) -> None:
    patches = seen.on_image(np.arange(seen.modality.size, dtype=float))
    first = int(np.flatnonzero(seen.image == 0)[0])
    grid = patches.raster.take(patches.values)
    assert seen.drawable == (0,)
    assert grid.shape == (4, 4)
    assert grid[0, 0] == first
    assert grid[1, 2] == first + 6
    assert patches.boxes[6].tolist() == [0.5, 0.25, 0.75, 0.5]
    with pytest.raises(InputError, match=r"image 3 has no tokens with a known place.*: 0"):
        seen.on_image(grid.ravel(), 3)


def test_patches_cover_the_part_of_the_image_that_the_processor_keeps(sample: Sample) -> None:
    crops = vlm()
    processor = crops.processor.image_processor
    processor.do_center_crop, processor.size = True, {"shortest_edge": processor.size["height"]}
    seen = live.observe(crops, sample, max_new_tokens=2)  # of an image of 40 x 30 pixels
    raster = seen.on_image(np.ones(seen.modality.size)).raster
    np.testing.assert_allclose(raster.x, np.linspace(0.125, 0.875, 5), atol=2e-5)
    np.testing.assert_allclose(raster.y, np.linspace(0, 1, 5), atol=2e-5)


@pytest.mark.parametrize("model_type", ["smolvlm", "internvl", "llava_next", "qwen2_5_vl"])
def test_a_watched_answer_can_be_drawn_over_an_image_seen_in_tiles_or_in_its_own_shape(
    model_type: str, tmp_path: Path
) -> None:
    loaded = load_model(folders.save_folder(tmp_path, model_type))
    asked = Sample("one", (tiny.picture((640, 427)),), "what is red?")
    seen = live.observe(loaded, asked, max_new_tokens=2)
    token = seen.on_image(seen.look(0)).raster.pixels(80, 120)
    assert seen.drawable == (0,)
    assert (token >= 0).all()  # every part of the image is seen
    tile = seen.images[0].tile
    # In tiles nearly everywhere: LLaVA-NeXT cuts whole rows of cells off beside its padding.
    assert (tile[token] > 0).mean() > 0.9 or tile.max() == 0


def test_what_is_watched_is_what_a_recording_of_the_answer_holds(
    model: VLM, sample: Sample, seen: live.Observation
) -> None:
    inputs = model.prepare(list(sample.images), sample.prompt)
    with record(model.model) as recording:
        model.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    assert seen.recording.names == recording.names
    for name in recording.names:
        np.testing.assert_array_equal(seen.recording[name].values, recording[name].values)
    assert not seen.recording.data["attention"].data_vars


def test_the_focus_counts_patches_and_the_lift_of_a_region(seen: live.Observation) -> None:
    row = np.zeros((1, 1, 1, seen.modality.size), np.float16)
    row[0, 0, 0, np.flatnonzero(seen.image == 0)[:3]] = [0.5, 0.25, 0.25]
    one = replace(seen, weights=row)
    focus = one.focus(0, 0, 0, region=[0, 5])
    assert (focus.mass, focus.patches, focus.of) == (1.0, 3, 16)
    assert focus.region == 0.5
    assert focus.lift == pytest.approx(0.5 / (2 / 16))
    assert np.isnan(one.focus(0).lift)


@pytest.mark.parametrize(
    ("place", "message"),
    [((99, 0, 0), "token 99"), ((0, 9, 0), "layer 9"), ((0, 0, 77), "head 77")],
)
def test_places_that_are_not_there_are_named(
    seen: live.Observation, place: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        seen.look(*place)


def test_under_a_policy_keys_that_were_not_read_have_no_weight(model: VLM, sample: Sample) -> None:
    policy = avl.AdaptivePolicy(secondary=0.5, core=0.25, text=None)
    watched = live.observe(model, sample, policy, max_new_tokens=TOKENS)
    states = watched.answer.states
    assert states is not None
    assert states.shape == (2, TOKENS, watched.modality.size)
    image = watched.image == 0
    read = ~np.isnan(watched.weights[:, :, 0, :])
    assert read[0][:, image].all()  # the prompt reads everything
    for layer in range(2):
        for step in range(1, TOKENS):
            core = states[layer, step - 1][image] == avl.State.CORE
            held = states[layer, step - 1][image] >= avl.State.SECONDARY
            expected = held if step % policy.refresh_every == 0 else core
            assert (read[step, layer][image] == expected).all()
            assert (core.sum(), held.sum()) == (4, 8)


def test_full_cache_policy_and_full_cache_do_not_disagree_and_a_harsh_policy_does(
    model: VLM, sample: Sample
) -> None:
    full = live.answer(model, sample, max_new_tokens=TOKENS)
    same = live.disagreement(model, sample, avl.FullPolicy(), full.ids)
    assert same.kl.shape == (TOKENS,)
    assert same.kl.max() < 1e-6
    assert same.agree.all()
    harsh = avl.AdaptivePolicy(secondary=0.1, core=0.1, text=None)
    other = live.disagreement(model, sample, harsh, full.ids)
    assert other.kl[0] < 1e-6  # the first token comes from the prompt, before anything is dropped
    assert other.kl.max() > 1e-3


def test_the_model_is_free_again_after_a_reader_stops(model: VLM, sample: Sample) -> None:
    class Gone(Exception):
        pass

    def leave(text: str, count: int) -> None:
        if count == 2:
            raise Gone

    with pytest.raises(Gone):
        live.observe(model, sample, avl.AdaptivePolicy(), max_new_tokens=TOKENS, on_token=leave)
    before = live.answer(model, sample, max_new_tokens=TOKENS).ids
    assert live.observe(model, sample, max_new_tokens=TOKENS).answer.ids == before


def test_head_maps_cover_every_head_and_rank_them(
    model: VLM, sample: Sample, seen: live.Observation
) -> None:
    recording = seen.recording
    assert recording.facts()["answer"] == seen.answer.text
    image = taxonomy.measure(recording, "modality_mass/image")
    for step in range(TOKENS):
        values = taxonomy.matrix(recording, image, step)
        watched = [
            [seen.mass(step, layer, head)["image"] for head in range(4)] for layer in range(2)
        ]
        np.testing.assert_allclose(values, watched, atol=2e-3)
    means = taxonomy.matrix(recording, image)
    per_step = np.stack([taxonomy.matrix(recording, image, step) for step in range(1, TOKENS)])
    np.testing.assert_allclose(means, per_step.mean(0), rtol=1e-5)
    ranked = taxonomy.rank(means, (0, 1))
    assert [value for *_, value in ranked] == sorted(means.ravel().tolist(), reverse=True)
    assert {(layer, head) for layer, head, _ in ranked} == {
        (a, b) for a in range(2) for b in range(4)
    }
    kinds = taxonomy.kinds(recording)
    assert kinds.shape == (2, 4)
    assert ((kinds == "visual") == (means >= taxonomy.VISUAL)).all()
    with pytest.raises(InputError, match="no measure 'nonsense'"):
        taxonomy.measure(recording, "nonsense")


def _distributions(model: VLM, sample: Sample, ids: tuple[int, ...]) -> torch.Tensor:
    """(tokens, vocabulary) logits along an answer, one whole pass, nothing cached."""
    inputs = dict(model.prepare(list(sample.images), sample.prompt))
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids[:-1]])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = model.model(**inputs).logits[0, prompt - 1 :].double()
    logits[:, model.model.generation_config.suppress_tokens or []] = -torch.inf
    return logits


@pytest.mark.parametrize("temperature", [0.0, 1.7])
def test_every_token_comes_with_the_distribution_it_was_chosen_from(
    model: VLM, sample: Sample, temperature: float
) -> None:
    options = {"max_new_tokens": TOKENS, "temperature": temperature, "seed": 3}
    said = live.answer(model, sample, choices=4, **options)
    assert live.answer(model, sample, **options).ids == said.ids
    logits = _distributions(model, sample, said.ids) / (temperature or 1.0)
    shares = torch.softmax(logits, -1)
    assert len(said.choices) == len(said.ids) == TOKENS
    for choice, row, token in zip(said.choices, shares, said.ids, strict=True):
        best = row.topk(4)
        assert choice.probabilities == pytest.approx(best.values.tolist(), abs=1e-6)
        assert choice.probability == pytest.approx(float(row[token]), abs=1e-6)
        assert choice.rank == int((row > row[token]).sum())
        assert choice.entropy == pytest.approx(float(torch.special.entr(row).sum()), abs=1e-4)
        if temperature == 0:
            assert choice.rank == 0
    if temperature:
        assert any(choice.rank > 0 for choice in said.choices)


def test_answers_are_drawn_from_a_seed_and_leave_random_numbers_as_they_were(
    model: VLM, sample: Sample
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    answers = {
        live.answer(model, sample, max_new_tokens=TOKENS, temperature=3.0, seed=seed).ids
        for seed in range(4)
    }
    assert torch.equal(torch.rand(1), expected)
    assert len(answers) == 4
    seen = live.observe(model, sample, max_new_tokens=TOKENS, temperature=3.0, seed=2)
    assert seen.answer.ids in answers
    assert len(seen.answer.choices[0].words) == live.CHOICES


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": np.nan}, {"seed": -1}])
def test_temperatures_and_seeds_out_of_range_are_refused(
    model: VLM, sample: Sample, wrong: dict[str, float]
) -> None:
    with pytest.raises(InputError, match="choose"):
        live.answer(model, sample, **{"temperature": 1.0, **wrong})  # type: ignore[arg-type]
