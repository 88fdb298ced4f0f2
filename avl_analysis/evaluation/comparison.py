"""A finished comparison: labelled numbers per policy and sample, their means with intervals, files.

    comparison["kl"]      xarray.DataArray (policy, sample)
    comparison.table()    pandas.DataFrame: means with intervals, paired differences to the full
                          cache
    comparison.save("compare.nc"); load_comparison("compare.nc")
    comparison.to_csv("compare.csv"); comparison.to_json("compare.json")

`VARIABLES` is the one place that says what the numbers are. A number that does not exist (accuracy
without a known answer, anything of a sample that failed) is NaN, never zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from avl import Policy
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.files import user_path, write_text
from avl_analysis.intervals import (
    Estimate,
    mean_interval,
    paired_difference,
    paired_share_difference,
    share_interval,
)
from avl_analysis.recordings.netcdf import read_netcdf, write_netcdf
from avl_analysis.recordings.origin import Origin

METRICS = ("fidelity", "text", "accuracy", "cost")
"""Groups of numbers; see `avl_analysis.evaluation.compare`."""

SHARES = ("correct", "same_text")
"""Numbers that are 0 or 1 of every sample, so that their means are proportions."""

FORMAT, VERSION = "avl-comparison", 1


@dataclass(frozen=True)
class Variable:
    """What a number is: group, unit, meaning, direction.

    Better small (-1), large (1) or neither (0).
    """

    group: str
    unit: str
    meaning: str
    better: int = 0


VARIABLES: Mapping[str, Variable] = {
    "kl": Variable(
        "fidelity",
        "nats",
        "KL(full || policy) of the next token, mean over the full cache's answer",
        -1,
    ),
    "agreement": Variable(
        "fidelity", "1", "share of tokens where both have the same most likely one", 1
    ),
    "perplexity": Variable(
        "fidelity", "1", "perplexity of the full cache's answer under the policy", -1
    ),
    "perplexity_change": Variable("fidelity", "1", "perplexity / the full cache's own - 1", -1),
    "exact_prefix": Variable(
        "text", "tokens", "tokens before the first difference from the full cache's answer", 1
    ),
    "rouge_l": Variable("text", "1", "ROUGE-L F against the full cache's answer", 1),
    "same_text": Variable("text", "1", "share of samples with the full cache's very tokens", 1),
    "correct": Variable("accuracy", "1", "share of right answers", 1),
    "tokens": Variable("accuracy", "tokens", "length of the answer, its end included"),
    "kv_filled": Variable(
        "cost", "bytes", "keys and values in use at the end, per row of the batch", -1
    ),
    "kv_allocated": Variable(
        "cost", "bytes", "key and value buffers at the end, slack included, per row", -1
    ),
    "kv_bookkeeping": Variable("cost", "bytes", "positions and scores beside them, per row", -1),
    "kv_peak": Variable(
        "cost", "bytes", "most keys and values at any moment, the prompt's included, per row", -1
    ),
    "kv_full": Variable(
        "cost", "bytes", "what the stock cache holds after the same tokens, per row"
    ),
    "kv_filled_share": Variable("cost", "1", "bytes in use / bytes of the stock cache", -1),
    "kv_allocated_share": Variable("cost", "1", "bytes allocated / bytes of the stock cache", -1),
    "kv_row_share": Variable(
        "cost",
        "1",
        "bytes of a row's keys and values when its answer ended / bytes of the stock cache then,"
        " whatever the rest of the batch held",
        -1,
    ),
    "keys_held": Variable("cost", "keys", "keys held when the answer ends, mean over layers", -1),
    "keys_held_share": Variable(
        "cost", "1", "keys held / tokens seen then: the share of bytes of this row alone", -1
    ),
    "keys_attended": Variable(
        "cost", "keys", "keys a decode step reads, mean over steps and layers", -1
    ),
    "attention_flops": Variable(
        "cost", "FLOP", "attention's operations per decode step, from the keys read", -1
    ),
    "step_flops": Variable("cost", "FLOP", "operations of a whole decode step", -1),
    "ttft": Variable("cost", "s", "time to first token, of the batch", -1),
    "tpot": Variable("cost", "s", "time per further token, of the batch", -1),
    "attention_seconds": Variable(
        "cost", "s", "time in attention and cache per decode step, of the batch", -1
    ),
    "batch": Variable("cost", "rows", "rows of the batch"),
}
"""Numbers with dimensions (policy, sample)."""

BY_STEP: Mapping[str, Variable] = {
    "kl_by_step": Variable("fidelity", "nats", "KL(full || policy) of the next token", -1),
    "agreement_by_step": Variable(
        "fidelity", "1", "whether both have the same most likely token", 1
    ),
    "nll_by_step": Variable(
        "fidelity", "nats", "negative log-likelihood of the full cache's token", -1
    ),
    "keys_attended_by_step": Variable(
        "cost", "keys", "keys read, mean over layers; decode steps 1, 2, ...", -1
    ),
}
"""Numbers with dimensions (policy, sample, step): step 0 is the prompt's last row, step t the t-th
decode step.
"""


class Comparison:
    """See the module. Made by `compare` and `load_comparison`.

    Attributes:
        dataset: everything; dimensions policy, sample, step. Attributes say where it comes from.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    def __repr__(self) -> str:
        count = self.dataset.sizes.get("sample", 0)
        return f"<Comparison of {', '.join(self.policies)} on {count} sample(s); see .table()>"

    def _repr_html_(self) -> str:
        """Means with intervals, a row per metric and a column per policy."""
        cells = {
            policy: [_cell(self.mean(metric, policy)) for metric in self.metrics]
            for policy in self.policies
        }
        labels = [f"{metric} ({VARIABLES[metric].unit})" for metric in self.metrics]
        count = self.dataset.sizes.get("sample", 0)
        html = pd.DataFrame(cells, index=labels).to_html(escape=True)
        return f"{html}<p>mean [95 % interval] over {count} samples</p>"

    def __getitem__(self, name: str) -> xr.DataArray:
        if name not in self.dataset:
            raise KeyError(
                f"this comparison holds no {name!r}; it holds"
                f" {', '.join(map(str, self.dataset.data_vars))}"
            )
        return self.dataset[name]

    @property
    def origin(self) -> Origin:
        """The model it was measured on."""
        return Origin.of_attrs("the comparison", self.dataset.attrs)

    @property
    def policies(self) -> list[str]:
        return [str(name) for name in self.dataset["policy"].values]

    @property
    def reference(self) -> str:
        """Name of the policy differences are taken to: the full cache."""
        return str(self.dataset.attrs["reference"])

    @property
    def metrics(self) -> list[str]:
        """Names of the numbers that were measured."""
        return [name for name in VARIABLES if name in self.dataset]

    @property
    def failures(self) -> pd.DataFrame:
        """Samples that could not be measured: columns policy, sample, reason."""
        reasons = self.dataset["failure"].to_series()
        found = reasons[reasons != ""].rename("reason").reset_index()
        return found[["policy", "sample", "reason"]]

    def select_task(self, task: str) -> Comparison:
        """Only the samples of one task.

        Raises:
            InputError: a task that no sample is of.
        """
        return self.select_tasks([task])

    def select_tasks(self, names: Sequence[str]) -> Comparison:
        """Only the samples of some tasks.

        Raises:
            InputError: a task that no sample is of.
        """
        tasks = [str(task) for task in self.dataset["task"].values]
        if unknown := [name for name in names if name not in tasks]:
            raise InputError(
                f"no samples of task {unknown[0]!r}; there are {', '.join(sorted(set(tasks)))}"
            )
        keep = [task in names for task in tasks]
        return Comparison(self.dataset.isel(sample=np.flatnonzero(keep)))

    @property
    def one_token_tasks(self) -> list[str]:
        """Tasks to which the full cache gives answers of one token only (and its end), in order.

        The first token comes from the prompt's own pass, so such a task cannot show what a policy
        loses while decoding. Unknown lengths count as longer.
        """
        # An answer of one token and its end are two; a limit of two hides whether there was more.
        if int(self.dataset.attrs.get("max_new_tokens", 0)) < 3:
            return []  # cut so short that the length is not known
        if "full_tokens" in self.dataset:
            lengths = self.dataset["full_tokens"].values
        elif "tokens" in self.dataset:
            lengths = self.dataset["tokens"].sel(policy=self.reference).values
        else:
            return []
        tasks = self.dataset["task"].values
        names = dict.fromkeys(str(task) for task in tasks)
        return [name for name in names if (lengths[tasks == name] <= 2).all()]

    @property
    def telling(self) -> bool:
        """Whether there is a task that can show what a policy loses while decoding."""
        return not set(map(str, self.dataset["task"].values)) <= set(self.one_token_tasks)

    def pooled(self) -> Comparison:
        """Only the samples of tasks that can show what a policy loses while decoding.

        All samples where there are none.
        """
        alone = self.one_token_tasks
        if not alone or not self.telling:
            return self
        tasks = dict.fromkeys(str(task) for task in self.dataset["task"].values)
        return self.select_tasks([task for task in tasks if task not in alone])

    # -- means -------------------------------------------------------------------------------------

    def mean(self, metric: str, policy: str) -> Estimate[float]:
        """Mean over samples with its 95 % interval: Wilson's of `SHARES`, bootstrap otherwise."""
        values = self[metric].sel(policy=policy).values
        return share_interval(values) if metric in SHARES else mean_interval(values)

    def difference(self, metric: str, policy: str, to: str | None = None) -> Estimate[float]:
        """Mean of `policy` minus `to`, sample by sample, with its 95 % interval.

        Newcombe's interval for paired proportions of `SHARES`, bootstrap otherwise.

        Args:
            metric: one of `metrics`.
            policy: one of `policies`.
            to: another of them; None takes the full cache.
        """
        array = self[metric]
        values, baseline = (
            array.sel(policy=name).values for name in (policy, to or self.reference)
        )
        if metric in SHARES:
            return paired_share_difference(values, baseline)
        return paired_difference(values, baseline)

    def table(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per policy and metric: mean, low, high, n.

        Difference, its low and high; unit and meaning.

        Raises:
            InputError: a metric that was not measured.
        """
        chosen = self.metrics if metrics is None else list(metrics)
        if missing := [name for name in chosen if name not in self.metrics]:
            raise InputError(
                f"{', '.join(missing)} was not measured here; measured are"
                f" {', '.join(self.metrics)}"
            )
        rows = []
        for policy in self.policies:
            for metric in chosen:
                mean, change = self.mean(metric, policy), self.difference(metric, policy)
                described = {"unit": VARIABLES[metric].unit, "meaning": VARIABLES[metric].meaning}
                rows.append(
                    {
                        "policy": policy,
                        "metric": metric,
                        "mean": mean.mean,
                        "low": mean.low,
                        "high": mean.high,
                        "n": mean.n,
                    }
                    | {
                        "difference": change.mean,
                        "difference_low": change.low,
                        "difference_high": change.high,
                    }
                    | described
                )
        return pd.DataFrame(rows)

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> Path:
        """Write one netCDF file.

        Raises:
            InputError: the file cannot be written.
        """
        return write_netcdf(path, {"/": self.dataset.assign_attrs(format=FORMAT, version=VERSION)})

    def to_csv(self, path: str | PathLike[str]) -> Path:
        """Write `table()` as CSV.

        Raises:
            InputError: the file cannot be written.
        """
        return write_text(path, self.table().to_csv(index=False))

    def to_json(self, path: str | PathLike[str]) -> Path:
        """Write provenance, `table()`, every sample's numbers and texts, and the failures.

        NaN becomes null.

        Raises:
            InputError: the file cannot be written.
        """
        # One row per policy and sample; numbers by step do not fit such a table.
        samples = self.dataset.drop_dims("step") if "step" in self.dataset.dims else self.dataset
        # Through pandas, which writes NaN as null: `json` would write NaN, which is no JSON.
        content = {
            "provenance": {key: str(value) for key, value in self.dataset.attrs.items()},
            "table": json.loads(self.table().to_json(orient="records")),
            "samples": json.loads(samples.to_dataframe().reset_index().to_json(orient="records")),
            "failures": json.loads(self.failures.to_json(orient="records")),
        }
        return write_text(path, json.dumps(content, indent=1) + "\n")


def _cell(estimate: Estimate) -> str:
    if not np.isfinite(estimate.mean):
        return "-"
    if not np.isfinite(estimate.low):
        return f"{estimate.mean:.3g}"
    return f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def load_comparison(path: str | PathLike[str]) -> Comparison:
    """Read what `Comparison.save` wrote.

    Raises:
        InputError: no such file, not a comparison, or of another version of the format.
    """
    source = user_path(path)
    if not source.is_file():
        raise InputError(
            f"there is no comparison file {source}; make one with avl compare --out {source}"
        )
    with blamed_on_input(f"{source} is not a readable netCDF file, so not a comparison"):
        dataset = read_netcdf(source, ["/"])["/"]
    # Taken out, because they belong to the file and `save` adds them again.
    if dataset.attrs.pop("format", None) != FORMAT:
        raise InputError(
            f"{source} is a netCDF file but not a comparison (no format = {FORMAT!r} in it)"
        )
    if (version := str(dataset.attrs.pop("version", None))) != str(VERSION):
        raise InputError(
            f"{source} has comparison format {version}, this program reads {VERSION}: compare again"
        )
    with blamed_on_input(
        f"{source} is damaged or was changed", ": copy it again, or compare again"
    ):
        _check(dataset)
    return Comparison(dataset)


def _check(dataset: xr.Dataset) -> None:
    """Refuse a dataset that lacks what every comparison has."""
    for name, dims in (
        ("text", ("policy", "sample")),
        ("failure", ("policy", "sample")),
        ("prompt", ("sample",)),
        ("task", ("sample",)),
        ("answers", ("sample",)),
        ("full_text", ("sample",)),
    ):
        if name not in dataset or dataset[name].dims != dims:
            raise InputError(f"{name} is missing, or has other dimensions")
    for name in (*VARIABLES, *BY_STEP):
        # Numbers by step have a third dimension, so only the first two are compared. Kinds f, i and
        # u are floats, signed and unsigned whole numbers.
        if name in dataset and (
            dataset[name].dims[:2] != ("policy", "sample") or dataset[name].dtype.kind not in "fiu"
        ):
            raise InputError(f"{name} has other dimensions, or holds other things than numbers")
    policies = list(map(str, dataset["policy"].values))
    if len(set(policies)) != len(policies) or dataset.attrs.get("reference") not in policies:
        raise InputError("the policies are not told apart, or the full cache is not among them")
    # Attributes come from a file and may be anything; what is read later is checked here, once.
    described = json.loads(str(dataset.attrs["policies"]))
    if not isinstance(described, dict) or set(described) != set(policies):
        raise InputError("the settings of the policies are missing")


def build(
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    facts: Mapping[int, Mapping[str, Any]],
    results: Mapping[tuple[str, int], Any],
    attrs: Mapping[str, Any],
) -> Comparison:
    """The comparison of what was measured.

    Args:
        samples: the questions, in the order of the result.
        policies: name -> policy.
        attrs: where the comparison comes from.
        facts: sample index -> what does not depend on the policy (full_text, full_tokens,
            prompt_tokens).
        results: (policy, sample index) -> values by variable name, or an object with a `reason`.
    """
    values = {key: value for key, value in results.items() if isinstance(value, Mapping)}
    known = {name for value in values.values() for name in value}
    shape = (len(policies), len(samples))
    # Where each sample's numbers stand in arrays of this shape; samples that failed have none.
    places = [
        ((p, s), values.get((name, s), {}))
        for p, name in enumerate(policies)
        for s in range(len(samples))
    ]
    data: dict[str, Any] = {}
    for name in [name for name in VARIABLES if name in known]:
        array = np.full(shape, np.nan)
        for at, value in places:
            array[at] = value.get(name, np.nan)
        data[name] = (("policy", "sample"), array, _described(VARIABLES[name]))
    # Keys are counted at decode steps only, so these numbers begin at step 1, all others at step 0.
    starts = {name: int(name.startswith("keys")) for name in BY_STEP if name in known}
    lengths = [
        first + len(value[name])
        for name, first in starts.items()
        for value in values.values()
        if name in value
    ]
    steps = max(lengths, default=0)
    for name, first in starts.items():
        array = np.full((*shape, steps), np.nan)
        for at, value in places:
            if name in value:
                # at is (policy, sample): a row of steps, NaN before its first and behind its last.
                array[at][first : first + len(value[name])] = value[name]
        data[name] = (("policy", "sample", "step"), array, _described(BY_STEP[name]))
    # Python strings; a fixed-width dtype would cut longer texts off.
    texts = np.full(shape, "", dtype=object)
    failures = np.full(shape, "", dtype=object)
    for p, name in enumerate(policies):
        for s in range(len(samples)):
            result = results[name, s]
            texts[p, s] = result.get("text", "") if isinstance(result, Mapping) else ""
            failures[p, s] = "" if isinstance(result, Mapping) else str(result.reason)
    data |= {"text": (("policy", "sample"), texts), "failure": (("policy", "sample"), failures)}
    per_sample = {
        "prompt": [sample.prompt for sample in samples],
        "task": [sample.task for sample in samples],
        # As JSON, because a variable holds one text for each sample, not a list; null where
        # unknown.
        "answers": [json.dumps(sample.answers) for sample in samples],
        "full_text": [str(facts.get(s, {}).get("full_text", "")) for s in range(len(samples))],
    }
    data |= {
        name: ("sample", np.array(column, dtype=object)) for name, column in per_sample.items()
    }
    for name in ("full_tokens", "prompt_tokens"):
        if any(name in fact for fact in facts.values()):
            data[name] = (
                "sample",
                np.array([facts.get(s, {}).get(name, np.nan) for s in range(len(samples))], float),
            )
    coords: dict[str, Any] = {"policy": np.array(list(policies), dtype=object)}
    coords["sample"] = np.array([sample.id for sample in samples], dtype=object)
    if steps:
        coords["step"] = np.arange(steps)
    described = json.dumps({name: repr(policy) for name, policy in policies.items()})
    return Comparison(xr.Dataset(data, coords, {**attrs, "policies": described}))


def _described(variable: Variable) -> dict[str, Any]:
    return {
        "units": variable.unit,
        "long_name": variable.meaning,
        "group": variable.group,
        "better": variable.better,
    }
