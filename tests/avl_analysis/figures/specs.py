"""One small figure of every kind, with awkward labels: what the drawing tests draw."""

import numpy as np

from avl_analysis.figures import (
    Animation,
    Axis,
    Bar,
    Bars,
    Box,
    Caption,
    Figure,
    Heat,
    Line,
    Lines,
    Overlay,
    Patches,
    Points,
    Rule,
    Scatter,
)

CAPTION = Caption(
    "Made-up numbers.", 12, "a <tiny> model", "bands are 95 % bootstrap intervals over samples"
)
RNG = np.random.default_rng(3)
STEP, SHARE, LAYER = (
    Axis("decode step", "tokens"),
    Axis("attention", "share", (0, 1)),
    Axis("layer", "index"),
)


def line(name: str, slot: int, role: str = "measured", level: float = 0.5) -> Line:
    x = np.arange(1, 21, dtype=float)
    y = level * np.exp(-x / 40)
    if role != "measured":
        return Line(name, x, y, slot=slot, role=role)
    return Line(name, x, y, y - 0.04, y + 0.05, slot=slot)


def lines() -> Lines:
    modalities = (
        line("system", 0, level=0.2),
        line("image", 1, level=0.7),
        line("text", 2, level=0.4),
    )
    others = (line("fit <b>$a$", 1, "fit", 0.68), line("random", 5, "baseline", 0.1))
    return Lines(
        STEP,
        SHARE,
        modalities + others,
        (Rule(3, "K = 3"), Rule(0.95, "target", "y")),
        "Mass by step",
    )


def log_lines() -> Lines:
    x = np.geomspace(1, 32, 6)
    gap = np.array([0.6, 0.5, np.nan, 0.4, 0.3, 0.2])
    return Lines(
        Axis("lag", "decode steps", (1, 32), log=True),
        SHARE,
        (Line("with a gap", x, gap, gap - 0.05, gap + 0.05, 3), Line("whole", x, x / 40, slot=4)),
        (Rule(8, "chosen"),),
        title="On a log axis",
    )


def heat(rows: int = 5, columns: int = 6) -> Heat:
    values = RNG.random((rows, columns))
    values[0, 0] = np.nan
    return Heat(
        Axis("head", "index"),
        LAYER,
        Axis("sparsity", "share", (0, 1)),
        values,
        annotate=True,
        title="Heads",
    )


def bars(horizontal: bool = False) -> Bars:
    values = np.array([0.9, 0.6, 0.75])
    series = (
        Bar("50 %", values, values - 0.05, values + 0.04, 1),
        Bar("random", values / 2, slot=2),
    )
    return Bars(
        Axis("task", "name"),
        SHARE,
        ("colour", "count", "<ocr> & $x$"),
        series,
        (),
        horizontal,
        "Accuracy by task",
    )


def scatter() -> Scatter:
    x = np.array([10.0, 20, 40])
    y = np.array([0.4, 0.8, 0.97])
    frontier = Points(
        "A-VL", x, y, y - 0.05, y + 0.02, ("10 %", "20 %", "40 %"), slot=1, joined=True
    )
    return Scatter(
        Axis("KV cache", "MB"),
        SHARE,
        (frontier, Points("random", x, y / 2, slot=5, joined=True)),
        title="Cost",
    )


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return ramp.astype(np.uint8)


def overlay(title: str = "“<image> $x$”") -> Overlay:
    patches = RNG.random((6, 8))
    patches[0, 0] = np.nan
    return Overlay(
        picture(),
        Axis("attention", "share of image mass", (0, 1)),
        Patches.grid(patches),
        boxes=(Box(8, 8, 30, 40, "star"),),
        title=title,
    )


def class_overlay(seed: int = 0) -> Overlay:
    classes = np.random.default_rng(seed).integers(0, 3, (6, 8)).astype(float)
    return Overlay(
        picture(),
        Axis("set", "class"),
        Patches.grid(classes),
        ("minor", "secondary", "core"),
        title=f"sets {seed}",
    )


def animation() -> Animation:
    return Animation(tuple(class_overlay(i) for i in range(3)), (0, 3, 6), title="Core over steps")


def figure(name: str, *panels, columns: int = 2) -> Figure:
    return Figure(name, f"Figure of {name}", panels, CAPTION, columns)


def gallery() -> list[Figure]:
    return [
        figure("curves", lines(), log_lines()),
        figure("maps", heat(), heat(20, 8)),
        figure("bars", bars(), bars(horizontal=True)),
        figure("cost", scatter(), columns=1),
        figure(
            "pictures",
            Overlay(picture(), SHARE, title="the picture"),
            overlay(),
            overlay("another"),
            columns=3,
        ),
        figure("sets", class_overlay(), columns=1),
        figure("animated", animation(), columns=1),
    ]
