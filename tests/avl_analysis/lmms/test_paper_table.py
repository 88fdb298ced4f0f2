"""Results of avl eval beside a paper's numbers, which need a source or are not entered."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from avl_analysis.errors import InputError
from avl_analysis.lmms import paper_table

SHIPPED = Path(__file__).parents[3] / "docs" / "howto" / "a-vl-paper.json"


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A folder as avl eval leaves it, with two results of the policy, the newer one last."""
    for policy, value in (("none", 1.0), ("a-vl", 0.25), ("a-vl", 0.5)):
        folder = tmp_path / "eval" / policy / "model"
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "results": {"mme": {"score,none": value, "alias": "mme"}},
            "throughput": {"avg_avl_questions": 4.0, "avg_avl_kv_bytes_share": value / 2},
        }
        (folder / f"{value}_results.json").write_text(json.dumps(content))
    return tmp_path / "eval"


def _paper(path: Path, scores: dict[str, dict[str, float]], source: str = "Table 2") -> Path:
    path.write_text(json.dumps({"source": source, "scores": scores}))
    return path


def test_entered_numbers_stand_beside_the_measured_ones_and_others_are_not_entered(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = _paper(tmp_path / "paper.json", {"a-vl": {"mme score": 0.75}})
    paper_table.main([str(measured), "--paper", str(paper)])
    said = capsys.readouterr().out
    assert "paper: Table 2" in said
    table = pd.read_csv(measured / "paper-table.csv", index_col="policy")
    assert list(table.columns[:2]) == ["mme score", "mme score in the paper"]
    assert table.loc["a-vl", "mme score"] == 0.5
    assert table.loc["a-vl", "mme score kept"] == 0.5
    assert float(table.loc["a-vl", "mme score in the paper"]) == 0.75
    assert table.loc["none", "mme score in the paper"] == "not entered"


def test_the_shipped_file_holds_no_number(measured: Path) -> None:
    paper = paper_table.read_paper(SHIPPED)
    assert not any(paper.scores.values())
    frame = paper_table.beside_paper(
        paper_table.table(paper_table.result_files(measured), reference="none"), paper
    )
    assert set(frame["mme score in the paper"]) == {"not entered"}


def test_mistakes_are_one_line_with_the_next_step(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(measured), "--paper", str(tmp_path / "no.json")], "a-vl-paper.json is an empty one"),
        ([str(tmp_path / "no"), "--paper", str(SHIPPED)], "run avl eval with --out"),
        (
            [str(measured), "--paper", str(_paper(tmp_path / "a.json", {"h2o": {}}))],
            "the paper's numbers name 'h2o', which was not measured",
        ),
        (
            [str(measured), "--paper", str(_paper(tmp_path / "b.json", {"a-vl": {"pope f1": 1}}))],
            "name 'pope f1', which was not measured",
        ),
    ):
        with pytest.raises(SystemExit) as done:
            paper_table.main(arguments)
        assert done.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="numbers without a source"):
        paper_table.read_paper(_paper(tmp_path / "c.json", {"a-vl": {"mme score": 1}}, ""))
