"""Processors of real families, from tiny folders: what loads without torchvision, and what is said
where a package is missing.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest

from avl_analysis.errors import InputError
from avl_analysis.models import processors
from avl_analysis.models.checkpoint import one_line
from avl_analysis.models.loading import load_model
from tests import tiny
from tests.avl_analysis.models import folders

WITH_VIDEO = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "smolvlm",
    "llava_next_video",
    "llava_onevision",
)
TORCHVISION = importlib.util.find_spec("torchvision") is not None
without_torchvision = pytest.mark.skipif(TORCHVISION, reason="torchvision is installed")


@pytest.mark.parametrize("model_type", [*WITH_VIDEO, "llava_next"])
def test_a_family_loads_and_answers_about_an_image_with_or_without_torchvision(
    model_type: str, tmp_path: Path
) -> None:
    vlm = load_model(folders.save_folder(tmp_path, model_type))
    assert type(vlm.processor).__name__ == folders.KINDS[model_type].processor
    assert type(vlm.processor.image_processor).__name__.endswith("Pil")
    inputs = vlm.prepare(tiny.picture((60, 30)), "what is red?")
    assert "pixel_values" in inputs
    alone = vlm.answer(tiny.picture((60, 30)), "what is red?", max_new_tokens=3)
    together = vlm.answer(
        [tiny.picture((60, 30)), tiny.picture((30, 44), seed=1)],
        ["what is red?", "where?"],
        max_new_tokens=3,
    )
    assert together[0] == alone


def test_a_folder_that_has_only_the_image_part_of_its_processor_loads(tmp_path: Path) -> None:
    vlm = load_model(folders.save_folder(tmp_path, "qwen2_vl", video=False))
    assert vlm.answer(tiny.picture(), "what?", max_new_tokens=2) is not None


def test_a_processor_with_a_video_part_of_ours_is_saved_and_read_again(tmp_path: Path) -> None:
    vlm = load_model(folders.save_folder(tmp_path / "first", "smolvlm"))
    kept = copy.deepcopy(vlm.processor)
    kept.save_pretrained(tmp_path / "first")
    again = load_model(tmp_path / "first")
    assert dict(again.processor.video_processor) == dict(vlm.processor.video_processor)
    prompts = [v.prepare(tiny.picture(), "what?")["input_ids"].tolist() for v in (vlm, again)]
    assert prompts[0] == prompts[1]


@without_torchvision
def test_a_processor_that_needs_torchvision_itself_says_so_and_how_to_get_it(
    tmp_path: Path,
) -> None:
    folders.save_folder(tmp_path, "mistral3")
    with pytest.raises(InputError) as refused:
        load_model(tmp_path)
    assert str(refused.value) == (
        f"the processor of {tmp_path} needs torchvision, which is not installed:"
        " pip install 'avl-analysis[vlm]'"
    )


def test_a_missing_num2words_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.save_folder(tmp_path, "smolvlm")
    from transformers.models.smolvlm import processing_smolvlm

    found = importlib.util.find_spec
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "num2words" else found(name)
    )
    with pytest.raises(InputError, match=r"needs num2words.*pip install 'avl-analysis\[vlm\]'"):
        load_model(tmp_path)


def test_the_extra_holds_every_package_that_messages_name() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert f"{project['name']}[vlm]" in processors.EXTRA
    names = [line.partition(">")[0] for line in project["optional-dependencies"]["vlm"]]
    assert sorted(names) == sorted(processors.PACKAGES)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "\nA class needs a library\nthat is not here.\n",
            "A class needs a library that is not here",
        ),
        ("", "ValueError"),
        ("First. Second one. " + "x" * 400, "First. Second one"),
        ("word " * 200, "word " * 64 + "..."),
    ],
)
def test_a_message_is_never_cut_in_the_middle_of_a_sentence_unless_it_says_so(
    text: str, line: str
) -> None:
    assert one_line(ValueError(text)) == line
