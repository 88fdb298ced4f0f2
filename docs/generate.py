"""Pages and pictures of the site that are made from the code: the statistics table, the gallery of
the report's figures, and the diagrams of the concept pages.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

GALLERY_SCENES = 24
"""Drawn scenes behind the gallery's figures; few, so that the site builds in minutes."""


def main(folder: Path) -> None:
    """Write everything below `folder`/generated, and the pages that show it."""
    target = folder / "generated"
    target.mkdir(exist_ok=True)
    statistics_table(folder / "statistics.md")
    diagrams(target)
    gallery(folder / "gallery.md", target)


def statistics_table(page: Path) -> None:
    """One section per statistic, from the statistics themselves."""
    from avl_analysis.statistics import catalogue

    text = [
        "# Statistics",
        "",
        "Every statistic is computed per sample while the model runs, without storing attention "
        "maps. `avl stats --list` prints this list, `recording[name]` gives the numbers, and "
        "`avl_analysis.plot(recording, name)` draws them. Undefined values are NaN. They describe "
        "what was read, not what an answer needs: silencing the nine heads of the embedded model "
        "that look most at the right place costs 35 % of right answers, nine drawn at random 69 % "
        "([what attention weights are evidence of](concepts/attention-as-evidence.md)).",
        "",
    ]
    for entry in catalogue():
        text += [f"## {entry['name']}", "", f"{entry['formula']}", ""]
        text += [f":Meaning: {entry['meaning']}", f":Unit: {entry['unit']}"]
        text += [f":Labels: {entry['labels']}"] if entry["labels"] else []
        text += [f":Source: {entry['source']}"]
        text += [f":Justifies: {entry['justifies'] or 'nothing'}", ""]
    page.write_text("\n".join(text), encoding="utf-8")


def gallery(page: Path, target: Path) -> None:
    """Every figure of the report, drawn from a small recording of the embedded model."""
    from avl_analysis import load_model, scene_samples
    from avl_analysis.corpus.record_samples import record_samples
    from avl_analysis.figures import draw_matplotlib
    from avl_analysis.scenes import TASKS
    from avl_reports.build import FIGURES
    from avl_reports.run import NotMeasured, Run

    per_task = max(1, GALLERY_SCENES // len(TASKS))
    samples = scene_samples(per_task, list(TASKS))
    run = Run(record_samples(load_model("scenes"), samples, max_new_tokens=48, maps="heads"))
    text = [
        "# Gallery of the report's figures",
        "",
        f"`avl report` makes these for any model. Here they show {len(samples)} drawn scenes and "
        "the embedded model, which is too few for most verdicts; the filed report in "
        "`reports/reference` uses more.",
        "",
    ]
    for module in FIGURES:
        name = getattr(module, "__name__", str(module))
        try:
            section = import_module(name).section(run)
        except NotMeasured:
            continue
        draw_matplotlib.save(section.figure, target, ["png"], dpi=110)
        text += [
            f"## {section.question}",
            "",
            f"![{section.figure.title}](generated/{section.figure.name}.png)",
            "",
            section.figure.caption.text,
            "",
            f"Module: `{name}`; `python -m {name} run.nc` draws it alone.",
            "",
        ]
    page.write_text("\n".join(text), encoding="utf-8")


# -- diagrams --------------------------------------------------------------------------------------

SYSTEM, IMAGE, TEXT = "#3b4754", "#0072b2", "#e69f00"


def diagrams(target: Path) -> None:
    """The pictures of the concept pages."""
    _tokens(target / "tokens.svg")
    _hooks(target / "hooks.svg")
    _recording(target / "recording.svg")
    _policy(target / "policy.svg")


def _canvas(width: float, height: float):  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def _box(axes, x, y, width, height, text, colour, light=True):  # type: ignore[no-untyped-def]
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="none"
        )
    )
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        color="white" if light else "#1f2328",
        fontsize=9,
    )


def _arrow(axes, start, end):  # type: ignore[no-untyped-def]
    style = {"arrowstyle": "-|>", "color": "#59636e", "lw": 1.2}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def _save(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def _tokens(path: Path) -> None:
    """The sequence of one question with one image, and where image tokens lie."""
    figure, axes = _canvas(8, 2.4)
    x = 0.2
    for text, colour, width in (
        ("system", SYSTEM, 1.0),
        *((f"image {i}", IMAGE, 0.62) for i in range(6)),
        ("question", TEXT, 1.1),
        ("answer ...", TEXT, 1.2),
    ):
        _box(axes, x, 1.5, width, 0.5, text, colour)
        x += width + 0.08
    axes.text(0.2, 2.15, "position in the sequence →", fontsize=9, color="#1f2328")
    for i in range(6):
        row, column = divmod(i, 3)
        _box(axes, 3.0 + 0.66 * column, 0.62 - 0.5 * row, 0.6, 0.42, str(i), IMAGE)
    axes.text(
        5.2,
        0.55,
        "row and column in the image,\nand the box of the image each token covers",
        fontsize=9,
        va="center",
        color="#1f2328",
    )
    _arrow(axes, (2.4, 1.45), (3.2, 1.1))
    _save(figure, path)


def _hooks(path: Path) -> None:
    figure, axes = _canvas(8, 2.6)
    _box(axes, 0.2, 1.1, 1.7, 0.6, "decoder layer\n(stock transformers)", "#59636e")
    _box(axes, 2.7, 1.1, 1.7, 0.6, "attention hooks", SYSTEM)
    _box(axes, 5.2, 1.9, 2.5, 0.5, "Intervention: a policy", "#d55e00")
    _box(axes, 5.2, 1.1, 2.5, 0.5, "the model's own kernel", "#59636e")
    _box(axes, 5.2, 0.3, 2.5, 0.5, "Observer: the recorder", IMAGE)
    for start, end in (
        ((1.95, 1.4), (2.65, 1.4)),
        ((4.45, 1.55), (5.15, 2.1)),
        ((4.45, 1.4), (5.15, 1.35)),
        ((4.45, 1.25), (5.15, 0.6)),
    ):
        _arrow(axes, start, end)
    _save(figure, path)


def _recording(path: Path) -> None:
    figure, axes = _canvas(8, 2.2)
    groups = (
        ("tokens", "modality, image,\nrow, column, box"),
        ("statistics", "per sample, layer,\nhead, step"),
        ("sums", "sums and counts,\ndivided on reading"),
        ("maps", "scores of image\ntokens per step"),
        ("attention", "raw weights of\nchosen rows"),
    )
    for i, (name, what) in enumerate(groups):
        x = 0.2 + 1.55 * i
        _box(axes, x, 1.3, 1.4, 0.5, name, IMAGE)
        axes.text(x + 0.7, 0.95, what, ha="center", va="top", fontsize=8, color="#1f2328")
    _save(figure, path)


def _policy(path: Path) -> None:
    figure, axes = _canvas(8, 2.6)
    labels = (("core", "#d55e00", 2), ("secondary", "#56b4e9", 3), ("minor", "#c3ccd6", 3))
    rows = (
        ("prompt", (True, True, True)),
        ("refresh", (True, True, False)),
        ("step", (True, False, False)),
    )
    for row, (what, read) in enumerate(rows):
        y, x = 1.9 - 0.75 * row, 1.5
        axes.text(0.2, y + 0.2, what, fontsize=9, va="center", color="#1f2328")
        for (name, colour, count), is_read in zip(labels, read, strict=True):
            for _ in range(count):
                _box(axes, x, y, 0.6, 0.4, "", colour if is_read else "#eef0f2")
                x += 0.66
            if row == 0:
                axes.text(x - 0.36 * count, y + 0.52, name, ha="center", fontsize=9)
            x += 0.15
    axes.text(1.5, 0.05, "coloured: read by this pass; grey: held or dropped, not read", fontsize=8)
    _save(figure, path)
