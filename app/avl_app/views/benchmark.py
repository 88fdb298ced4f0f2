"""Benchmark: policies on many questions, quality against bytes; or a comparison made before."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import streamlit as st

import avl
from avl_analysis.corpus.questions import Sample, scene_samples
from avl_analysis.errors import InputError
from avl_analysis.evaluation.comparison import Comparison, load_comparison
from avl_analysis.policy_plots import QUALITIES, plot_comparison
from avl_analysis.scenes import TASKS
from avl_app import adaptive, code, examples, policies, state
from avl_app.page import Context, Progress, doing, keep, plain, plot, problem
from avl_app.sent import sent_files
from avl_app.uploads import from_bytes, sent_samples

Asking = Callable[[], list[Sample]]
_SCENES, _JSONL, _SAVED = state.BENCH_SOURCES
_SOURCES = {_SCENES: "drawn scenes", _JSONL: "my own questions", _SAVED: "a comparison made before"}
_PAPER = state.PAPER
_LIVE = "live"
_WHAT = """
What a comparison shows, for every policy beside the full cache:

| measure | what it says |
|---|---|
| **answers that are right** | share of questions with a known answer; what a user notices |
| **KL(full \\|\\| policy)** | how far next-token probabilities move along the full cache's answer |
| **same next token** | share of tokens where both prefer the same one |
| **ROUGE-L** | overlap of the policy's own answer with the full cache's |
| **bytes** | keys and values in use when the answer ends, as a share of the full cache's |

Every number has a 95 % interval over questions.
A policy is worth having where it is as good with fewer bytes.
"""
_COSTS = {
    "kv_filled_share": ("bytes, share", 2),
    "keys_attended": ("keys/step", 0),
}
"""Metric -> column, digits."""
_DIGITS = 2
_SWEEP = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Budgets that several of can be compared at once."""


def show(context: Context) -> None:
    """Draw the view."""
    source = st.segmented_control(
        "Questions",
        list(_SOURCES),
        key="bench_source",
        format_func=_SOURCES.__getitem__,
        required=True,
    )
    if source == _SAVED:
        _load()
    else:
        # A function, not the questions: scenes are drawn only when the button is pressed.
        ask = _scenes() if source == _SCENES else _own(context)
        chosen = _policies()
        if (
            st.button("Compare", type="primary", disabled=ask is None or not chosen)
            and ask is not None
        ):
            # Kept with its code: the controls may move on, and the code must give what is shown.
            st.session_state["comparison"] = _run(context, ask, chosen)
            st.session_state["comparison_code"] = code.compared(
                context.question.model, _samples_code(), chosen, context.question.tokens
            )
    comparison: Comparison | None = st.session_state.get("comparison")
    if comparison is None:
        st.info(
            "Nothing is compared yet: choose policies and questions and press Compare, or load a"
            " comparison.",
            icon=":material/info:",
        )
        st.markdown(_WHAT)
        return
    _result(comparison)


def _samples_code() -> str:
    """The expression that gives the questions compared."""
    if state.get("bench_source") == _SCENES:
        return f"scene_samples({int(state.get('count'))}, {list(state.get('tasks'))!r})"
    return 'read_samples("samples.jsonl")  # the list that was sent'


def _scenes() -> Asking | None:
    """Held-out drawn scenes of some tasks, drawn when they are needed."""
    left, right = st.columns([3, 1])
    state.among("tasks", TASKS)
    tasks = left.multiselect(
        "Tasks", TASKS, key="tasks", format_func=lambda t: examples.TASK_NAMES.get(t, t)
    )
    count = right.number_input("Samples of each task", 1, 200, key="count")
    return partial(scene_samples, int(count), tasks) if tasks else None


def _own(context: Context) -> Asking | None:
    """Questions from a JSONL file with its pictures."""
    limits = {
        "most_bytes": context.settings.upload_bytes,
        "most_pixels": context.settings.picture_pixels,
    }
    sent = sent_files(
        'One JSONL file and the pictures it names; a line: {"image": "cat.jpg", "prompt": "...",'
        ' "answer": "..."}',
        ["jsonl", "png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm"],
        lambda files: sent_samples(files, **limits),
        key="samples",
        most_megabytes=max(1, context.settings.upload_bytes >> 20),
        several=True,
    )
    if sent is None:
        return None
    samples = sent.value
    st.caption(f"{len(samples)} questions")
    return lambda: samples


def _policies() -> dict[str, avl.Policy]:
    """Policies at the paper's settings and at budgets."""
    others = policies.rivals(ours=True)
    names = {_PAPER: "A-VL (paper)", _LIVE: "A-VL as in A-VL live", **others}
    state.among("bench_policies", names)
    left, right = st.columns([3, 1])
    wanted = left.multiselect(
        "Policies", list(names), key="bench_policies", format_func=names.__getitem__
    )
    with right:
        budgets = _budgets()
    # Made only if chosen: contradicting settings in A-VL live must not stop the others.
    fixed = {_PAPER: avl.AdaptivePolicy, _LIVE: adaptive.present}
    try:
        chosen: dict[str, avl.Policy] = {}
        for name in wanted:
            # these have their own settings and take part once, whatever the budgets are
            if name in fixed:
                chosen[names[name]] = fixed[name]()
                continue
            for budget in budgets:
                chosen[f"{names[name]} {budget:.0%}"] = policies.at_budget(name, budget)
        return chosen
    except ValueError as error:
        problem(f"The settings in A-VL live contradict each other: {error}.")
        return {}


def _budgets() -> list[float]:
    """One budget, or several in one figure."""
    if not st.toggle("Several budgets", key="bench_sweep", help="Every policy at each of them."):
        return [
            float(st.slider("Budget, share of all keys", 0.02, 1.0, step=0.01, key="bench_budget"))
        ]
    chosen = st.multiselect(
        "Budgets, share of all keys",
        [f"{share:g}" for share in _SWEEP],
        key="bench_budgets",
        format_func=lambda share: f"{float(share):.0%}",
    )
    # The address keeps text, and its order is that of the clicks.
    return [float(share) for share in sorted(chosen, key=float)]


def _run(context: Context, ask: Asking, chosen: Mapping[str, avl.Policy]) -> Comparison | None:
    """Compare with a bar and a way out; any click stops it, because the page is drawn anew."""
    stop = st.empty()
    # It needs no callback: the next call of the bar's `done` notices that a new run is due.
    stop.button("Cancel", key="cancel", icon=":material/stop:")
    try:
        with Progress(doing(context, "answering the first questions"), "answers") as bar:
            return context.bench.comparison(
                context.question.model,
                ask(),
                chosen,
                tokens=context.question.tokens,
                progress=bar.done,
                waiting=bar.waiting,
            )
    except InputError as error:
        problem(error)
        return None
    # Also when comparing fails: without a run there is nothing to cancel.
    finally:
        stop.empty()


def _load() -> None:
    """A comparison file becomes the one shown."""
    sent = sent_files(
        "Comparison made by avl compare (.nc)",
        ["nc"],
        lambda files: from_bytes(load_comparison, *_named(files)),
        key="comparison_file",
        most_megabytes=50,
    )
    if sent is not None:
        st.session_state["comparison"] = sent.value
        st.session_state["comparison_code"] = (
            "from avl_analysis import load_comparison\n\n"
            f"result = load_comparison({sent.name!r})\nprint(result.table())\n{code.COMPARED}"
        )


def _named(files: Mapping[str, bytes]) -> tuple[bytes, str]:
    name, data = next(iter(files.items()))
    return data, name


def _result(comparison: Comparison) -> None:
    """Quality against bytes, the numbers, and files to keep."""
    n = comparison.dataset.sizes["sample"]
    about = comparison.dataset.attrs
    st.markdown(
        f"#### {len(comparison.policies)} policies on {n} questions, model"
        f" {plain(str(about.get('model', '')))}"
    )
    shown = [metric for metric in QUALITIES if metric in comparison.metrics]
    figure = plot_comparison(comparison).figure
    # Rows of two plots; the last row may hold one.
    for first in range(0, len(figure.panels), 2):
        for column, panel in zip(st.columns(2), figure.panels[first : first + 2], strict=False):
            with column:
                st.markdown(f"**{plain(panel.title)}**")
                plot(panel, f"tradeoff_{panel.title}", titled=False)
    st.caption(
        f"Bars: 95 % intervals over samples, n = {n}. Bytes: keys and values in use at the end of"
        " each answer."
    )
    _table(comparison, [metric for metric in (*shown, *_COSTS) if metric in comparison.metrics])
    if len(failures := comparison.failures):
        with st.expander(f"{len(failures)} samples could not be measured"):
            st.dataframe(failures, hide_index=True)
    if shown_code := st.session_state.get("comparison_code"):
        keep(figure, shown_code, "benchmark")
    # `save` writes netCDF to a path only.
    with tempfile.TemporaryDirectory() as folder:
        data = comparison.save(Path(folder) / "compare.nc").read_bytes()
    left, right, _ = st.columns([1, 1, 3])
    left.download_button(
        "Numbers as CSV",
        comparison.table().to_csv(index=False),
        "compare.csv",
        "text/csv",
        on_click="ignore",
    )
    right.download_button(
        "Comparison file", data, "compare.nc", "application/x-netcdf", on_click="ignore"
    )


def _table(comparison: Comparison, metrics: list[str]) -> None:
    """One row per policy: means with their intervals."""
    names = {
        metric: QUALITIES[metric][1].label if metric in QUALITIES else _COSTS[metric][0]
        for metric in metrics
    }
    digits = {metric: _COSTS[metric][1] if metric in _COSTS else _DIGITS for metric in metrics}
    rows: dict[str, list[str]] = {
        "policy": comparison.policies,
        **{name: [] for name in names.values()},
    }
    for policy in comparison.policies:
        for metric, name in names.items():
            mean = comparison.mean(metric, policy)
            value, low, high = (
                f"{number:.{digits[metric]}f}" for number in (mean.mean, mean.low, mean.high)
            )
            rows[name].append(f"{value} [{low}, {high}]")
    st.dataframe(rows, hide_index=True, alt="means with intervals of every policy")
