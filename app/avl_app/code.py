"""The Python that gives what a view shows: text to copy, built from the values of the view.

Nothing here runs it; the tests do, and compare the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import avl
from avl_analysis.figures import Box
from avl_app.data import Question
from avl_app.examples import asked_scene


def asked(question: Question) -> str:
    """The model, the image and the question, as `vlm`, `image` and `sample`."""
    # Every value is written with !r: a prompt with quotes or line feeds stays one literal and
    # cannot become code.
    lines = [
        "from avl_analysis import Sample, load_model",
        "from avl_analysis.live import observe",
        "",
        f"vlm = load_model({question.model!r})",
    ]
    picture, prompt = question.picture, question.prompt
    options = {"system": question.system, "history": question.history}
    given = "".join(f", {name}={value!r}" for name, value in options.items() if value)
    if picture.moving is not None:
        # A drawn video is made again from its numbers. Figures of one picture take its first frame.
        seed, index = picture.moving
        lines += [
            "from avl_analysis import Video, scenes",
            "",
            f"frames = scenes.moving({seed}, {index}).frames",
            "image = frames[0]",
            f'sample = Sample("question", (Video(frames),), {prompt!r}{given})',
        ]
    elif picture.scene is None:
        # The server never sees the path of a file that is sent, only its name.
        lines += [
            "from avl_analysis.models.images import open_image",
            "import numpy as np",
            "",
            f"image = np.asarray(open_image({picture.name!r}))  # the file that was sent",
            f'sample = Sample("question", (image,), {prompt!r}{given})',
        ]
    else:
        scene = asked_scene(picture, prompt)
        seed, index = picture.scene
        # All known questions of a scene share its picture (`examples.questions`), so for a question
        # of the visitor's own the caption's picture is the same.
        task = scene.task if scene is not None else "caption"
        lines += [
            "from avl_analysis import scenes",
            "",
            f"image = scenes.generate({seed}, {index}, {task!r}).image",
            f'sample = Sample("question", (image,), {prompt!r}{given})',
        ]
    return "\n".join(lines) + "\n"


def observed(question: Question) -> str:
    """The same, and the answer watched, as `seen`."""
    # Empty for a greedy answer.
    options = "".join(f", {name}={value!r}" for name, value in question.drawing.items())
    return (
        asked(question)
        + f"seen = observe(vlm, sample, max_new_tokens={question.tokens}{options})\n"
    )


def token(
    question: Question,
    step: int,
    layer: int | None,
    head: int | None,
    boxes: tuple[Box, ...] = (),
    top: float | None = None,
    whole: bool = False,
) -> str:
    """The figure of Ask.

    Args:
        question: what was asked.
        step: number of the answer token.
        layer, head: the chosen ones; None for the mean.
        boxes: frames drawn over the picture.
        top: attention on a patch that is drawn at full strength; None for the largest.
        whole: whether the view of the whole picture is drawn without its parts.
    """
    arguments = f"{step}, layer={layer}, head={head}" + (f", top={top}" if top else "")
    arguments += ", whole=True" if whole else ""
    if not boxes:
        return _plotted(question, "plot_token", arguments, "token")
    # The repr of a `Box` is the expression that makes it. The comma after the last one makes a
    # tuple of a single box too.
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
    whole: bool = False,
) -> str:
    """The relevance maps of Ask.

    Args:
        question: what was asked.
        step: number of the answer token.
        layer, head: the chosen ones; None for the mean.
        boxes: frames drawn over the picture.
        whole: as in `token`.
    """
    framed = ", ".join(map(repr, boxes))
    return (
        "from avl_analysis import plot_relevance\n"
        + "from avl_analysis.relevance.maps import relevance\n"
        + ("from avl_analysis.figures import Box\n" if boxes else "")
        + observed(question)
        + f"found = relevance(vlm, sample, seen.answer.ids, {step})\n"
        + f"\nplot = plot_relevance(found, image, layer={layer}, head={head}"
        + (f", boxes=({framed},)" if boxes else "")
        + (", whole=True)\n" if whole else ")\n")
        + 'plot.save("relevance.svg")  # or .png, .pdf, .html, .csv\n'
    )


def choices(question: Question, step: int) -> str:
    """What could have been written at a token."""
    return _of_answer(question, "plot_choices", str(step), "choices")


def words(question: Question, layer: int | None, head: int | None) -> str:
    """Attention from token to token.

    Args:
        question: what was asked.
        layer, head: the chosen ones; None for the mean.
    """
    return _of_answer(question, "plot_words", f"layer={layer}, head={head}", "words")


def patch(question: Question, chosen: Sequence[int], layer: int | None, head: int | None) -> str:
    """Which tokens looked at some patches.

    Args:
        question: what was asked.
        chosen: numbers of the image tokens.
        layer, head: the chosen ones; None for the mean.
    """
    arguments = f"{list(chosen)}, layer={layer}, head={head}"
    return _of_answer(question, "plot_patch", arguments, "patch")


def rollout(question: Question, step: int, layer: int | None, boxes: tuple[Box, ...] = ()) -> str:
    """Attention followed through the layers.

    Args:
        question: what was asked.
        step: number of the answer token.
        layer: the last layer that is followed; None for all.
        boxes: frames drawn over the picture.
    """
    framed = f", boxes=({', '.join(map(repr, boxes))},)" if boxes else ""
    return (
        "from avl_analysis.answer_plots import plot_rollout\n"
        "from avl_analysis.heads.rollout import rollout\n"
        + ("from avl_analysis.figures import Box\n" if boxes else "")
        + observed(question)
        + f"\nfound = rollout(vlm, sample, seen.answer.ids, {layer})\n"
        + f"plot = plot_rollout(seen, found, image, {step}{framed})\n"
        + 'plot.save("rollout.svg")  # or .png, .pdf, .html, .csv\n'
    )


def lens(question: Question) -> str:
    """What every layer would write."""
    return (
        "from avl_analysis.answer_plots import plot_lens\n"
        "from avl_analysis.heads.lens import logit_lens\n"
        + observed(question)
        + "\nfound = logit_lens(vlm, sample, seen.answer.ids)\n"
        + "plot = plot_lens(seen, found)\n"
        + 'plot.save("lens.svg")  # or .png, .pdf, .html, .csv\n'
    )


def without_head(question: Question, layer: int, head: int) -> str:
    """The answer while one head's output is zero.

    Args:
        question: what was asked.
        layer: its decoder layer.
        head: the query head.
    """
    options = "".join(f", {name}={value!r}" for name, value in question.drawing.items())
    return (
        "from avl_analysis.heads.ablation import silenced\n"
        "from avl_analysis.live import answer\n"
        # This code watches nothing, so the import of `observe` would be left unused.
        + asked(question).replace("from avl_analysis.live import observe\n", "")
        + f"\nwith silenced(vlm.model, [({layer}, {head})]):\n"
        + f"    said = answer(vlm, sample, max_new_tokens={question.tokens}{options})\n"
        + "print(said.text)\n"
    )


def patch_words(question: Question, depth: int) -> str:
    """The words of patches in Ask."""
    return (
        "from avl_analysis import plot_patch_words\n"
        + "from avl_analysis.heads.patch_words import patch_words\n"
        + asked(question).replace("from avl_analysis.live import observe\n", "")
        + "found = patch_words(vlm, sample)\n"
        + f"\nplot = plot_patch_words(found, image, {depth})\n"
        + 'plot.save("patch_words.svg")  # or .png, .pdf, .html, .csv\n'
    )


def head_overlays(question: Question, step: int, layer: int) -> str:
    """The grid of a layer's heads.

    Args:
        question: what was asked.
        step: number of the answer token.
        layer: the decoder layer whose heads are shown.
    """
    return _plotted(question, "plot_head_overlays", f"{step}, layer={layer}", "head_overlays")


def over_answer(question: Question, layer: int | None, head: int | None) -> str:
    """The animation over the answer.

    Args:
        question: what was asked.
        layer, head: the chosen ones; None for the mean.
    """
    return _plotted(question, "plot_over_answer", f"layer={layer}, head={head}", "over_answer")


def video(question: Question, step: int, layer: int | None, head: int | None) -> str:
    """The frames and the strip over time of Ask.

    Args:
        question: what was asked.
        step: number of the answer token.
        layer, head: the chosen ones; None for the mean.
    """
    arguments = f"frames, {step}, layer={layer}, head={head}"
    return _of_answer(question, "plot_video", arguments, "video")


def _plotted(question: Question, function: str, arguments: str, name: str) -> str:
    """A figure of the answer over the image."""
    return _of_answer(question, function, f"image, {arguments}", name)


def _of_answer(question: Question, function: str, arguments: str, name: str) -> str:
    """A figure of the answer."""
    return (
        f"from avl_analysis.answer_plots import {function}\n"
        + observed(question)
        + f"\nplot = {function}(seen, {arguments})\n"
        + f'plot.save("{name}.svg")  # or .png, .pdf, .html, .csv\n'
    )


def head_map(question: Question, measure: str, step: int | None) -> str:
    """The map of all heads in Heads.

    Args:
        question: what was asked.
        measure: key of the statistic that colours the map, such as "modality_mass/image".
        step: number of the answer token; None for all of the answer.
    """
    return (
        "from avl_analysis import plot_heads\n"
        + observed(question)
        + f"\nplot = plot_heads(seen.recording, {measure!r}, step={step})\n"
        + 'plot.save("heads.svg")  # or .png, .pdf, .html, .csv\n'
    )


def knockout(question: Question, per_task: int | None) -> str:
    """What answers lose when attention is cut.

    Args:
        question: what was asked.
        per_task: drawn scenes of each kind of question; None for the question alone.
    """
    samples = "[sample]"
    if per_task is not None:
        # the split that the view itself cuts (views/knockout.py)
        samples = f"scene_samples({per_task}, split='ablation')"
    return (
        observed(question)
        + f"""
from avl_analysis import scene_samples
from avl_analysis.figures.plot import Plot
from avl_analysis.heads.knockout import knockout
from avl_reports import fig_knockout
from avl_reports.run import Run

cut = knockout(vlm, {samples}, max_new_tokens={question.tokens})
run = Run(seen.recording, further={{"knockout": cut}})
plot = Plot(fig_knockout.section(run).figure)
plot.save("knockout.svg")  # or .png, .pdf, .html, .csv
"""
    )


def beside(files: Mapping[str, str], compared: str = "") -> tuple[str, str]:
    """What else was measured of the model, for figures and reports that show it.

    Args:
        files: name of a measurement, "ablation", "frontier" or one of `avl_reports.further` -> name
            of the file that was sent.
        compared: code that gives a comparison as `result`; empty for none.

    Returns:
        Code that reads it all, to follow what gives the recording, and the arguments that hand it
        to `Run` or `build`, each after a comma; two empty texts where there is nothing.
    """
    # The figure of the comparison itself is not what is shown here.
    before, arguments = compared.removesuffix(COMPARED), ", comparison=result" * bool(compared)
    imports, lines = [], []
    further = []
    for name, file in files.items():
        if name == "ablation":
            imports.append("from avl_analysis.heads.ablation import load_ablation")
            lines.append(f"ablations = [load_ablation({file!r})]")
            arguments += ", ablations=ablations"
        elif name == "frontier":
            imports.append("from avl_reports.frontiers import load_frontier")
            lines.append(f"frontier = load_frontier({file!r})")
            arguments += ", frontier=frontier"
        else:
            further.append(f"{name}={file}")
    if further:
        imports.append("from avl_reports.further import read_further")
        lines.append(f"further = read_further({further!r})")
        arguments += ", further=further"
    read = "\n".join([*imports, "", *lines, ""]) if lines else ""
    # Each part begins a line of its own behind the code that gives the recording.
    return "".join(f"\n{part}" for part in (before, read) if part), arguments


def pattern(source: str, name: str, measured: tuple[str, str] = ("", "")) -> str:
    """A figure of Patterns.

    Args:
        source: code that gives `recording`.
        name: of the figure.
        measured: what it shows beside the recording, see `beside`.
    """
    read, arguments = measured
    return (
        source
        + read
        + f"""
from avl_analysis.figures.plot import Plot
from avl_reports import fig_{name}
from avl_reports.run import Run

run = Run(recording{arguments})
plot = Plot(fig_{name}.section(run).figure)
plot.save("{name}.svg")  # or .png, .pdf, .html, .csv
"""
    )


def recorded(question: Question) -> str:
    """The recording of the present answer, as `recording`."""
    return observed(question) + "recording = seen.recording\n"


def scenes_recorded(model: str, per_task: int, tokens: int) -> str:
    """The recording of drawn scenes, as `recording`.

    Args:
        model: name of the model.
        per_task: scenes of each kind of question.
        tokens: longest answer, in tokens.
    """
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
    options = "".join(f", {name}={value!r}" for name, value in question.drawing.items())
    return (
        "import avl\nfrom avl_analysis import live\n"
        "from avl_analysis.policy_plots import plot_divergence\n"
        + asked(question).replace("from avl_analysis.live import observe\n", "")
        + f"""
policies = {_named(chosen)}
full = live.answer(vlm, sample, avl.FullPolicy(), max_new_tokens={question.tokens}{options})
differences = {{}}
for name, policy in policies.items():
    said = live.answer(vlm, sample, policy, max_new_tokens={question.tokens}{options})
    off = live.disagreement(vlm, sample, policy, full.ids)
    print(name, said.text, said.usage.filled_share, off.agree.mean(), off.kl.mean())
    if not isinstance(policy, avl.FullPolicy):
        differences[name] = off
if differences:
    plot = plot_divergence(differences)
    plot.save("divergence.svg")  # or .png, .pdf, .html, .csv
"""
    )


COMPARED = """
from avl_analysis.policy_plots import plot_comparison

plot = plot_comparison(result)
plot.save("compare.svg")  # or .png, .pdf, .html, .csv
"""
"""The figure of a comparison, `result`."""


def report(source: str, measured: tuple[str, str] = ("", "")) -> str:
    """The report.

    Args:
        source: code that gives `recording`.
        measured: what it shows beside the recording, see `beside`.
    """
    read, arguments = measured
    return (
        source
        + read
        + f"""
from avl_reports.build import build

built = build(recording, "report"{arguments})
print(built.page)
"""
    )


def compared(model: str, source: str, chosen: Mapping[str, avl.Policy], tokens: int) -> str:
    """The comparison of Benchmark.

    Args:
        model: name of the model.
        source: an expression that gives the samples.
        chosen: policies by the names they have on the page.
        tokens: longest answer, in tokens.
    """
    return f"""import avl
from avl_analysis import compare, load_model, read_samples, scene_samples

vlm = load_model({model!r})
samples = {source}
policies = {_named(chosen)}
result = compare(vlm, samples, policies, max_new_tokens={tokens})
print(result.table())
result.save("compare.nc")
{COMPARED}"""


def _named(chosen: Mapping[str, avl.Policy]) -> str:
    """A dictionary of policies as Python writes it."""
    # The repr of a policy is the expression that makes it, apart from the package's name.
    lines = [f"    {name!r}: avl.{policy!r}," for name, policy in chosen.items()]
    return "{\n" + "\n".join(lines) + "\n}"
