"""Comparing policies: the full cache against itself first, then against slow, obvious versions of
every number.
"""

import math
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import DynamicCache

import avl
from avl_analysis.corpus.batches import halve_on_failure
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.evaluation.compare import compare, kl_divergence
from avl_analysis.evaluation.comparison import METRICS, load_comparison
from avl_analysis.evaluation.generation import generate
from avl_analysis.models.loading import VLM
from tests.avl_analysis import shared

TOKENS = 6
SMALL = avl.AdaptivePolicy(secondary=0.5, core=0.25, refresh_every=2, text=None)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return shared.vlm()


@pytest.fixture(scope="module")
def result(vlm: VLM):
    return compare(
        vlm,
        shared.questions(),
        {"full": avl.FullPolicy(), "small": SMALL},
        max_new_tokens=TOKENS,
        batch_size=3,
    )


def _stepwise(
    vlm: VLM, sample: Sample, policy: avl.Policy | None, tokens: list[int]
) -> torch.Tensor:
    """Log-probabilities along given tokens, one forward call per token, one sample alone: the slow,
    obvious version.
    """
    inputs = vlm.prepare(list(sample.images), sample.prompt)
    rows, cache = [], DynamicCache(config=vlm.model.config.get_text_config())

    def steps() -> None:
        out = vlm.model(**inputs, past_key_values=cache, use_cache=True)
        rows.append(out.logits[0, -1].log_softmax(-1))
        for token in tokens[:-1]:
            out = vlm.model(
                input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
            )
            rows.append(out.logits[0, -1].log_softmax(-1))

    with torch.no_grad():
        if policy is None:
            steps()
        else:
            with avl.adaptive(vlm.model, policy):
                steps()
    return torch.stack(rows)


def test_the_full_cache_compared_with_itself_differs_in_nothing(result) -> None:
    assert float(result["kl"].sel(policy="full").max()) < 1e-9
    for metric in ("agreement", "rouge_l", "same_text"):
        assert (result[metric].sel(policy="full") == 1).all(), metric
    assert (result["exact_prefix"].sel(policy="full") == TOKENS).all()
    assert float(abs(result["perplexity_change"].sel(policy="full")).max()) < 1e-5
    assert (result["kv_filled_share"].sel(policy="full") == 1).all()
    assert (result["keys_held_share"].sel(policy="full") == 1).all()
    for metric in result.metrics:
        if metric not in ("correct", "attention_seconds"):
            assert result.difference(metric, "full").mean == 0, metric
    assert result.failures.empty


def test_a_policy_that_keeps_everything_counts_as_full(vlm: VLM) -> None:
    neutral = avl.AdaptivePolicy(secondary=None, core=None, text=None)
    result = compare(vlm, shared.questions(2), {"neutral": neutral}, max_new_tokens=TOKENS)
    assert result.policies == ["full", "neutral"]
    assert float(result["kl"].max()) < 1e-9
    assert (result["same_text"] == 1).all()


def test_teacher_forced_numbers_equal_one_forward_call_per_token(vlm: VLM, result) -> None:
    for sample in shared.questions():
        tokens = generate(vlm, [sample], None, max_new_tokens=TOKENS).tokens[0]
        full, mine = _stepwise(vlm, sample, None, tokens), _stepwise(vlm, sample, SMALL, tokens)
        assert (
            full[:, 6:].argmax(-1) + 6
        ).tolist() == tokens  # the tiny model never says one of its special tokens
        kl = (full.exp() * (full - mine)).sum(-1)
        nll = -mine[torch.arange(TOKENS), torch.tensor(tokens)]
        row = result.dataset.sel(policy="small", sample=sample.id)
        np.testing.assert_allclose(row["kl_by_step"], kl, atol=1e-5)
        np.testing.assert_allclose(row["kl"], kl.mean(), atol=1e-5)
        np.testing.assert_allclose(row["nll_by_step"], nll, atol=1e-4)
        np.testing.assert_allclose(row["perplexity"], nll.mean().exp(), rtol=1e-4)
        own = -full[torch.arange(TOKENS), torch.tensor(tokens)].mean()
        np.testing.assert_allclose(
            row["perplexity_change"], (nll.mean() - own).exp() - 1, atol=1e-3
        )
        np.testing.assert_array_equal(row["agreement_by_step"], mine.argmax(-1) == full.argmax(-1))
    assert float(result["kl"].sel(policy="small").min()) > 1e-3  # the policy does change something


def test_rows_of_a_padded_batch_are_measured_as_alone(vlm: VLM, result) -> None:
    for sample in shared.questions():
        alone = compare(
            vlm,
            [sample],
            {"full": avl.FullPolicy(), "small": SMALL},
            max_new_tokens=TOKENS,
            batch_size=1,
        )
        both = result.dataset.sel(sample=sample.id)
        for name in (
            "kl",
            "perplexity",
            "exact_prefix",
            "rouge_l",
            "keys_attended",
            "keys_held",
            "tokens",
        ):
            np.testing.assert_allclose(
                alone[name].squeeze("sample"), both[name], rtol=1e-4, atol=1e-5, err_msg=name
            )
        assert alone["text"].squeeze("sample").values.tolist() == both["text"].values.tolist()


def test_keys_attended_follow_core_and_refresh(result) -> None:
    keys = result["keys_attended_by_step"]
    prompt = result["prompt_tokens"]
    for step in range(1, TOKENS):
        np.testing.assert_array_equal(keys.sel(policy="full", step=step), prompt + step)
        held = 8 if step % 2 == 0 else 4  # of 16 image keys
        np.testing.assert_array_equal(
            keys.sel(policy="small", step=step), prompt - 16 + held + step
        )
    assert keys.sel(step=0).isnull().all()


def test_bytes_are_those_of_the_session(vlm: VLM, result) -> None:
    sample = shared.questions()[1]
    inputs = vlm.prepare(list(sample.images), sample.prompt)
    with avl.adaptive(vlm.model, SMALL) as session:
        vlm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    alone = compare(vlm, [sample], {"small": SMALL}, max_new_tokens=TOKENS, metrics=["cost"])
    row = alone.dataset.sel(policy="small").squeeze("sample")
    usage = session.usage()
    assert float(row["kv_filled"]) == usage.filled
    assert float(row["kv_allocated"]) == usage.allocated
    assert float(row["kv_full"]) == usage.full
    assert float(row["kv_peak"]) == usage.peak
    assert float(row["kv_filled_share"]) < 1


def test_operations_are_counted_from_the_keys_read(vlm: VLM, result) -> None:
    layers, width = 2, 64  # heads x head dimension
    keys = result["keys_attended"]
    np.testing.assert_allclose(result["attention_flops"], 4 * width * layers * keys)
    language = vlm.model.model.language_model
    weights = (
        sum(p.numel() for p in language.layers.parameters() if p.dim() == 2)
        + vlm.model.lm_head.weight.numel()
    )
    np.testing.assert_allclose(result["step_flops"] - result["attention_flops"], 2 * weights)


def test_times_are_those_between_the_passes_and_inside_attention(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks when it is read: at the start, after each pass, and where attention is
    entered or left, around its linear projections.
    """
    sample = shared.questions(1)

    def ticking() -> None:
        ticks = count()
        monkeypatch.setattr("avl_analysis.evaluation.generation._now", lambda _: float(next(ticks)))

    ticking()
    run = generate(vlm, sample, None, max_new_tokens=5)
    assert (run.ttft, run.tpot) == (1.0, 1.0)
    ticking()
    timed = generate(vlm, sample, None, max_new_tokens=5, time_attention=True)
    layers, projections = 2, 4
    # four projections leave five spans outside them, each one tick long
    assert timed.attention == [layers * (projections + 1)] * 5
    reads = layers * 2 * (projections + 1)
    assert timed.tpot == reads + 1
    assert math.isnan(generate(vlm, sample, None, max_new_tokens=1).tpot)


def test_rows_that_stop_early_are_measured_up_to_their_end() -> None:
    vlm = shared.vlm(stops=True)
    samples = shared.questions(4)
    result = compare(vlm, samples, {"small": SMALL}, max_new_tokens=12, batch_size=4)
    lengths = result["full_tokens"]
    assert int(lengths.min()) < 12, "the test needs a row that stops early"
    for sample in samples:
        row = result.dataset.sel(sample=sample.id, policy="small")
        assert int(row["kl_by_step"].notnull().sum()) == int(lengths.sel(sample=sample.id))
        alone = (
            compare(vlm, [sample], {"small": SMALL}, max_new_tokens=12)
            .dataset.sel(policy="small")
            .squeeze("sample")
        )
        np.testing.assert_allclose(alone["kl"], row["kl"], atol=1e-5)
        assert float(alone["tokens"]) == float(row["tokens"])
        assert str(alone["text"].item()) == str(row["text"].item())


def test_accuracy_exists_only_where_the_answer_is_known(result) -> None:
    known = result["correct"].notnull().all("policy")
    assert known.values.tolist() == [False, True, False, True]
    assert result.mean("correct", "full").n == 2


def test_an_answer_is_right_where_the_model_gives_it(vlm: VLM) -> None:
    sample = shared.questions(1)[0]
    text = compare(
        vlm, [sample], {"full": avl.FullPolicy()}, max_new_tokens=3, metrics=["accuracy"]
    )["text"].values[0, 0]
    right = Sample("right", sample.images, sample.prompt, answers=("something", str(text)))
    wrong = Sample("wrong", sample.images, sample.prompt, answers=("something",))
    result = compare(
        vlm, [right, wrong], {"full": avl.FullPolicy()}, max_new_tokens=3, metrics=["accuracy"]
    )
    assert result["correct"].sel(policy="full").values.tolist() == [1.0, 0.0]


def test_accuracy_and_cost_alone_run_the_model_once_per_policy(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = type(vlm.model).generate
    monkeypatch.setattr(
        type(vlm.model), "generate", lambda self, **k: calls.append(1) or original(self, **k)
    )
    result = compare(
        vlm,
        shared.questions(2),
        {"full": avl.FullPolicy(), "s": SMALL},
        metrics=["accuracy"],
        max_new_tokens=2,
    )
    assert len(calls) == 2
    assert "kl" not in result.dataset
    assert result["prompt_tokens"].notnull().all()


def test_a_sample_that_fails_is_reported_and_the_others_count(vlm: VLM, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    samples = [*shared.questions(3), Sample("broken", (broken,), "what is the colour")]
    result = compare(vlm, samples, {"small": SMALL}, max_new_tokens=2, batch_size=4)
    assert result.failures["sample"].tolist() == ["broken", "broken"]
    assert "not an image" in result.failures["reason"][0]
    assert np.isnan(result["kl"].sel(sample="broken")).all()
    assert result["kl"].drop_sel(sample="broken").notnull().all()
    assert result.mean("kl", "small").n == 3


def test_a_policy_that_fails_on_one_sample_keeps_the_others(vlm: VLM) -> None:
    class Moody(type(SMALL)):  # type: ignore[misc]
        def measure(self, prompt):
            if prompt.counts[0].text > 20 or len(prompt.counts) > 1:
                raise RuntimeError("out of memory")
            return super().measure(prompt)

    samples = [
        *shared.questions(2),
        Sample("long", shared.questions(1)[0].images, "where is the picture " * 6),
    ]
    result = compare(vlm, samples, {"moody": Moody(text=None)}, max_new_tokens=2, batch_size=3)
    assert result.failures[["policy", "sample"]].values.tolist() == [["moody", "long"]]
    assert "out of memory" in result.failures["reason"][0]
    assert result["kl"].sel(policy="full").notnull().all()


def test_nothing_measured_at_all_is_an_error_with_the_reason(vlm: VLM, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of the 1 samples.*no such file"):
        compare(
            vlm, [Sample("gone", (tmp_path / "gone.png",), "what?")], {"full": avl.FullPolicy()}
        )


def test_a_model_that_cannot_be_adapted_stops_at_once(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise avl.UnsupportedModelError("not this one")

    monkeypatch.setattr("avl_analysis.evaluation.generation.adaptive", refuse)
    with pytest.raises(avl.UnsupportedModelError, match="not this one"):
        compare(vlm, shared.questions(2), {"full": avl.FullPolicy()}, metrics=["accuracy"])


def test_dividing_finds_the_items_that_fail_alone() -> None:
    def run(items):
        if 3 in items or 5 in items:
            raise ValueError(f"cannot do {items}")
        return [item * 10 for item in items]

    found = halve_on_failure(run, list(range(8)))
    assert [getattr(value, "reason", value) for value in found] == [
        0,
        10,
        20,
        "ValueError: cannot do [3]",
        40,
        "ValueError: cannot do [5]",
        60,
        70,
    ]


def test_divergence_of_worked_distributions() -> None:
    half, skewed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert kl_divergence(half, half).item() == 0
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    np.testing.assert_allclose(kl_divergence(half, skewed).item(), expected, rtol=1e-6)
    ruled_out = torch.tensor([[0.0, -torch.inf]])
    np.testing.assert_allclose(kl_divergence(ruled_out, half).item(), np.log(2), rtol=1e-6)


def test_a_saved_comparison_loads_as_it_was(result, tmp_path: Path) -> None:
    result.save(tmp_path / "c.nc")
    loaded = load_comparison(tmp_path / "c.nc")
    xr.testing.assert_identical(loaded.dataset, result.dataset)
    assert loaded.reference == "full"


def test_table_and_exports_hold_every_metric_with_interval_and_difference(
    result, tmp_path: Path
) -> None:
    table = result.table()
    assert set(table["metric"]) == set(result.metrics)
    kl = table[(table.policy == "small") & (table.metric == "kl")].iloc[0]
    assert np.isnan(kl["low"])  # four samples have no bootstrap interval
    same = table[(table.policy == "small") & (table.metric == "same_text")].iloc[0]
    assert -1 <= same["difference_low"] <= same["difference"] <= 0
    assert same["difference"] < same["difference_high"]  # with few samples nothing is certain
    assert kl["mean"] == pytest.approx(float(result["kl"].sel(policy="small").mean()))
    assert kl["difference"] == pytest.approx(kl["mean"], abs=1e-9)
    import json

    result.to_csv(tmp_path / "c.csv")
    assert len((tmp_path / "c.csv").read_text().splitlines()) == len(table) + 1
    result.to_json(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["provenance"]["max_new_tokens"] == str(TOKENS)
    assert len(content["samples"]) == 8


def test_samples_of_one_task_can_be_looked_at_alone(result) -> None:
    assert result.select_task("odd").dataset.sizes["sample"] == 2
    with pytest.raises(InputError, match="there are even, odd"):
        result.select_task("caption")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": []}, "no samples"),
        ({"samples": shared.questions(1) * 2}, "q0 occur more than once"),
        ({"policies": {}}, "no policies"),
        ({"policies": {"x": "full"}}, "'x' is not a policy"),
        ({"policies": {"full": SMALL}}, "'full' is kept"),
        ({"metrics": ["speed"]}, "choose from fidelity"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
    ],
)
def test_input_that_cannot_be_compared_is_refused(vlm: VLM, change: dict, message: str) -> None:
    arguments = {"samples": shared.questions(1), "policies": {"full": avl.FullPolicy()}, **change}
    with pytest.raises(InputError, match=message):
        compare(vlm, arguments.pop("samples"), arguments.pop("policies"), **arguments)


def test_all_groups_of_metrics_are_known() -> None:
    assert METRICS == ("fidelity", "text", "accuracy", "cost")
