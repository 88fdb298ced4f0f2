"""The command line: what it prints, and that every mistake is one clear line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import xarray as xr

from avl.policies.registry import PRESETS, policies
from avl_analysis.cli.main import main
from avl_analysis.cli.options import parse_numbers
from avl_analysis.errors import InputError
from avl_analysis.evaluation.comparison import load_comparison
from avl_analysis.evaluation.policy_files import load_evidence
from avl_analysis.recordings.recording import load_recording
from avl_analysis.scenes import generate
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2))


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text_only(tmp_path_factory.mktemp("text"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    tiny.picture().save(path)
    return path


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line printed for arguments that must be refused."""
    code = _run(*arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("avl: error: ")
    return lines[0]


def test_the_installed_script_answers_from_any_directory(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("avl")
    done = subprocess.run(
        [script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "models" in done.stdout


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run() == 0
    assert "Usage: avl" in capsys.readouterr().out


def test_models_prints_what_a_saved_model_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("models", folder) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert " llava 0.1 M 2 4 / 2 KV 16 yes " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modles"], "No such command 'modles'"),
        (["models", "--colour"], "No such option: --colour"),
        (["ablate", "--kind", "blind"], "unknown kind of heads 'blind': choose one of visual"),
        (["ablate", "--out", "a.nc"], "must end in .json"),
        (["models", "gizmo"], "unknown model 'gizmo': possible: 'scenes'"),
        (["models", "org/gizmo"], "--download"),
        (["models", "./gizmo"], "no such model folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in _refused(capsys, *arguments)


@pytest.fixture(scope="module")
def recorded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "scenes.nc"
    assert (
        _run("record", "--scenes", 3, "--model", folder, "--out", out, "--max-new-tokens", 3) == 0
    )
    return out


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    path = tmp_path / "weather.nc"
    xr.Dataset({"rain": ("day", [1.0, 2.0])}).to_netcdf(path, engine="h5netcdf")
    return path


def test_record_asks_a_saved_model_about_a_picture_and_saves_what_it_attended(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.nc"
    arguments = [
        "record",
        picture,
        "what is this?",
        "--model",
        folder,
        "--out",
        out,
        "--max-new-tokens",
        4,
    ]
    assert _run(*arguments, "--layers", "1") == 0
    recording = load_recording(out)
    assert len(recording) == 1
    assert recording["modality_mass"].sizes["head"] == 4
    assert recording["modality_mass"]["layer"].values.tolist() == [1]
    assert recording["modality_mass"].sizes["step"] == 4
    facts = recording.facts(0)
    assert facts["prompt"] == "what is this?"
    assert facts["picture"].startswith("data:image/png;base64,")
    assert facts["answer"] in capsys.readouterr().out
    assert recording.attrs["model"] == str(folder)
    assert recording.attrs["model_revision"].startswith("sha256:")


def test_record_keeps_raw_attention_of_the_heads_and_rows_asked_for(
    folder: Path, picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.nc"
    arguments = ["record", picture, "what?", "--model", folder, "--out", out, "--max-new-tokens", 3]
    assert _run(*arguments, "--keep-attention", "--heads", "0,3", "--queries", "last") == 0
    weights = load_recording(out)["attention"]
    assert weights["head"].values.tolist() == [0, 3]
    assert weights.sizes["query"] == 1
    assert float(abs(weights.sum("position") - 1).max()) < 1e-5


def test_record_about_drawn_scenes_keeps_their_truth(recorded: Path) -> None:
    recording = load_recording(recorded)
    assert len(recording) == 3
    for index in range(3):
        facts = recording.facts(index)
        truth = generate(**facts["scene"])
        assert (facts["prompt"], facts["truth"]) == (truth.prompt, truth.answer)
        assert "picture" not in facts


def test_record_replaces_a_file_only_when_told_to(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.nc"
    out.write_text("precious")
    arguments = [
        "record",
        picture,
        "what?",
        "--model",
        folder,
        "--out",
        out,
        "--max-new-tokens",
        "1",
    ]
    assert "exists already" in _refused(capsys, *arguments)
    assert out.read_text() == "precious"
    assert _run(*arguments, "--force") == 0
    assert len(load_recording(out)) == 1


def test_stats_prints_every_layer_and_no_interval_of_three_samples(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("stats", recorded, "modality_mass") == 0
    out = capsys.readouterr().out
    assert "3 sample(s)" in out
    assert "modality_mass: " in out
    rows = [line.split() for line in out.splitlines() if line[:1] in ("0", "1")]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(len(row) == 4 for row in rows)
    assert "[" not in "".join(line for line in out.splitlines() if line[:1] in ("0", "1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["record", "--scenes", 1, "--out", "run.zarr"], "writes one netCDF file"),
        (["record"], "nothing to record: pass a picture and a question"),
        (["record", "PICTURE"], "a picture without a question"),
        (["record", "what is this?"], "a prompt without an image"),
        (["record", "no.png", "what?", "--model", "FOLDER"], "no such file: no.png"),
        (["record", __file__, "what?", "--model", "FOLDER"], "is not an image this program reads"),
        (["record", "PICTURE", "  ", "--model", "FOLDER"], "the prompt is empty"),
        (["record", "PICTURE", "what?", "--model", "TEXT"], "text-only model"),
        (["record", "PICTURE", "what?", "--model", "gizmo"], "unknown model 'gizmo'"),
        (
            ["record", "PICTURE", "what?", "--model", "FOLDER", "--layers", "0,7"],
            "this model has layers 0 to 1",
        ),
        (
            ["record", "PICTURE", "what?", "--model", "FOLDER", "--layers", "two"],
            "write it like 0,4-7",
        ),
        (
            ["record", "PICTURE", "what?", "--model", "FOLDER", "--statistics", "luck"],
            "no statistic 'luck'",
        ),
        (
            ["record", "PICTURE", "what?", "--model", "FOLDER", "--dtype", "float7"],
            "unknown dtype 'float7'",
        ),
        (
            ["record", "PICTURE", "what?", "--model", "FOLDER", "--keep-attention", "--heads", "9"],
            "heads 0 to 3",
        ),
        (
            [
                "record",
                "PICTURE",
                "what?",
                "--model",
                "FOLDER",
                "--keep-attention",
                "--queries",
                "odd",
            ],
            "odd",
        ),
        (["record", "PICTURE", "what?", "--heads", "1"], "with --keep-attention only"),
        (["record", "PICTURE", "what?", "--out", "no/folder/run.nc"], "no such folder: no/folder"),
        (["record", "PICTURE", "what?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["record", "--scenes", "-3"], "--scenes -3"),
        (["record", "--scenes", "3", "--task", "poetry"], "unknown task 'poetry'"),
        (["record", "--scenes", "3", "PICTURE", "what?"], "brings its own pictures"),
        (["record", "--task", "colour", "PICTURE", "what?"], "add --scenes"),
        (["stats", "no.nc"], "there is no recording file no.nc"),
        (["stats", __file__], "not a recording"),
        (["stats", "FOREIGN"], "a netCDF file but not a recording"),
        (["stats", "RECORDED", "luck"], "holds no 'luck'; it holds"),
        (["stats"], "name a recording, as avl record wrote it"),
    ],
)
def test_what_cannot_be_recorded_or_read_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    arguments: list[str],
    message: str,
) -> None:
    fixtures = {
        "PICTURE": "picture",
        "FOLDER": "folder",
        "TEXT": "text_only",
        "RECORDED": "recorded",
        "FOREIGN": "foreign",
    }
    given = [
        request.getfixturevalue(fixtures[word]) if word in fixtures else word for word in arguments
    ]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert message in _refused(capsys, *given)
    assert not (tmp_path / "run.nc").exists()


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", [0]), ("0,4-7", [0, 4, 5, 6, 7]), ("3-3, 1", [3, 1])]
)
def test_lists_of_layers_are_written_with_commas_and_dashes(text: str, numbers: list[int]) -> None:
    assert parse_numbers(text, "--layers") == numbers


@pytest.mark.parametrize("text", ["", "1,", "-1", "7-4", "a"])
def test_other_lists_of_layers_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="write it like 0,4-7"):
        parse_numbers(text, "--layers")


def test_models_refuses_a_text_only_model(
    text_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "text-only model" in _refused(capsys, "models", text_only)


def test_a_defect_is_not_dressed_up_as_a_mistake(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("avl_analysis.models.inventory.inspect_model", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["models", str(folder)])


def test_an_interrupt_is_reported_in_one_line_with_its_own_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("avl_analysis.models.inventory.inspect_model", interrupted)
    assert _run("models", folder) == 130
    assert capsys.readouterr().err == "avl: interrupted\n"


@pytest.fixture
def questions(tmp_path: Path, picture: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [
        {"image": picture.name, "prompt": prompt, "answer": "red"}
        for prompt in ("what is this?", "the colour?")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_compare_measures_policies_on_a_file_of_questions_against_the_full_cache(
    folder: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.nc"
    policies = ["-p", "full", "-p", "random:0.5", "-p", "a-vl,core=0.2"]
    arguments = [
        "compare",
        questions,
        *policies,
        "--model",
        folder,
        "--max-new-tokens",
        3,
        "--out",
        out,
    ]
    assert _run(*arguments) == 0
    comparison = load_comparison(out)
    assert comparison.policies == ["full", "random:0.5", "a-vl,core=0.2"]
    assert comparison["kl"].sizes["sample"] == 2
    assert float(comparison["kl"].sel(policy="full").max()) < 1e-5
    printed = capsys.readouterr().out
    assert "random:0.5" in printed
    assert "kl: KL(full || policy)" in printed


def test_compare_lists_every_policy_that_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("compare", "--policies") == 0
    listed = {line.split(" ", 1)[0] for line in capsys.readouterr().out.splitlines()}
    assert {*policies(), *PRESETS} <= listed


def test_compare_writes_its_tables_where_asked(
    folder: Path, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "compare.csv"
    arguments = ["compare", questions, "-p", "full", "--metric", "accuracy", "--model", folder]
    assert _run(*arguments, "--max-new-tokens", 2, "--out", out) == 0
    assert out.read_text().startswith("policy,metric,mean,low,high")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "luck"], "unknown policy 'luck': choose from full, a-vl"),
        (["-p", "a-vl:2"], "budget"),
        (["-p", "h2o:0.5", "-p", "h2o:0.5"], "named twice"),
        (["-p", "a-vl,speed=3"], "has no setting 'speed'"),
        (["-p", "tuned.json"], "no policy file tuned.json"),
        (["--out", "result.txt"], "must end in .nc"),
        (["--task", "poetry"], "unknown task 'poetry'"),
        (["nothing.jsonl"], "no such file: nothing.jsonl"),
        (["QUESTIONS", "--task", "colour"], "leave one out"),
        (["QUESTIONS", "--model", "FOLDER", "--metric", "beauty"], "beauty"),
        (["QUESTIONS", "--model", "TEXT"], "text-only"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    arguments: list[str],
    message: str,
) -> None:
    fixtures = {"FOLDER": "folder", "TEXT": "text_only", "QUESTIONS": "questions"}
    given = [
        request.getfixturevalue(fixtures[word]) if word in fixtures else word for word in arguments
    ]
    monkeypatch.chdir(tmp_path)
    assert message in _refused(capsys, "compare", *given)


def test_calibrate_writes_a_policy_that_compare_takes(
    folder: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned.json"
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    images = [questions.parent / (line.get("image") or line["images"][0]) for line in lines]
    asked = [
        {"image": str(images[i % len(images)]), "prompt": "what is red" + i * " red"}
        for i in range(9)
    ]
    questions.write_text("\n".join(map(json.dumps, asked)))
    arguments = [
        "calibrate",
        questions,
        "--model",
        folder,
        "--target",
        0.5,
        "--max-new-tokens",
        4,
        "--out",
        out,
    ]
    assert _run(*arguments) == 0
    told = capsys.readouterr().out
    assert "secondary = " in told
    assert "chosen by 6 questions; verified with 3 questions" in told
    assert "by the bounds of these intervals: undecided" in told
    assert "warning: only 6 samples tell about decoding" in told
    assert load_evidence(out)["target"] == 0.5
    assert (
        _run(
            "compare",
            questions,
            "-p",
            out,
            "--model",
            folder,
            "--metric",
            "text",
            "--max-new-tokens",
            2,
        )
        == 0
    )
    told = capsys.readouterr()
    assert "tuned" in told.out
    assert "asked: 9 questions" in told.out
    assert "tuned.json was calibrated with 9 of these 9 questions" in told.err


def test_calibrate_suggests_a_comparison_on_scenes_it_has_not_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way on the embedded model, as a user goes it: calibrate, then compare as told."""
    out = tmp_path / "tuned.json"
    arguments = ["--scenes", "6", "--task", "ocr", "--task", "text_colour", "--target", "0.6"]
    assert _run("calibrate", *arguments, "--out", out, "--max-new-tokens", 8) == 0
    told = capsys.readouterr().out
    assert "(split calibration); verified with 4 questions (split verification)" in told
    command = told.split("with: avl ")[1].split()
    shown = ["--scenes", "2", "--task", "ocr", "--metric", "accuracy"]
    assert _run(*command, *shown, "--max-new-tokens", 8) == 0
    told = capsys.readouterr()
    assert "asked: 2 questions (split comparison)" in told.out
    assert "was calibrated with" not in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "policy.txt"], "must end in .json"),
        (["--target", "1.5"], "--target 1.5: choose a share"),
        (["nothing.jsonl"], "no such file: nothing.jsonl"),
        (["--task", "poetry"], "unknown task 'poetry'"),
        (["ONE", "--model", "FOLDER"], "pass more samples"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    picture: Path,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"image": picture.name, "prompt": "what?"}))
    monkeypatch.chdir(tmp_path)
    given = [{"FOLDER": folder, "ONE": "one.jsonl"}.get(word, word) for word in arguments]
    assert message in _refused(capsys, "calibrate", *given)
