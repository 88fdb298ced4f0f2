"""The Python that the pages show gives the very figures and numbers that they show."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from PIL import Image
from streamlit.testing.v1 import AppTest

from avl_analysis.cli.main import main
from avl_analysis.evaluation.frontier import write as write_frontier
from avl_analysis.figures.spec import Figure, rows
from avl_app import page as parts
from avl_app.examples import moving_scene
from avl_reports.further import KINDS
from tests.app.pages import ONE_WORD, errors, page
from tests.reports import made

VIDEO = {"source": "video", "clip": "3", "task": "own question", "longest": "3"}
"""The address of a drawn video."""

PAIRS: list[tuple[Figure | None, str]] = []
"""Figure and code that the pages have offered since the last test began."""


@pytest.fixture(autouse=True)
def offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    PAIRS.clear()
    keep = parts.keep

    def noted(figure: Figure | None, code: str, key: str) -> None:
        PAIRS.append((figure, code))
        keep(figure, code, key)

    names = (
        "ask",
        "heads",
        "knockout",
        "maps",
        "patterns",
        "live",
        "benchmark",
        "tokens",
        "report",
    )
    for view in (*names, "tokens", "report"):
        monkeypatch.setattr(f"avl_app.views.{view}.keep", noted)
    monkeypatch.chdir(tmp_path)  # where the code saves


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "shown code", "exec"), names)
    return names


def same(one: Figure, other: Figure) -> bool:
    """Whether two figures show the same numbers in the same places."""
    left, right = rows(one), rows(other)
    assert len(left) == len(right) > 0
    for row, twin in zip(left, right, strict=True):
        for key in ("x", "y", "value"):
            a, b = row[key], twin[key]
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(float(a), float(b), atol=1e-6)
        assert row["series"] == twin["series"]
    return True


def check(test: AppTest, count: int) -> None:
    assert errors(test) == []
    assert len(PAIRS) == count
    for figure, code in PAIRS:
        assert figure is not None
        assert same(figure, run(code)["plot"].figure)


def test_ask_gives_the_code_of_its_figure_and_of_its_animation() -> None:
    test = page(
        **ONE_WORD,
        **{"token": "0", "layer": "3", "head": "2", "over_answer": "1"},
        **{"readers": "1", "patches": "3,40", "words": "1", "rollout": "1", "lens": "1"},
    )
    check(test, 7)


def test_an_answer_that_is_drawn_comes_again_from_the_code() -> None:
    test = page(**ONE_WORD, token="0", temperature="2", seed="7", system="Answer in one word.")
    check(test, 2)
    assert all("seed=7" in code and "Answer in one word." in code for _, code in PAIRS)


def test_ask_gives_the_code_of_its_relevance_maps() -> None:
    check(page(**ONE_WORD, token="0", layer="3", head="2", map="gradient"), 2)


def test_a_video_is_shown_frame_by_frame_with_a_strip_over_time_and_their_code() -> None:
    test = page(**VIDEO, prompt="Where is the picture?")
    check(test, 2)
    figures = [figure for figure, _ in PAIRS if figure is not None and figure.name == "video"]
    scene = moving_scene(3)
    *overlays, strip = figures[0].panels
    assert all(np.array_equal(o.picture, f) for o, f in zip(overlays, scene.frames, strict=True))
    assert strip.values.shape[1] == len(scene.frames)
    step = int(test.session_state["token"])
    shares = [float(panel.title.split(", ")[1].rstrip("%")) / 100 for panel in overlays]
    np.testing.assert_allclose(strip.values[step], shares, atol=6e-4)


def test_the_other_views_show_a_video_by_its_first_frame() -> None:
    for view in ("heads", "live"):
        test = page(view=view, prompt="Where is the picture?", layer="1", head="1", **VIDEO)
        assert not errors(test)
        assert any("first frame of the video" in one.value.lower() for one in test.caption)


def test_ask_gives_the_code_of_the_words_of_patches() -> None:
    check(page(**ONE_WORD, token="0", layer="3", patch_words="1", depth="2"), 3)


def test_heads_give_the_code_of_the_map_and_of_the_grid_of_heads() -> None:
    check(page(view="heads", **ONE_WORD, layer="2", head="1", all_heads="1"), 3)


def test_what_was_cut_comes_with_its_code() -> None:
    test = page(view="heads", **ONE_WORD, cut="1")
    next(b for b in test.button if b.label == "Cut").click().run()
    check_last(test, "knockout")


def check_last(test: AppTest, name: str) -> None:
    """The last figure offered has this name, and its code gives it."""
    assert errors(test) == []
    figure, code = PAIRS[-1]
    assert figure is not None
    assert figure.name == name
    assert same(figure, run(code)["plot"].figure)


def test_patterns_give_the_code_of_every_figure() -> None:
    check(page(view="patterns", **ONE_WORD, pattern="modality"), 1)


@pytest.mark.parametrize("name", ["ablation", "frontier", *KINDS])
def test_patterns_that_need_a_file_take_it_and_name_it_in_the_code(
    name: str, tmp_path: Path
) -> None:
    figure = KINDS[name].figure if name in KINDS else name
    file = tmp_path / f"my {name}.{ENDINGS.get(name, 'nc')}"
    measure(name, file)
    test = page(view="patterns", **ONE_WORD, pattern=figure)
    uploader = test.file_uploader(key=f"{figure}_file")
    uploader.set_value((file.name, file.read_bytes(), "application/octet-stream")).run()
    check_last(test, figure)
    assert file.name in PAIRS[-1][1]
    PAIRS.clear()
    test.segmented_control(key="view").set_value("report").run()
    assert errors(test) == []
    # the report itself is built in other tests; here only its code is read
    compile(PAIRS[-1][1], "shown code", "exec")
    assert file.name in PAIRS[-1][1]


ENDINGS = {"ablation": "json", "frontier": "jsonl"}


def measure(name: str, path: Path) -> None:
    """Write a small file of this kind, of the model that the page shows."""
    if name == "ablation":
        replace(made.ablation(), model="scenes").save(path)
    elif name == "frontier":
        held = made.frontier()
        write_frontier(path, [dict(line) for line in held.lines], held.about)
    elif name in ("knockout", "sinks"):
        numbers = {"knockout": made.knockout, "sinks": made.sinks}[name]()
        KINDS[name].write(numbers.assign_attrs(model="scenes", model_revision=""), path)
    else:
        command = KINDS[name].command.split()[1]
        # Longer answers about noisy pictures have right and wrong words.
        task = "ocr" if name == "errors" else "colour"
        with pytest.raises(SystemExit) as done:
            main([command, "--scenes", "2", "--task", task, "--out", str(path)])
        assert not done.value.code


def test_an_own_picture_is_named_in_the_code(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(file, "PNG")
    Path("mine.png").write_bytes(file.getvalue())
    test = page(source="upload", task="own question", longest="3")
    test.file_uploader(key="file").set_value(("mine.png", file.getvalue(), "image/png")).run()
    check(test, 2)


def test_a_vl_live_gives_code_that_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    test = page(view="live", **ONE_WORD, rivals="h2o")
    assert errors(test) == []
    table = test.dataframe[0].value
    ((_, code),) = PAIRS
    capsys.readouterr()
    run(code)
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    shares = [float(line[-3]) for line in printed]
    assert shares == pytest.approx(list(table["of full cache"]), abs=1e-6)


def test_benchmark_gives_code_that_compares_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    test = page(view="benchmark", tasks="colour", count="2", bench_policies="paper", longest="6")
    next(b for b in test.button if b.label == "Compare").click().run()
    assert errors(test) == []
    result = run(PAIRS[-1][1])["result"]
    shown = test.session_state["comparison"]
    assert result.policies == shown.policies
    for policy in shown.policies:
        assert result.mean("kv_filled_share", policy).mean == pytest.approx(
            shown.mean("kv_filled_share", policy).mean
        )


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf", "csv"])
def test_a_figure_is_written_as_every_kind_of_file(suffix: str) -> None:
    page(**ONE_WORD, token="0")
    figure = PAIRS[0][0]
    assert figure is not None
    starts = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF", "csv": b"panel,"}
    assert parts._written(figure, suffix).startswith(starts[suffix])
