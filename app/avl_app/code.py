"""The Python that gives what a view shows: text to copy, built from the values of the view.

Nothing here runs it; the tests do, and compare the figures.
"""

from __future__ import annotations

from collections.abc import Mapping

import avl
from avl_analysis.figures import Box
from avl_app.data import Question
from avl_app.examples import asked_scene


def asked(question: Question) -> str:
    """The model, the image and the question, as `vlm`, `image` and `sample`."""
    lines = [
        "from avl_analysis import Sample, load_model",
        "from avl_analysis.live import observe",
        "",
        f"vlm = load_model({question.model!r})",
    ]
    picture, prompt = question.picture, question.prompt
    if picture.scene is None:
        lines += [
            "from avl_analysis.models.images import open_image",
            "import numpy as np",
            "",
            f"image = np.asarray(open_image({picture.name!r}))  # the file that was sent",
            f'sample = Sample("question", (image,), {prompt!r})',
        ]
    else:
        scene = asked_scene(picture, prompt)
        seed, index = picture.scene
        task = scene.task if scene is not None else "caption"
        lines += [
            "from avl_analysis import scenes",
            "",
            f"image = scenes.generate({seed}, {index}, {task!r}).image",
            f'sample = Sample("question", (image,), {prompt!r})',
        ]
    return "\n".join(lines) + "\n"


def observed(question: Question) -> str:
    """The same, and the answer watched, as `seen`."""
    return asked(question) + f"seen = observe(vlm, sample, max_new_tokens={question.tokens})\n"


def token(
    question: Question,
    step: int,
    layer: int | None,
    head: int | None,
    boxes: tuple[Box, ...] = (),
) -> str:
    """The figure of Ask.

    Args:
        question: what was asked.
        step: number of the answer token.
        layer, head: the chosen ones; None for the mean.
        boxes: frames drawn over the picture.
    """
    arguments = f"{step}, layer={layer}, head={head}"
    if not boxes:
        return _plotted(question, "plot_token", arguments, "token")
    framed = ", ".join(map(repr, boxes))
    return "from avl_analysis.figures import Box\n" + _plotted(
        question, "plot_token", f"{arguments}, boxes=({framed},)", "token"
    )


def relevance(
    question: Question,
    step: int,
    layer: int | None,
    head: int | None,
    boxes: tuple[Box, ...] = (),
) -> str:
    """The relevance maps of Ask.

    Args:
        question: what was asked.
        step: number of the answer token.
        layer, head: the chosen ones; None for the mean.
        boxes: frames drawn over the picture.
    """
    framed = ", ".join(map(repr, boxes))
    return (
        "from avl_analysis import plot_relevance\n"
        + "from avl_analysis.relevance.maps import relevance\n"
        + ("from avl_analysis.figures import Box\n" if boxes else "")
        + observed(question)
        + f"found = relevance(vlm, sample, seen.answer.ids, {step})\n"
        + f"\nplot = plot_relevance(found, image, layer={layer}, head={head}"
        + (f", boxes=({framed},))\n" if boxes else ")\n")
        + 'plot.save("relevance.svg")  # or .png, .pdf, .html, .csv\n'
    )


def head_overlays(question: Question, step: int, layer: int) -> str:
    """The grid of a layer's heads."""
    return _plotted(question, "plot_head_overlays", f"{step}, layer={layer}", "head_overlays")


def over_answer(question: Question, layer: int | None, head: int | None) -> str:
    """The animation over the answer."""
    return _plotted(question, "plot_over_answer", f"layer={layer}, head={head}", "over_answer")


def _plotted(question: Question, function: str, arguments: str, name: str) -> str:
    return (
        f"from avl_analysis.answer_plots import {function}\n"
        + observed(question)
        + f"\nplot = {function}(seen, image, {arguments})\n"
        + f'plot.save("{name}.svg")  # or .png, .pdf, .html, .csv\n'
    )


def head_map(question: Question, measure: str, step: int | None) -> str:
    """The map of all heads in Heads."""
    return (
        "from avl_analysis import plot_heads\n"
        + observed(question)
        + f"\nplot = plot_heads(seen.recording, {measure!r}, step={step})\n"
        + 'plot.save("heads.svg")  # or .png, .pdf, .html, .csv\n'
    )


def pattern(source: str, name: str) -> str:
    """A figure of Patterns; `source` is code that gives `recording`."""
    return (
        source
        + f"""
from avl_analysis.figures.plot import Plot
from avl_reports import fig_{name}
from avl_reports.run import Run

plot = Plot(fig_{name}.section(Run(recording)).figure)
plot.save("{name}.svg")  # or .png, .pdf, .html, .csv
"""
    )


def recorded(question: Question) -> str:
    """The recording of the present answer, as `recording`."""
    return observed(question) + "recording = seen.recording\n"


def scenes_recorded(model: str, per_task: int, tokens: int) -> str:
    """The recording of drawn scenes, as `recording`."""
    return f"""from avl_analysis import load_model, scene_samples
from avl_analysis.corpus.record_samples import record_samples

vlm = load_model({model!r})
recording = record_samples(vlm, scene_samples({per_task}), max_new_tokens={tokens})
"""


def file_read(name: str) -> str:
    """The recording of a file, as `recording`."""
    return f"""from avl_analysis import load_recording

recording = load_recording({name!r})
"""


def policies(question: Question, chosen: Mapping[str, avl.Policy]) -> str:
    """Every policy's answer, what it held, and how far it is from the full cache.

    How far: its predictions along the full cache's answer.
    """
    return (
        "import avl\nfrom avl_analysis import live\n"
        + asked(question).replace("from avl_analysis.live import observe\n", "")
        + f"""
policies = {_named(chosen)}
full = live.answer(vlm, sample, avl.FullPolicy(), max_new_tokens={question.tokens})
for name, policy in policies.items():
    said = live.answer(vlm, sample, policy, max_new_tokens={question.tokens})
    off = live.disagreement(vlm, sample, policy, full.ids)
    print(name, said.text, said.usage.filled_share, off.agree.mean(), off.kl.mean())
"""
    )


def compared(model: str, source: str, chosen: Mapping[str, avl.Policy], tokens: int) -> str:
    """The comparison of Benchmark; `source` is an expression that gives the samples."""
    return f"""import avl
from avl_analysis import compare, load_model, read_samples, scene_samples

vlm = load_model({model!r})
samples = {source}
policies = {_named(chosen)}
result = compare(vlm, samples, policies, max_new_tokens={tokens})
print(result.table())
result.save("compare.nc")
"""


def _named(chosen: Mapping[str, avl.Policy]) -> str:
    """A dictionary of policies as Python writes it."""
    lines = [f"    {name!r}: avl.{policy!r}," for name, policy in chosen.items()]
    return "{\n" + "\n".join(lines) + "\n}"
