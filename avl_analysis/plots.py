"""Pictures of a recording from one line of Python.

    plot(recording, "modality_mass", by="layer")
    plot_heads(recording, "modality_mass/image").save("heads.svg")

Each function computes means with intervals, describes a figure and returns it as a `Plot`, which
shows itself in a notebook and saves itself as SVG, PDF, PNG, HTML or CSV. Questions, findings and
verdicts are the business of the report.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray

from avl import AdaptiveSession
from avl.places import token_boxes, token_tiles
from avl_analysis.errors import InputError
from avl_analysis.evaluation.frontier import one_token_tasks
from avl_analysis.evaluation.frontier import read as read_frontier
from avl_analysis.figures import (
    Axis,
    Caption,
    Figure,
    Line,
    Lines,
    Points,
    Rule,
    Scatter,
)
from avl_analysis.figures.looks import head_map, states_overlay, token_overlay
from avl_analysis.figures.patches import Patches
from avl_analysis.figures.plot import Plot
from avl_analysis.heads import taxonomy
from avl_analysis.intervals import METHOD, mean_intervals, wilson
from avl_analysis.models.images import ImageSource, open_image
from avl_analysis.recordings.image_tokens import images_of
from avl_analysis.recordings.recording import Recording
from avl_analysis.recordings.statistic_plot import caption_of, chosen_labels, statistic_of, stem
from avl_analysis.recordings.statistic_plot import plot as plot
from avl_analysis.scenes import generate as draw_scene


def plot_heads(
    recording: Recording, measure: str = "modality_mass/image", step: int | None = None
) -> Plot:
    """One number per head as a map of layers and heads.

    Args:
        recording: what `record` or `load_recording` gave.
        measure: a statistic with layers and heads; where it has a further dimension, a slash and
            the label, e.g. "modality_mass/image", "recent_text_mass/16".
        step: a single answer token (0 is the first); None for the mean over decode steps.

    Raises:
        InputError: the recording holds no such measure; the message lists those it holds.
    """
    chosen = taxonomy.measure(recording, measure)
    values = taxonomy.matrix(recording, chosen, step)
    layers = [int(layer) for layer in recording[chosen.name]["layer"].values]
    panel = head_map(values, layers, Axis(chosen.title, chosen.unit))
    of = "decode steps" if step is None else f"answer token {step}"
    figure = Figure(
        stem(measure),
        f"{chosen.title}, by layer and head",
        (panel,),
        caption_of(
            recording, f"Mean of {chosen.title} over samples and {of}.", interval="no interval"
        ),
    )
    return Plot(figure)


def plot_overlay(
    recording: Recording,
    image: ImageSource | None = None,
    *,
    sample: int | str = -1,
    step: int = 0,
    layer: int | None = None,
    head: int | None = None,
    number: int = 0,
) -> Plot:
    """Attention on each image token while one answer token is produced, laid over the image.

    Args:
        recording: what `record` or `load_recording` gave.
        image: the image that was asked about. None takes the one that was kept with the sample,
            which recordings of many questions do for samples with one image.
        sample: name, or place in `recording.samples`.
        step: the answer token, 0 for the first.
        layer: a decoder layer; None for the mean over layers.
        head: a query head, which needs a recording made with maps="heads"; None for the mean.
        number: which of the sample's images, 0 for the first.

    Raises:
        InputError: nothing recorded, no maps, an unknown sample, step, layer or head, no image, or
            image tokens whose places are not known.
    """
    name = "image_score" if head is None else "image_score_heads"
    array = statistic_of(recording, name)
    sample_name = recording.name_of(sample)
    labels = {
        "sample": sample_name,
        "step": step,
        **({} if layer is None else {"layer": layer}),
        **({} if head is None else {"head": head}),
    }
    # Called to refuse labels that are not there; the step is among them, so it adds none.
    chosen_labels(array, labels, None)
    images = images_of(recording.tokens.sel(sample=sample_name))
    if not 0 <= number < len(images):
        raise InputError(f"sample {sample_name} has {len(images)} image(s); there is no {number}")
    if not images[number].placed:
        raise InputError(
            f"where the image tokens of sample {sample_name} lie is not known, so they cannot be"
            " drawn over the image; docs/families.md says of which families it is"
        )
    values = array.sel(labels)
    values = values.mean("layer") if layer is None else values
    pixels = _picture(recording, sample_name, image)
    where = "mean over layers" if layer is None else f"layer {layer}"
    who = "mean over heads" if head is None else f"head {head}"
    # Scores are of all image tokens of the prompt in a row; `token` picks those of this image.
    panel = token_overlay(pixels, images[number].patches(values.values[images[number].token]))
    figure = Figure(
        "overlay",
        f"Attention for answer token {step}, {where}, {who}",
        (panel,),
        Caption(
            "Softmax weight of each image token, as a share of the whole row's attention, while"
            f" answer token {step} of sample {sample_name} was produced; {where}, {who}.",
            1,
            str(recording.attrs.get("model", "unknown")),
            "one answer has no interval",
        ),
    )
    return Plot(figure)


def plot_patches(
    session: AdaptiveSession,
    image: ImageSource,
    *,
    layer: int,
    step: int | None = None,
    row: int = 0,
    number: int = 0,
) -> Plot:
    """What A-VL did with each image token: core, secondary or minor, laid over the image.

    Args:
        session: what `avl.adaptive` gave, after an answer.
        image: the image that was asked about.
        layer: a decoder layer that the policy acted on.
        step: decode step, 0 for the prompt; None for the latest.
        row: row of the batch.
        number: which of the row's images, 0 for the first.

    Raises:
        InputError: no answer yet, an unknown layer, step, row or image, or unknown places.
    """
    selection = session.selection
    try:
        states = selection.state(layer, step)
    except ValueError as error:
        raise InputError(str(error)) from error
    layout = selection.layout
    if not 0 <= row < layout.batch or not 0 <= number < layout.images()[row]:
        raise InputError(f"there is no image {number} in row {row} of the batch")
    of_image = (layout.image[row] == number).nonzero().flatten().cpu()
    boxes, tile = token_boxes(layout, row)[of_image], token_tiles(layout, row)[of_image]
    if not bool(torch.isfinite(boxes).all(1).any()):
        raise InputError("where the image tokens lie is not known, so they cannot be drawn")
    # Where key/value heads differ, a token counts as what it is to the head that treats it best.
    codes = states[row].amax(0).cpu()[of_image].double()
    patches = Patches(codes.numpy(), boxes.double().numpy(), tile.long().numpy())
    panel = states_overlay(np.asarray(open_image(image)), patches)
    when = "the latest step" if step is None else f"decode step {step}" if step else "the prompt"
    caption = Caption(
        f"What layer {layer} holds and reads of the image after {when}.",
        1,
        type(session.model).__name__,
        "one answer has no interval",
    )
    return Plot(Figure("patches", f"Image keys in layer {layer}", (panel,), caption))


def plot_frontier(path: str | PathLike[str], tasks: Sequence[str] | None = None) -> Plot:
    """Share of right answers against bytes in use, one line per policy.

    Args:
        path: what `avl frontier` wrote.
        tasks: tasks to pool; None takes those with answers of several tokens (all if there are
            none), because a task answered in one token cannot show what a policy loses.

    Raises:
        InputError: no such file, or a task that is not in it.
    """
    about, lines = read_frontier(Path(path))
    known = list(dict.fromkeys(line["task"] for line in lines))
    if unknown := [task for task in tasks or () if task not in known]:
        raise InputError(f"no task {unknown[0]!r} in {path}; it holds {', '.join(known)}")
    if tasks is None:
        alone = one_token_tasks(lines)
        tasks = [task for task in known if task not in alone] or known
    chosen = [line for line in lines if line["task"] in tasks]
    series = []
    for place, policy in enumerate(dict.fromkeys(line["policy"] for line in chosen)):
        by_budget: dict[float | None, list[dict[str, Any]]] = {}
        for line in chosen:
            if line["policy"] == policy:
                by_budget.setdefault(line["budget"], []).append(line)
        points = sorted(_frontier_point(cell) for cell in by_budget.values())
        x, y, low, high = (np.array(column) for column in zip(*points, strict=True))
        series.append(Points(policy, x, y, low, high, slot=place, joined=len(points) > 1))
    panel = Scatter(
        Axis("bytes of keys and values in use", "share of the full cache", (0.0, 1.08)),
        Axis("right answers", "share", (0.0, 1.05)),
        tuple(series),
    )
    caption = Caption(
        f"Tasks: {', '.join(tasks)}. Bytes are those really in use when answers ended.",
        sum(line["samples"] for line in chosen if line["policy"] == chosen[0]["policy"]),
        str(about.get("model", about.get("settings", "unknown")))[:80],
        "bars: 95 % Wilson intervals over questions",
        of="answers",
    )
    return Plot(Figure("frontier", "Accuracy against bytes", (panel,), caption))


def _frontier_point(cell: Sequence[Mapping[str, Any]]) -> tuple[float, float, float, float]:
    """Bytes, accuracy and its interval over the pooled questions of one policy and budget."""
    # A mark per question: 1 right, 0 wrong, "-" not measured, which is left out.
    right = "".join(line["right"] for line in cell).replace("-", "")
    asked, correct = len(right), right.count("1")
    bytes_in_use = float(np.mean([line["bytes"] for line in cell]))
    return (bytes_in_use, correct / asked, *wilson(correct, asked))


def _picture(recording: Recording, sample: str, image: ImageSource | None) -> NDArray[np.uint8]:
    """The image that was passed, or the one kept with the sample."""
    if image is not None:
        return np.asarray(open_image(image))
    facts = recording.facts(sample)
    # A scene is drawn again from its seed, which gives the same picture.
    if scene := facts.get("scene"):
        return np.asarray(draw_scene(int(scene["seed"]), int(scene["index"]), scene["task"]).image)
    if "picture" in facts:
        # The picture is kept as a "data:" address, whose content stands behind the comma.
        return np.asarray(open_image(base64.b64decode(str(facts["picture"]).partition(",")[2])))
    raise InputError(f"sample {sample} keeps no image; pass the image that was asked about")


def plot_knockout(result: xr.Dataset, variable: str = "log_prob_change") -> Plot:
    """What an answer loses when a flow of attention is cut, by layer, one line per flow.

    Args:
        result: what `heads.knockout.knockout` or `load_knockout` gave.
        variable: "log_prob_change" (nats per answer token), "probability" or "same_answer" (share
            of answers that greedy decoding would still give).

    Raises:
        InputError: another variable.
    """
    titles = {
        "log_prob_change": Axis("change of the answer's log-probability", "nats per token"),
        "probability": Axis("probability of the answer", "share"),
        "same_answer": Axis("answers that stay the same", "share", (0.0, 1.05)),
    }
    if variable not in titles:
        raise InputError(f"unknown variable {variable!r}: choose one of {', '.join(titles)}")
    layers = result["layer"].values.astype(float)
    lines = []
    for place, flow in enumerate(result["flow"].values):
        means = mean_intervals(result[variable].sel(flow=flow).transpose("sample", ...))
        lines.append(Line(str(flow), layers, means.mean, means.low, means.high, slot=place + 1))
    window = int(result.attrs.get("window", 1))
    count = int(np.isfinite(result["plain_probability"]).sum())
    first = "layer" if window == 1 else f"first of {window} layers"
    caption = Caption(
        f"{titles[variable].label} when attention from the first group of tokens to the second is"
        f" cut in {window} layer(s); the model is led along its own answer.",
        max(count, 1),
        str(result.attrs.get("model", "unknown")),
        METHOD,
    )
    panel = Lines(Axis(first, "index"), titles[variable], tuple(lines), (Rule(0.0, "", "y"),))
    return Plot(Figure(f"knockout_{variable}", "Attention knock-out", (panel,), caption))


def knockout_table(result: xr.Dataset) -> pd.DataFrame:
    """Mean change of the answer's log-probability, a row per flow and a column per layer."""
    return result["log_prob_change"].mean("sample").to_pandas()
