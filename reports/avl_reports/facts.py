"""What page and document both say about a run: headings, facts, provenance, samples."""

from __future__ import annotations

from avl_reports.run import Run

LEAD = (
    "Where a vision-language model looks while it reads a prompt and while it answers, measured"
    " layer by layer and head by head, and what that says about the choices made in A-VL (adaptive"
    " attention for large vision-language models, AAAI 2025)."
)
READING = (
    "Attention weights are softmax weights of the model's own queries and keys. They say where a"
    " head reads, not what the answer is made of: a key with a large weight may carry a small"
    " value, and silencing the heads that look most at the right place may cost fewer right"
    " answers than silencing others (avl ablate tests it). System is everything before the first"
    " picture, image the positions that carry picture features, text everything after, generated"
    " tokens included. Step 0 is the last prompt row, step t the t-th decode step. Means are over"
    " samples: a number is first averaged within each sample over the heads, layers and steps that"
    " are not shown. Intervals are bootstrapped over samples (BCa, two-sided, 95 %), so they say"
    " how much another draw of samples would change the number; fewer than five samples have none."
)


def verdicts(tested: int) -> str:
    """How the table of findings is to be read, given how many there are."""
    return (
        "Each row holds one design choice of A-VL against one measured number. The verdict follows"
        " from the number's interval by the rule beside it: supported or not supported if the whole"
        " interval lies on one side of the threshold, undecided otherwise. Intervals are two-sided,"
        " cover 95 % each, and resample samples (questions), not heads, layers or steps; where two"
        " policies are compared, question by question, the text says “paired”."
        f" {tested} finding{'s were' if tested != 1 else ' was'} tested, each by itself: a number"
        " that lies exactly at its threshold gets a false verdict in 2.5 % of reports for either"
        " side, and nothing is corrected for the number of findings. Verdicts speak of this model"
        " on these samples."
    )


def heading(run: Run, title: str = "") -> str:
    """The title asked for, or one that names the model."""
    return title or f"Attention report: {run.model}"


def facts(run: Run) -> list[tuple[str, str]]:
    """Name and value of what a reader wants to know first."""
    attrs, recording = run.recording.attrs, run.recording
    sums = recording.tokens["modality_count"].sum("sample")
    phases = recording.tokens["phase"]
    # A recording may lack this statistic; layers and heads are then left out of the list.
    shape = run["modality_mass"].sizes if "modality_mass" in recording.names else {}
    # Samples without an expected answer are neither right nor wrong.
    known = [example for example in run.examples if example.truth]
    right = sum(example.correct for example in known)
    found = [
        ("model", run.model),
        ("class", str(attrs.get("model_class", ""))),
        ("layers x heads", f"{shape['layer']} x {shape['head']}" if shape else ""),
        ("samples", str(run.n)),
        ("answers exactly right", f"{right} of {len(known)}" if known else ""),
        ("image tokens per sample", f"{float(sums.sel(key_modality='image')) / run.n:.0f}"),
        ("decode steps", f"{int((phases > 0).sum())}"),
        ("recorded", str(attrs.get("date", ""))[:10]),
    ]
    # Facts of which the recording says nothing are left out.
    return [(name, value) for name, value in found if value]


def provenance(run: Run) -> list[tuple[str, str]]:
    """Everything the recording says about where it comes from, by name."""
    attrs = sorted(run.recording.attrs.items())
    return [(str(name).replace("_", " "), str(value)) for name, value in attrs if str(value)]
