"""Attention of right and wrong words: against one loop per word, through the command, and drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from avl_analysis import load_model, scene_samples
from avl_analysis.cli.main import main
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.corpus.regions import only_image
from avl_analysis.corpus.words import FILLER, judge_words
from avl_analysis.errors import InputError
from avl_analysis.heads.word_attention import SIGNALS, comparable, error_auroc, word_table
from avl_analysis.heads.word_errors import (
    NEEDED,
    load_word_errors,
    noisy,
    save_word_errors,
    word_errors,
)
from avl_analysis.recordings.recording import Recording
from avl_reports import fig_errors
from avl_reports.findings import Verdict
from avl_reports.run import NotMeasured, Run
from tests import tiny
from tests.avl_analysis import shared
from tests.avl_analysis.models.folders import save_folder
from tests.reports import made

SCENES = scene_samples(2, ["ocr", "colour", "caption"])


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record_samples(
        load_model("scenes"),
        noisy(SCENES, 0.2),
        max_new_tokens=24,
        batch_size=3,
        statistics=list(NEEDED),
    )


def test_every_word_has_the_numbers_of_the_row_that_produced_it(recording: Recording) -> None:
    table = word_table(recording)
    row = 0
    for index, name in enumerate(recording.samples):
        facts = recording.facts(name)
        for word in judge_words(facts, only_image(recording, name)):
            one = table.isel(word=row)
            assert (one["sample"].item(), one["step"].item()) == (name, word.step)
            assert one["surprise"].item() == facts["surprise"][word.step]
            for layer in range(5):
                for key, statistic in (
                    ("image_mass", "modality_mass"),
                    ("image_entropy", "entropy"),
                ):
                    heads = [
                        float(
                            recording[statistic].sel(
                                sample=name,
                                layer=layer,
                                head=head,
                                step=word.step,
                                key_modality="image",
                            )
                        )
                        for head in range(6)
                    ]
                    assert one[key].sel(layer=layer).item() == pytest.approx(np.mean(heads))
                weights = recording["image_score"].values[index, word.step, layer]
                if word.region:
                    inside = sum(weights[token] for token in word.region)
                    share = inside / sum(weights)
                    assert one["region_share"].sel(layer=layer).item() == pytest.approx(share)
                    assert one["region_lift"].sel(layer=layer).item() == pytest.approx(
                        share * 144 / len(word.region)
                    )
            row += 1
    assert row == table.sizes["word"]
    assert row > 40


def test_noise_makes_words_wrong_and_none_leaves_pictures_alone(recording: Recording) -> None:
    right = comparable(word_table(recording))["right"].values
    assert 0 < right.mean() < 1
    assert [one.images for one in noisy(SCENES, 0)] == [one.images for one in SCENES]
    one, other = (noisy(SCENES[:2], 0.1, seed)[1].images[0] for seed in (0, 1))
    assert np.array_equal(one, noisy(SCENES[:2], 0.1)[1].images[0])
    assert not np.array_equal(one, other)
    spread = (one.astype(float) - SCENES[1].images[0])[SCENES[1].images[0] == 128]
    assert spread.size == 0 or abs(spread.std() / 255 - 0.1) < 0.05
    with pytest.raises(InputError, match="noise -1"):
        noisy(SCENES, -1)


def table_of(wrong: np.ndarray, lift: np.ndarray) -> xr.Dataset:
    """Two words of each of many samples in two layers, with a given lift."""
    count = wrong.size
    by_layer = np.stack([lift, lift], 1)
    words = np.full(count, "colour", object)
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "sample": ("word", np.array([f"s{i // 2}" for i in range(count)], object)),
            "task": ("word", np.full(count, "what", object)),
            "step": ("word", np.arange(count) % 20),
            "text": ("word", words),
            "truth": ("word", words),
            "kind": ("word", words),
            "right": ("word", 1.0 - wrong),
            "surprise": ("word", rng.random(count)),
            "image_mass": (("word", "layer"), rng.random((count, 2))),
            "image_entropy": (("word", "layer"), rng.random((count, 2))),
            "region_share": (("word", "layer"), by_layer / 10),
            "region_lift": (("word", "layer"), by_layer),
        },
        {"layer": [0, 1]},
        {"model": "made-up", "model_revision": "1", "noise": 0.15},
    )


def test_words_are_compared_within_their_kind() -> None:
    """Wrong words are numbers, right ones articles and numbers that are attended to as little."""
    table = table_of(np.array([1, 0, 0] * 40) == 1, np.array([1.0, 1.0, 9.0] * 40))
    table["kind"].values[2::3] = FILLER
    lift = next(signal for signal in SIGNALS if signal.name == "region_lift")
    assert error_auroc(table, lift).mean == 0.5
    table["kind"].values[2::3] = "size"
    assert error_auroc(table, lift).mean == 0.5
    assert error_auroc(table, lift, within=False).mean == 0.75
    assert error_auroc(table, lift, 0).mean == 0.5


def test_the_figure_judges_by_the_interval_and_stays_undecided_where_few_are_wrong() -> None:
    rng = np.random.default_rng(1)
    wrong = rng.random(200) < 0.3
    table = table_of(wrong, np.where(wrong, 1.0, 3.0) + rng.normal(size=200))
    run = Run(made.recording(), further={"errors": table})
    section = fig_errors.section(run)
    verdicts = [finding.verdict for finding in section.findings]
    assert verdicts == [Verdict.UNDECIDED, Verdict.SUPPORTED]
    assert f"{int(wrong.sum())} of 200 words are wrong" in section.figure.caption.what
    curve = section.figure.panels[2]
    assert curve.lines[0].y[0] == pytest.approx(3.0, abs=0.4)  # type: ignore[union-attr]
    assert curve.lines[1].y[0] == pytest.approx(1.0, abs=0.6)  # type: ignore[union-attr]
    few = table_of(np.arange(200) < 4, rng.random(200))
    for finding in fig_errors.findings(few):
        assert finding.verdict is Verdict.UNDECIDED
    right = table_of(np.zeros(200) == 1, rng.random(200))
    with pytest.raises(NotMeasured, match="all 200 words that could be judged are right"):
        fig_errors.section(Run(made.recording(), further={"errors": right}))


def test_a_recording_made_before_is_judged_itself_and_one_that_cannot_be_says_so() -> None:
    with pytest.raises(NotMeasured, match="no sample of this recording knows"):
        fig_errors.section(Run(made.recording()))


def test_the_command_prints_areas_and_its_file_is_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.nc"
    arguments = ["errors", "--scenes", "1", "--task", "ocr", "--task", "what", "--noise", "0.2"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--out", str(out)])
    assert not done.value.code
    assert "attention on the picture" in capsys.readouterr().out
    table = load_word_errors(out)
    assert table.attrs["noise"] == 0.2
    again = load_word_errors(save_word_errors(table, tmp_path / "again.nc"))
    xr.testing.assert_identical(again, table)
    with pytest.raises(InputError, match="not a file that avl errors"):
        load_word_errors(_other(tmp_path / "other.nc"))


def _other(path: Path) -> Path:
    from avl_analysis.heads.knockout import save_knockout

    return save_knockout(made.knockout(), path)


def test_questions_without_answers_are_refused() -> None:
    with pytest.raises(InputError, match="each with its right answer"):
        word_errors(shared.vlm(), [Sample("a", (tiny.picture(),), "what?")])


def test_a_tiny_qwen_folder_is_measured(tmp_path: Path) -> None:
    vlm = load_model(save_folder(tmp_path / "qwen", "qwen2_5_vl"))
    table = word_errors(vlm, scene_samples(1, ["colour", "ocr"]), max_new_tokens=4)
    assert table.sizes["word"] > 0
    assert bool(np.isfinite(table["image_mass"]).all())
    assert bool((table["right"].values != 1).any())
