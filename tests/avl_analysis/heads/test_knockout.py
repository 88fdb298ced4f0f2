"""Cutting attention is exact against masking by hand in eager attention, and says what it cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avl_analysis import scene_samples
from avl_analysis.cli.main import main
from avl_analysis.errors import InputError
from avl_analysis.heads.knockout import (
    GROUPS,
    knocked_out,
    knockout,
    load_knockout,
    save_knockout,
)
from avl_analysis.plots import plot_knockout
from tests import tiny
from tests.avl_analysis import shared
from tests.avl_analysis.recorded import CASES

STEPS = 3


def groups_of(model: Any, inputs: dict[str, Tensor]) -> list[list[str]]:
    """Group of every position of every row of a prompt, spelled out; "" for padding."""
    image = model.config.image_token_id
    found = []
    for ids, mask in zip(
        inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True
    ):
        kinds = []
        seen = image not in ids
        for token, real in zip(ids, mask, strict=True):
            seen = seen or token == image
            kind = "image" if token == image else "question" if seen else "system"
            kinds.append(kind if real else "")
        kinds[-1] = "last"  # rows are padded on the left
        found.append(kinds)
    return found


@contextmanager
def cut_by_hand(
    model: Any, groups: list[list[str]], source: str, target: str, layers: Sequence[int]
) -> Iterator[None]:
    """Adds the lowest number to the mask of eager attention, one pair of positions at a time."""

    def change(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
        hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
        batch, rows, _ = hidden.shape
        lowest = torch.finfo(hidden.dtype).min
        mask = options.get("attention_mask")
        cache = options["past_key_values"]
        start = cache.get_seq_length(module.layer_idx)
        keys = start + rows
        mask = torch.zeros(batch, 1, rows, keys) if mask is None else mask.clone()
        mask = mask.expand(batch, 1, rows, keys).clone()
        for b in range(batch):
            kinds = groups[b] + ["answer"] * (keys - len(groups[b]))
            for row in range(rows):
                for key in range(keys):
                    hit = kinds[start + row] == target or (target == "all" and kinds[start + row])
                    if hit and kinds[key] == source and key != start + row:
                        mask[b, 0, row, key] = lowest
        return arguments, {**options, "attention_mask": mask}

    handles = [
        model.get_decoder()
        .layers[layer]
        .self_attn.register_forward_pre_hook(change, with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(steps, batch, vocabulary) of a greedy generation along fixed tokens."""
    output = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    return torch.stack(output.logits)


@pytest.mark.parametrize("case", ["left-padded batch", "several pictures", "pictures in some rows"])
@pytest.mark.parametrize(
    ("source", "target"),
    [("image", "question"), ("image", "last"), ("question", "answer"), ("system", "all")],
)
def test_a_cut_equals_masking_by_hand(case: str, source: str, target: str) -> None:
    sdpa, eager = tiny.llava(kv_heads=2), tiny.llava(kv_heads=2, attn="eager")
    inputs = tiny.inputs(sdpa, **CASES[case])
    plain = logits(sdpa, inputs)
    layers = [0]  # in the last layer a cut of question rows reaches no logits
    with cut_by_hand(eager, groups_of(eager, inputs), source, target, layers):
        expected = logits(eager, inputs)
    for model in (sdpa, eager):
        with knocked_out(model, source, target, layers=layers):
            found = logits(model, inputs)
        same = (found.argmax(-1) == expected.argmax(-1)).all(0)  # led along the same tokens
        assert bool(same.any())
        torch.testing.assert_close(found[:, same], expected[:, same], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_no_layer_and_no_head_cut_changes_nothing_and_the_model_is_restored() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, **CASES["one picture"])
    plain = logits(model, inputs)
    with knocked_out(model, "image", "all", layers=[]):
        assert torch.equal(logits(model, inputs), plain)
    with knocked_out(model, "image", "all", heads=[]):
        torch.testing.assert_close(logits(model, inputs), plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, inputs), plain)


def test_one_head_alone_is_cut() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, **CASES["one picture"])
    results = []
    for heads in ([0], [1], None):
        with knocked_out(model, "image", "all", layers=[1], heads=heads):
            results.append(logits(model, inputs))
    assert not any(torch.allclose(a, b) for a, b in pairwise(results))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("picture", "last"), {}, "sources are system, image, question, last, answer"),
        (("image", "last"), {"layers": [9]}, "there is no layer 9: this model has 0 to 1"),
        (("image", "last"), {"heads": [9]}, "there is no head 9"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    arguments: tuple[str, str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message), knocked_out(tiny.llava(), *arguments, **options):
        pass


def test_a_run_gives_every_flow_and_window_and_is_saved_and_drawn(tmp_path: Path) -> None:
    vlm = shared.vlm()
    samples = scene_samples(3, ["colour"])
    flows = [("image", "last"), ("answer", "answer")]
    result = knockout(vlm, samples, flows, window=2, max_new_tokens=4, batch_size=2)
    assert result["log_prob_change"].dims == ("flow", "layer", "sample")
    assert result.sizes["layer"] == vlm.model.config.text_config.num_hidden_layers - 1
    assert bool(np.isfinite(result["log_prob_change"]).all())
    alone = knockout(vlm, samples[:1], flows, window=2, max_new_tokens=4)
    np.testing.assert_allclose(
        alone["log_prob_change"][..., 0], result["log_prob_change"][..., 0], atol=1e-4
    )
    again = load_knockout(save_knockout(result, tmp_path / "k.nc"))
    np.testing.assert_array_equal(again["same_answer"], result["same_answer"])
    (panel,) = plot_knockout(again).figure.panels
    means = result["log_prob_change"].mean("sample")
    np.testing.assert_allclose(panel.lines[0].y, means.sel(flow="image -> last"), rtol=1e-6)


def test_the_command_prints_a_table_and_refuses_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "k.nc"
    with pytest.raises(SystemExit) as done:
        main(
            [
                "knockout",
                "--scenes",
                "1",
                "--task",
                "colour",
                "--flow",
                "image:last",
                "--max-new-tokens",
                "2",
                "--out",
                str(out),
            ]
        )
    assert not done.value.code
    said = capsys.readouterr().out
    assert "image -> last" in said
    assert "asked: 1 question (split ablation)" in said
    assert len(load_knockout(out)["layer"]) == 5
    for arguments, message in (
        (["--flow", "image"], "write SOURCE:TARGET"),
        (["--out", str(tmp_path / "k.csv")], "must end in .nc"),
        (["--window", "9", "--scenes", "1", "--task", "colour"], "window 9: choose 1 to 5"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["knockout", "--out", str(tmp_path / "other.nc"), *arguments])
        assert done.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_every_group_has_a_name() -> None:
    assert GROUPS == ("system", "image", "question", "last", "answer")
