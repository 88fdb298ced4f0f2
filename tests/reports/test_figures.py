"""Every figure on a recording of a real (tiny) model, and the findings of some on numbers that
decide them.
"""

import numpy as np
import pytest
import torch
import xarray as xr

from avl.places import remember_originals
from avl_analysis.capture.recorder import record
from avl_analysis.figures import Heat, Lines, Overlay
from avl_reports import (
    fig_ablation,
    fig_core_age,
    fig_coverage,
    fig_errors,
    fig_frontier,
    fig_grounding,
    fig_knockout,
    fig_localisation,
    fig_modality,
    fig_patch_words,
    fig_persistence,
    fig_policies,
    fig_position_bias,
    fig_ppci,
    fig_prefill_recall,
    fig_relevance,
    fig_sets,
    fig_sink_tokens,
    fig_sparsity,
    fig_text_age,
    fig_video,
)
from avl_reports.build import FIGURES
from avl_reports.findings import Verdict
from avl_reports.run import NotMeasured, Run
from tests import tiny
from tests.reports import made

NEEDS_MORE = {
    fig_localisation,
    fig_policies,
    fig_ablation,
    fig_frontier,
    fig_video,
    fig_grounding,
    fig_knockout,
    fig_errors,
    fig_sink_tokens,
    fig_relevance,
    fig_patch_words,
}
"""Figures that need known regions, several pictures, a video, or more than a recording."""


@pytest.fixture(scope="module")
def recording():
    model = tiny.llava(layers=3)
    batch = tiny.inputs(model, batch=[9, 5, 7, 6, 8, 4])
    remember_originals(batch, [[tiny.picture().size]] * 6, tiny.processor(model))
    torch.manual_seed(0)
    with record(model) as recorded:
        model.generate(**batch, max_new_tokens=10, do_sample=False)
    picture = np.asarray(tiny.picture())
    for name in recorded.samples:
        recorded.annotate(
            name,
            prompt="what <b>is</b> it",
            answer="a b c",
            words=["a", "b", "c"],
            picture=address(picture),
        )
    return recorded


def address(picture: np.ndarray) -> str:
    from avl_analysis.figures.pictures import data_uri

    return data_uri(picture)


@pytest.mark.parametrize(
    "module", [m for m in FIGURES if m not in NEEDS_MORE], ids=lambda m: m.__name__.split("_", 1)[1]
)
def test_every_figure_can_be_made_of_any_recording(recording, module):
    section = module.section(Run(recording))
    assert section.question.endswith("?")
    assert section.figure.caption.n >= 1
    for panel in section.figure.panels:
        if isinstance(panel, Lines | Heat):
            shown = panel.lines[0].y if isinstance(panel, Lines) else panel.values
            assert np.isfinite(shown).any()
    overlays = [panel for panel in section.figure.panels if isinstance(panel, Overlay)]
    drawn = [panel.patches for panel in overlays if panel.patches is not None]
    assert bool(drawn) == bool(overlays)  # a picture alone may stand beside those drawn over
    assert all(np.isfinite(patches.values).any() for patches in drawn)
    for finding in section.findings:
        assert finding.measured.endswith(".")
        assert finding.verdict in Verdict


@pytest.mark.parametrize(
    "module", sorted(NEEDS_MORE, key=str), ids=lambda m: m.__name__.split("_", 1)[1]
)
def test_a_figure_says_what_it_lacks(recording, module):
    with pytest.raises(
        NotMeasured,
        match=r"not say|compared|silenced|not measured|video|is one|not cut|judged|looked for"
        r"|not computed|not read",
    ):
        module.section(Run(recording))


def test_overlap_figures_draw_their_random_baseline(recording):
    panel = fig_ppci.section(Run(recording)).figure.panels[0]
    baselines = [line for line in panel.lines if line.role == "baseline"]
    assert [set(line.y.tolist()) for line in baselines] == [{0.1}, {0.3}, {0.5}]
    assert panel.lines[0].x[0] == 1


def _varied(array: xr.DataArray) -> xr.DataArray:
    """The array with entries that differ a little, as measured ones do."""
    return array * np.random.default_rng(0).uniform(0.99, 1.01, array.shape)


def test_a_core_that_never_ages_supports_refreshing_rarely(recording):
    hits = recording["core_hit_rate"]
    steady = _varied(hits.copy(data=np.where(np.isfinite(hits), 0.9, np.nan)))
    assert fig_core_age.finding(steady).verdict is Verdict.SUPPORTED
    fading = xr.where(hits["core_age"] == 0, 0.9, 0.3) * _varied(xr.ones_like(hits))
    assert fig_core_age.finding(fading).verdict is Verdict.NOT_SUPPORTED


def test_prefill_is_enough_only_if_it_catches_the_target(recording):
    run = Run(recording)
    held = recording.data["statistics"]["prefill_mass"]
    saved = held.copy()
    held[:] = _varied(xr.full_like(held, 0.97))
    supported = fig_prefill_recall.section(run).findings[0]
    held[:] = _varied(xr.full_like(held, 0.5))
    refused = fig_prefill_recall.section(run).findings[0]
    held[:] = saved
    assert (supported.verdict, refused.verdict) == (Verdict.SUPPORTED, Verdict.NOT_SUPPORTED)
    assert "97 %" in supported.measured


def test_sets_follow_the_rules_step_by_step():
    rng = np.random.default_rng(0)
    scores = rng.random((9, 20))
    found = fig_sets.choose_sets(scores, 0.5, 0.3, 3)
    held = set(np.argsort(-scores[0])[:10])
    core = set(sorted(held, key=lambda token: -scores[0, token])[:6])
    for step in range(9):
        assert set(np.flatnonzero(found[step] >= 1)) == held
        assert set(np.flatnonzero(found[step] == 2)) == core
        if step and step % 3 == 0:
            core = set(sorted(held, key=lambda token: -scores[step, token])[:6])


def test_without_refreshing_the_core_stays():
    scores = np.random.default_rng(1).random((5, 20))
    found = fig_sets.choose_sets(scores, 0.5, 0.3, 0)
    assert (found == found[0]).all()


def test_the_sets_are_animated_step_by_step():
    section = fig_sets.section(Run(made.recording()))
    assert section.moving is not None
    assert section.moving.steps == tuple(range(len(section.moving.frames)))
    assert {0.0, 1.0, 2.0} == set(np.unique(section.moving.frames[0].patches.values))
    assert len(section.figure.panels) <= fig_sets.SHOWN


@pytest.fixture(scope="module")
def compared():
    return made.comparison()


def _samples(values: np.ndarray, *dims: str, **coords) -> xr.DataArray:
    """Made-up values, (samples, *dims), of nine samples that differ a little."""
    noise = np.random.default_rng(0).normal(0, 1e-3, (9, *values.shape))
    return xr.DataArray(values + noise, dims=("sample", *dims), coords=coords)


def test_a_significant_fall_of_image_attention_does_not_last():
    fell = _samples(np.array(-0.005))  # half a per cent per step, a quarter over 60 steps
    steady, decaying = _samples(np.array(0.0)), _samples(np.array(0.4))
    judged = fig_persistence.finding(fell, decaying, "9 answers")
    assert "by -0.5 % [-0.5, -0.4] (9 answers" in judged.measured
    assert judged.verdict is Verdict.NOT_SUPPORTED
    assert fig_persistence.finding(steady, decaying, "").verdict is Verdict.SUPPORTED
    assert fig_persistence.finding(steady * 100, decaying, "").verdict is Verdict.UNDECIDED
    rising = _samples(np.array(0.05))
    assert fig_persistence.finding(rising, decaying, "").verdict is Verdict.NOT_SUPPORTED


def test_text_that_keeps_its_attention_contradicts_the_claim_about_both():
    steady = _samples(np.array(0.0))
    growing, unknown = _samples(np.array(-0.3)), xr.full_like(steady, np.nan)
    assert fig_persistence.finding(steady, growing, "").verdict is Verdict.NOT_SUPPORTED
    assert fig_persistence.finding(steady, unknown, "").verdict is Verdict.UNDECIDED


def test_the_change_of_all_layers_counts_each_with_its_attention(recording):
    run = Run(recording)
    slope, _ = fig_persistence._slopes(run)
    found = fig_persistence.change_in_all_layers(run, slope)
    mass = recording["modality_mass"].sel(key_modality="image", step=slice(1, None)).mean("head")
    for index in range(found.sizes["sample"]):
        total = mass.isel(sample=index).sum("layer", skipna=False).dropna("step").values
        steps = np.arange(total.size)
        expected = np.polyfit(steps, total, 1)[0] / total.mean()
        assert float(found[index]) == pytest.approx(expected, rel=1e-3)


def test_opposite_trends_of_layers_do_not_cancel():
    bias = np.array([[0.1, -0.84, 0.5], [0.1, 1.16, 0.5], [0.1, 0.0, 0.5]])
    labels = {"bias_parameter": ["mu", "sigma", "r2"], "layer": [0, 1, 2]}
    judged = fig_position_bias.finding(_samples(bias, "layer", "bias_parameter", **labels))
    assert judged.verdict is Verdict.NOT_SUPPORTED  # the mean over layers is 0.11
    assert "within the bound in 1 of 3 layers and outside in 2" in judged.measured
    assert "the strongest is layer 1's, 1.16 [" in judged.measured
    assert "explain 50 % [" in judged.measured
    bias[:, 1] = [-0.3, 0.3, 0.0]
    judged = fig_position_bias.finding(_samples(bias, "layer", "bias_parameter", **labels))
    assert judged.verdict is Verdict.SUPPORTED


def test_coverage_is_judged_by_one_set_of_image_keys_per_layer():
    """Every head alone would need 40 % of the keys, the heads of a layer together 60 %."""
    taus = {"tau": [0.5, 0.95], "key_modality": ["system", "image", "text"]}
    heads = _samples(np.full((3, 2), 0.4), "key_modality", "tau", **taus)
    shared = _samples(np.array([0.2, 0.6]), "tau", tau=[0.5, 0.95])
    core, held, text = fig_coverage.findings(heads, shared, shared)
    assert (core.verdict, held.verdict) == (Verdict.NOT_SUPPORTED,) * 2
    assert "One set of image keys for all heads of a layer needs 60 % [" in held.measured
    assert "A head needs 40 % [" in text.measured
    assert text.verdict is Verdict.SUPPORTED


def test_sparsity_is_judged_by_tokens_that_no_step_needs():
    judged = fig_sparsity.finding(_samples(np.full(3, 0.055), "layer"))
    assert judged.verdict is Verdict.NOT_SUPPORTED
    assert "5.5 % [" in judged.measured
    assert fig_sparsity.finding(_samples(np.full(3, 0.6), "layer")).verdict is Verdict.SUPPORTED


def test_policies_are_judged_by_paired_differences(compared):
    saves, keeps, beats = fig_policies.findings(compared)
    assert (saves.verdict, keeps.verdict) == (Verdict.SUPPORTED,) * 2
    assert "60 %" in saves.measured
    assert "“random:0.6” (using 62.0 %)" in beats.measured  # the nearest in bytes
    assert beats.verdict is Verdict.UNDECIDED  # random selection uses 3 % more
    equal = made.comparison(random_size=0.61)
    assert fig_policies.findings(equal)[2].verdict is Verdict.SUPPORTED


def test_a_few_questions_without_a_change_do_not_show_that_answers_stay_right():
    for count in (6, 48):
        _, keeps, _ = fig_policies.findings(made.comparison(count))
        assert keeps.verdict is Verdict.UNDECIDED
        assert "accuracy changes by 0.0 % [-" in keeps.measured


def test_tasks_answered_in_one_token_neither_count_nor_decide(compared):
    mixed = made.comparison(one_token=("count",))
    assert mixed.one_token_tasks == ["count"]
    keeps = fig_policies.findings(mixed)[1]
    assert "(120 questions, paired)" in keeps.measured
    caption = fig_policies.section(Run(made.recording(), mixed)).figure.caption.what
    assert "Tasks answered in one token (count) are left out" in caption
    cut = type(mixed)(mixed.dataset.assign_attrs(max_new_tokens=2))
    assert cut.one_token_tasks == []  # cut so short, the length of an answer is not known
    alone = made.comparison(one_token=("count", "colour"))
    assert fig_policies.findings(alone)[1].verdict is Verdict.UNDECIDED
    assert not alone.telling


def test_settings_of_one_policy_are_joined_by_bytes(compared):
    figure = fig_policies.section(Run(made.recording(), compared)).figure
    series = {points.name: points for points in figure.panels[0].points}
    assert list(series) == ["A-VL", "random"]
    assert [(rule.label, rule.at) for rule in figure.panels[0].rules] == [("full cache", 1.0)]
    assert series["random"].x == pytest.approx([0.3, 0.62])
    assert series["random"].joined
    assert not series["A-VL"].joined


def test_accuracy_by_task_is_a_map_of_policies_and_tasks(compared):
    heat = fig_policies.section(Run(made.recording(), compared)).figure.panels[2]
    assert [name for _, name in heat.x.ticks] == ["colour", "count"]
    assert heat.values.shape == (4, 2)
    assert heat.values[0].tolist() == [1, 1]


def test_the_cost_table_has_a_row_per_policy(compared):
    header, *rows = fig_policies.table(compared)
    assert [row[0] for row in rows] == compared.policies
    assert rows[1][header.index("bytes in use / full")].startswith("60 %")


def test_silencing_heads_is_judged_by_the_difference_to_as_many_others(recording):
    first, second = made.ablation(), made.ablation(same_layers=True)
    section = fig_ablation.section(Run(recording, ablations=[first, second]))
    finding, other = section.findings
    assert finding.verdict is Verdict.SUPPORTED
    assert "changes accuracy by -80 % [" in finding.measured
    assert "the latter minus the former: 50 % [" in finding.measured
    assert finding.choice.endswith("as many others")
    assert other.choice.endswith("of the same layers")
    overall, by_task = section.figure.panels[:2]
    assert overall.categories == ("nothing", "visual heads", "random 1", "random 2")
    assert overall.bars[0].values.tolist() == [0.9, 0.1, 0.5, 0.7]
    assert by_task.categories == ("colour", "count")
    assert [bar.values.tolist() for bar in by_task.bars] == [
        pytest.approx([0.8, 0.8]),
        pytest.approx([0.0, 0.6]),
    ]
    assert section.table[2] == ("visual heads", "1.0, 2.3", section.table[2][2])


def test_the_frontier_pools_tasks_and_judges_equal_budgets_question_by_question(recording):
    section = fig_frontier.section(Run(recording, frontier=made.frontier()))
    paper, half, quarter = section.findings
    assert paper.verdict is Verdict.UNDECIDED  # eight questions without a change allow for one
    assert "At 55 % of the bytes accuracy changes by 0.0 % [-" in paper.measured
    assert half.verdict is Verdict.SUPPORTED
    assert "(using 50.0 %) minus that of random selection (using 50.0 %): 50 % [" in half.measured
    assert "(8 questions, paired)" in half.measured
    assert quarter.verdict is Verdict.UNDECIDED
    assert "at bytes that differ by at most 2 %" in quarter.rule
    everything = section.figure.panels[0]
    ours = next(points for points in everything.points if points.name == "A-VL")
    assert (ours.x.tolist(), ours.y.tolist()) == ([0.25, 0.5], [0.5, 0.75])
    assert section.figure.caption.n == 8
    assert "avl frontier" in section.figure.caption.what
    assert len(section.table) == 7
    assert section.table[0][-1] == "answered in one token"
    assert [panel.title for panel in section.figure.panels if "token" in panel.title] == [
        "tasks with answers of several tokens",
        "tasks answered in one token",
    ]
    assert "(shape) are shown apart" in section.figure.caption.what
    assert "the same questions (split comparison)" in section.figure.caption.what


def test_a_frontier_that_counted_reads_and_time_shows_them_and_budgets_in_tokens(recording):
    frontier = made.frontier()
    lines = [
        {
            **line,
            "budget": 64 if line["budget"] == 0.25 else line["budget"],
            "attended": line["bytes"] / 2,
            "attention_time": line["bytes"] * 2,
        }
        for line in frontier.lines
    ]
    section = fig_frontier.section(Run(recording, frontier=type(frontier)({}, lines)))
    header, *rows = section.table
    assert header[2:5] == ("bytes in use / full", "keys read / seen", "attention time / full")
    assert ("A-VL", "64 image tokens", "0.25", "0.12", "0.50") in {row[:5] for row in rows}
    by_reads = section.figure.panels[1]
    assert by_reads.x.label == "keys read at a decode step"
    ours = next(series for series in by_reads.points if series.name == "A-VL")
    assert ours.x.tolist() == [0.125, 0.25]
    assert [f for f in section.findings if "64" in f.choice] == []


def test_a_frontier_of_token_budgets_alone_is_drawn_by_task(recording):
    frontier = made.frontier()
    lines = [{**line, "budget": line["budget"] and 64} for line in frontier.lines]
    section = fig_frontier.section(Run(recording, frontier=type(frontier)({}, lines)))
    heats = [panel for panel in section.figure.panels if isinstance(panel, Heat)]
    assert [heat.title for heat in heats] == ["by task"]


def test_a_frontier_whose_bytes_differ_or_whose_answers_are_one_token_decides_nothing():
    frontier = made.frontier()
    wins = [
        {**line, "right": "0000", "bytes": 0.45} if line["policy"] == "random" else line
        for line in frontier.lines
    ]
    half = fig_frontier.findings(type(frontier)(frontier.about, wins))[1]
    assert "75 % [" in half.measured  # beyond doubt, but with a tenth more bytes
    assert half.verdict is Verdict.UNDECIDED
    short = [
        {**line, "answer_tokens": 1, "right": "0000" if line["policy"] == "random" else "1111"}
        for line in frontier.lines
    ]
    verdicts = {one.verdict for one in fig_frontier.findings(type(frontier)({}, short))}
    assert verdicts == {Verdict.UNDECIDED}


def test_a_frontier_of_the_split_presets_were_chosen_by_says_so():
    frontier = made.frontier()
    old = type(frontier)({"settings": "Settings(seed=800000)"}, frontier.lines)
    assert "presets were chosen by, so not held out" in fig_frontier._split(old)
    assert fig_frontier._split(type(frontier)({}, frontier.lines)) == ""


@pytest.fixture(scope="module")
def one_long():
    """Three answers, one of them of many decode steps."""
    model = tiny.llava(layers=3)
    with record(model) as recorded:
        for batch, length in (([9], 29), ([5, 7], 5)):
            model.generate(**tiny.inputs(model, batch=batch), max_new_tokens=length)
    return recorded


def test_one_long_answer_among_short_ones_is_not_called_none(one_long):
    slopes, which = fig_persistence._slopes(Run(one_long))
    assert which == "all answers; fewer than two have 8 decode steps or more"
    assert slopes.sizes["sample"] == 3
    section = fig_persistence.section(Run(one_long))
    assert f"({which})" in section.figure.caption.what
    assert f"({which}, all layers together)" in section.findings[0].measured


@pytest.mark.parametrize(
    "module",
    [fig_core_age, fig_modality, fig_persistence, fig_ppci, fig_text_age],
    ids=lambda m: m.__name__.split("_", 1)[1],
)
def test_what_is_left_out_is_said_where_something_can_be(one_long, module):
    several = module.section(Run(one_long)).figure.caption.what
    assert "that fewer than 2 samples reach are left out." in several
    model = tiny.llava(layers=3)
    with record(model) as alone:
        model.generate(**tiny.inputs(model, batch=[9]), max_new_tokens=5)
    assert "samples reach" not in module.section(Run(alone)).figure.caption.what


def test_only_long_answers_tell_whether_image_attention_lasts(recording):
    slopes, which = fig_persistence._slopes(Run(recording))
    assert which == "6 answers of at least 8 decode steps"
    assert slopes.sizes["sample"] == 6
