"""What does each policy cost, and what does it save?"""

from __future__ import annotations

import json

import numpy as np

from avl.policies.registry import label_of_class
from avl_analysis.evaluation.comparison import Comparison
from avl_analysis.evaluation.frontier import EQUAL_BYTES
from avl_analysis.figures import Axis, Figure, Heat, Panel, Points, Rule, Scatter
from avl_analysis.intervals import Estimate
from avl_reports.findings import Finding, Verdict, judge
from avl_reports.policy_numbers import LOSS, color_slot
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import share

QUESTION = "What do policies lose, and what do they save?"
SAVED = 0.75
"""Share of the full cache's bytes below which a policy saves something worth the trouble."""
_COLUMNS = (
    ("kv_row_share", "bytes in use / full", 100.0, " %"),
    ("kv_filled_share", "bytes in use / full", 100.0, " %"),
    ("keys_attended", "keys read per step", 1.0, ""),
    ("attention_flops", "attention per step (kFLOP)", 1e-3, ""),
    ("ttft", "TTFT (ms)", 1e3, ""),
    ("tpot", "TPOT (ms)", 1e3, ""),
    ("attention_seconds", "attention per step (ms)", 1e3, ""),
    ("correct", "accuracy", 100.0, " %"),
    ("kl", "KL (nats)", 1.0, ""),
    ("same_text", "same text", 100.0, " %"),
)
"""Number, heading, factor to its unit, unit behind it."""


def section(run: Run) -> Section:
    """Accuracy and KL divergence against bytes for every policy.

    Accuracy by task, and the cost table.
    """
    compared = run.comparison
    # Quality is drawn against bytes, so a comparison without costs has no figure.
    if _size(compared) not in compared.metrics:
        raise NotMeasured("the comparison holds no cost; compare with --metric cost too")
    size = Axis("keys and values in use", "share of the full cache's bytes", (0.0, 1.08))
    panels: list[Panel] = []
    for metric, axis, asked in (
        # Accuracy leaves out tasks that cannot show a loss; KL looks at every token of the full
        # cache's answer and keeps all tasks.
        ("correct", share("accuracy"), compared.pooled()),
        ("kl", Axis("KL from the full cache", "nats"), compared),
    ):
        if metric in compared.metrics:
            full = (Rule(asked.mean(metric, compared.reference).mean, "full cache", "y"),)
            panels.append(
                Scatter(
                    size,
                    axis,
                    _frontiers(asked, metric),
                    full,
                    title=f"{axis.label} against bytes",
                )
            )
    panels += _by_task(compared)
    figure = Figure(
        "policies",
        "Policies: quality against bytes",
        tuple(panels),
        run.caption(
            "Accuracy: free-running answers against the truth (Wilson intervals)."
            f"{_apart(compared)} KL: next-token distribution along the full cache's own answer."
            " Bytes of keys and values of a question when its answer ended, relative to the stock"
            f" cache. Questions: {compared.dataset.attrs.get('questions', 'of unknown origin')}."
            f" Batches of {_batch(compared)}, times of this machine.",
            compared.dataset.sizes["sample"],
        ),
    )
    return Section(QUESTION, figure, findings(compared), "", None, table(compared))


def _size(compared: Comparison) -> str:
    """The number that says how many bytes a question takes; older files know only the batch's."""
    return "kv_row_share" if "kv_row_share" in compared.metrics else "kv_filled_share"


def _apart(compared: Comparison) -> str:
    """Which tasks the accuracy leaves out, and why, as a sentence."""
    alone = compared.one_token_tasks
    if not alone:
        return ""
    listed = ", ".join(name or "unnamed" for name in alone)
    why = "that token comes from the prompt's own pass, so they cannot show what a policy loses"
    if not compared.telling:
        return f" All answers here are one token long ({listed}); {why}."
    return f" Tasks answered in one token ({listed}) are left out of it and of the verdicts; {why}."


def findings(compared: Comparison) -> tuple[Finding, ...]:
    """Whether A-VL keeps accuracy, saves bytes, and beats random selection of as many bytes.

    Accuracy is that of the tasks that can show a loss; if there are none, it decides nothing, and
    neither does a comparison with a random policy that uses other bytes.
    """
    # The first A-VL setting of the comparison speaks for it.
    ours = next((name for name in compared.policies if family(compared, name) == "A-VL"), None)
    if ours is None:
        return ()
    size = _size(compared)
    saved = compared.mean(size, ours)
    found = [
        Finding(
            "A-VL saves memory",
            f"“{ours}” uses {saved.words('%')} of the full cache's bytes.",
            f"at most {100 * SAVED:.0f} %",
            judge(saved, "at most", SAVED),
        )
    ]
    if "correct" not in compared.metrics:
        return tuple(found)
    asked, telling = compared.pooled(), compared.telling
    change = asked.difference("correct", ours)
    found.append(
        Finding(
            "A-VL keeps the answers right",
            f"Under “{ours}” accuracy changes by {change.words('%')} ({change.n} questions,"
            " paired).",
            f"at least {100 * LOSS:.0f} points",
            judge(change, "at least", LOSS) if telling else Verdict.UNDECIDED,
        )
    )
    if (rival := _rival(asked, ours)) is not None:
        gain = asked.difference("correct", ours, rival)
        sizes = [asked.mean(size, name).mean for name in (ours, rival)]
        # At unequal bytes a difference of accuracy may come from the size of what is kept.
        fair = telling and max(sizes) <= (1 + EQUAL_BYTES) * min(sizes)
        found.append(
            Finding(
                "Choosing by attention beats choosing at random",
                f"Accuracy under “{ours}” (using {100 * sizes[0]:.1f} % of the bytes) minus that"
                f" under “{rival}” (using {100 * sizes[1]:.1f} %): {gain.words('%')} ({gain.n}"
                " questions, paired).",
                f"above 0, at bytes that differ by at most {100 * EQUAL_BYTES:.0f} % of themselves",
                judge(gain, "at least", 0.0) if fair else Verdict.UNDECIDED,
            )
        )
    return tuple(found)


def table(compared: Comparison) -> tuple[tuple[str, ...], ...]:
    """The cost table as text: a header and a row per policy, means with intervals."""
    columns = [column for column in _COLUMNS if column[0] in compared.metrics]
    if _size(compared) == "kv_row_share":
        # Both columns have the same heading; bytes of a question's own row are the ones compared.
        columns = [column for column in columns if column[0] != "kv_filled_share"]
    rows = [("policy", *(heading for _, heading, _, _ in columns))]
    asked = compared.pooled()
    for name in compared.policies:
        cells = [
            _cell((asked if metric == "correct" else compared).mean(metric, name), scale, unit)
            for metric, _, scale, unit in columns
        ]
        rows.append((name, *cells))
    return tuple(rows)


def family(compared: Comparison, name: str) -> str:
    """What kind of policy a name of the comparison stands for."""
    described = json.loads(compared.dataset.attrs["policies"])[name]
    # Policies are described by their text, the name of the class in front of the bracket.
    kind = described.partition("(")[0]
    return label_of_class(kind)


def _frontiers(compared: Comparison, metric: str) -> tuple[Points, ...]:
    """One series per kind of policy, its settings joined by bytes."""
    kinds = sorted(
        {family(compared, name) for name in compared.policies if name != compared.reference},
        key=lambda kind: (color_slot(kind), kind),
    )
    series = []
    for kind in kinds:
        names = [name for name in compared.policies if family(compared, name) == kind]
        held = np.array([compared.mean(_size(compared), name).mean for name in names])
        # By bytes, so that the line that joins the points does not run back.
        order = np.argsort(held)
        found = [compared.mean(metric, names[i]) for i in order]
        y, low, high = (
            np.array([getattr(e, end) for e in found]) for end in ("mean", "low", "high")
        )
        # A series has intervals at all of its points or at none.
        known = bool(np.isfinite(low).all() and np.isfinite(high).all())
        series.append(
            Points(
                kind,
                held[order],
                y,
                low if known else None,
                high if known else None,
                slot=color_slot(kind),
                joined=len(names) > 1,
            )
        )
    return tuple(series)


def _by_task(compared: Comparison) -> list[Heat]:
    tasks = [str(task) for task in dict.fromkeys(compared.dataset["task"].values) if str(task)]
    if "correct" not in compared.metrics or len(tasks) < 2:
        return []
    values = np.array(
        [
            [compared.select_task(task).mean("correct", name).mean for task in tasks]
            for name in compared.policies
        ]
    )
    x = Axis("task", "name", ticks=tuple(enumerate(tasks)))
    y = Axis("policy", "name", ticks=tuple(enumerate(compared.policies)))
    return [Heat(x, y, share("accuracy"), values, annotate=True, title="accuracy by task")]


def _rival(compared: Comparison, ours: str) -> str | None:
    """The random policy whose bytes are nearest to ours; None if there is none."""
    size = {name: compared.mean(_size(compared), name).mean for name in compared.policies}
    rivals = [name for name in compared.policies if family(compared, name) == "random"]
    return min(rivals, key=lambda name: abs(size[name] - size[ours]), default=None)


def _batch(compared: Comparison) -> str:
    return (
        f"{int(np.nanmax(compared['batch'].values))}"
        if "batch" in compared.metrics
        else "unknown size"
    )


def _cell(estimate: Estimate, scale: float, unit: str) -> str:
    """Mean in three digits, with its interval where that is wider than a twentieth of it."""
    mean, low, high = (
        # Zero but for rounding; three digits would show it as a power of ten.
        0.0 if abs(scale * v) < 1e-6 else scale * v
        for v in (estimate.mean, estimate.low, estimate.high)
    )
    if not np.isfinite(mean):
        return "-"
    spread = f" [{_short(low)}, {_short(high)}]" if high - low > abs(mean) / 20 else ""
    return f"{_short(mean)}{unit}{spread}"


def _short(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    run_script(section)
