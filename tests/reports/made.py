"""Recordings made of numbers instead of a model: known answers for the figures, in the layout
`record` writes.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

import avl
from avl import tokens
from avl_analysis import scenes
from avl_analysis.corpus.questions import Sample
from avl_analysis.evaluation.comparison import Comparison
from avl_analysis.evaluation.comparison import build as build_comparison
from avl_analysis.heads.ablation import Ablation, Silenced
from avl_analysis.heads.sinks import CONDITIONS
from avl_analysis.recordings.recording import Recording
from avl_reports.frontiers import Frontier

LAYERS, HEADS, GRID = 3, 4, 12
IMAGE, SYSTEM, QUESTION = GRID * GRID, 5, 8
PROMPT = SYSTEM + IMAGE + QUESTION
MODALITIES = list(tokens.MODALITIES)


def recording(
    samples: int = 6, steps: int = 9, *, hostile: bool = False, seed: int = 0
) -> Recording:
    """A recording of drawn scenes whose attention is made up: it lies on what the question is about
    in layer 1.

    Sample i makes `steps - i` decode steps. Image mass is 0.6, text 0.3, system 0.1, with a little
    noise. `hostile` puts markup into every text a recording can bring.
    """
    rng = np.random.default_rng(seed)
    names = [f"{i:06d}" for i in range(samples)]
    drawn = [scenes.generate(3, i, ("ocr", "colour")[i % 2]) for i in range(samples)]
    made = [_answer(sample, steps - i) for i, sample in enumerate(drawn)]
    coords = {
        "sample": np.array(names, dtype=object),
        "layer": np.arange(LAYERS),
        "head": np.arange(HEADS),
    }
    lengths = np.array([steps - i for i in range(samples)])
    reached = np.arange(steps + 1)[None] <= lengths[:, None]
    mass = np.array([0.1, 0.6, 0.3]) + rng.normal(0, 0.01, (samples, LAYERS, HEADS, steps + 1, 3))
    mass = np.where(reached[:, None, None, :, None], mass / mass.sum(-1, keepdims=True), np.nan)
    dims = ("sample", "layer", "head", "step", "key_modality")
    labels = {**coords, "step": np.arange(steps + 1), "key_modality": MODALITIES}
    counts = np.array([SYSTEM, IMAGE, QUESTION])
    statistics = xr.Dataset(
        {"modality_mass": (dims, mass), "efficiency": (dims, mass / counts)}, coords=labels
    )
    data = {
        "tokens": _tokens(names, lengths, steps),
        "sums": xr.Dataset(),
        "statistics": statistics,
        "maps": _maps(names, drawn, reached, rng),
        "attention": xr.Dataset(),
    }
    attrs = {
        "model": "made-up",
        "model_revision": "1",
        "model_class": "LlavaForConditionalGeneration",
        "date": "2025-01-01T00:00:00+00:00",
    }
    result = Recording(
        data, {**attrs, **({"model": "<script>alert(1)</script>"} if hostile else {})}
    )
    for name, sample, words in zip(names, drawn, made, strict=True):
        evil = "</script><img src=x onerror=alert(1)>$x$%{y}" if hostile else ""
        result.annotate(
            name,
            task=sample.task,
            prompt=sample.prompt + evil,
            answer=sample.answer,
            truth=sample.answer,
            words=[word + evil for word in words],
            boxes=[list(map(int, box)) for box in sample.boxes],
            scene={"seed": sample.seed, "index": sample.index, "task": sample.task},
        )
    return result


def _answer(sample: scenes.SceneSample, steps: int) -> list[str]:
    """The words of the right answer, as many as there are steps."""
    return (list(sample.answer) if sample.task == "ocr" else [sample.answer])[:steps]


def _tokens(names: list[str], lengths: np.ndarray, steps: int) -> xr.Dataset:
    total = PROMPT + steps
    place = np.full(total, -1)
    image = slice(SYSTEM, SYSTEM + IMAGE)
    modality = np.full(total, 2)
    modality[:SYSTEM] = 0
    modality[image] = 1
    row, column, picture = place.copy(), place.copy(), place.copy()
    row[image], column[image], picture[image] = np.arange(IMAGE) // GRID, np.arange(IMAGE) % GRID, 0
    fields = {
        "token_id": np.arange(total),
        "modality": modality,
        "image": picture,
        "row": row,
        "column": column,
        "tile": np.where(picture >= 0, 0, -1),
        "frame": np.full(total, -1),
        **{
            edge: np.where(picture >= 0, (place + beyond) / GRID, np.nan)
            for edge, place, beyond in (
                ("left", column, 0),
                ("top", row, 0),
                ("right", column, 1),
                ("bottom", row, 1),
            )
        },
    }
    phase = np.where(
        np.arange(steps + 1)[None] <= lengths[:, None], np.arange(steps + 1)[None] > 0, -1
    )
    return xr.Dataset(
        {
            key: (("sample", "position"), np.tile(values, (len(names), 1)))
            for key, values in fields.items()
        }
        | {
            "phase": (("sample", "step"), phase.astype(np.int8)),
            "prompt_length": (("sample",), np.full(len(names), PROMPT)),
            "modality_count": (
                ("sample", "key_modality"),
                np.tile([SYSTEM, IMAGE, QUESTION], (len(names), 1)),
            ),
        },
        coords={
            "sample": np.array(names, dtype=object),
            "key_modality": MODALITIES,
            "step": np.arange(steps + 1),
        },
    )


def _maps(
    names: list[str], drawn: list[scenes.SceneSample], reached: np.ndarray, rng: np.random.Generator
) -> xr.Dataset:
    """Layer 1 puts nine tenths of its image attention on the question's patches, the others are
    uniform.
    """
    scores = np.full((len(names), reached.shape[1], LAYERS, IMAGE), 1 / IMAGE)
    for i, sample in enumerate(drawn):
        scores[i, :, 1] = 0.1 / IMAGE
        scores[i, :, 1, list(sample.patches)] += 0.9 / len(sample.patches)
    scores *= 0.6
    scores[~reached] = np.nan
    return xr.Dataset(
        {"image_score": (("sample", "step", "layer", "token"), scores)},
        coords={
            "sample": np.array(names, dtype=object),
            "step": np.arange(reached.shape[1]),
            "layer": np.arange(LAYERS),
        },
    )


def comparison(
    samples: int = 240, *, random_size: float = 0.62, one_token: tuple[str, ...] = ()
) -> Comparison:
    """A comparison with known means: A-VL at 60 % of the bytes answers all rightly, random at 62 %
    every second. Bytes differ a little between samples, as they do between prompts.

    Args:
        samples: how many questions.
        random_size: share of the bytes that "random:0.6" uses.
        one_token: tasks to which the full cache's answers are one token and its end.
    """
    policies = {
        "full": avl.FullPolicy(),
        "a-vl": avl.AdaptivePolicy(),
        "random:0.6": avl.RandomPolicy(budget=0.6),
        "random:0.3": avl.RandomPolicy(budget=0.3),
    }
    known = {
        "full": (1.0, 1.0, 0.0),
        "a-vl": (0.6, 1.0, 0.01),
        "random:0.6": (random_size, 0.5, 0.4),
        "random:0.3": (0.3, 0.25, 2.0),
    }
    asked = [
        Sample(f"{i}", (), f"<q{i}>", ("a",), ("colour", "count")[i % 2]) for i in range(samples)
    ]
    results = {}
    for name, (size, right, kl) in known.items():
        for i in range(samples):
            correct = float(i % 4 < 4 * right)
            results[name, i] = {
                "kv_filled_share": size + 0.001 * (i % 5 - 2),
                "correct": correct,
                "kl": kl + 0.001 * i,
                "batch": 4.0,
                "text": "a",
            }
    attrs = {"reference": "full", "model": "made-up", "model_revision": "1", "max_new_tokens": 8}
    facts = {
        i: {"full_tokens": 2 if sample.task in one_token else 5} for i, sample in enumerate(asked)
    }
    return build_comparison(asked, policies, facts, results, attrs)


_EVIL = "</script><img src=x onerror=alert(1)>"


def ablation(*, same_layers: bool = False, hostile: bool = False) -> Ablation:
    """Nine of ten questions are right; with two visual heads silenced one is left, with two others
    five or seven.
    """
    groups = (
        Silenced("nothing", (), "1111111110"),
        Silenced("visual", ((1, 0), (2, 3)), "1000000000"),
        Silenced("random 1", ((0, 0), (0, 1)), "1111100000"),
        Silenced("random 2", ((0, 2), (1, 3)), "1111111000"),
    )
    ids, tasks = (
        tuple(f"q{i}" for i in range(10)),
        ("colour" + _EVIL * hostile,) * 5 + ("count",) * 5,
    )
    return Ablation(
        "visual",
        3,
        12,
        "made-up 1",
        ids,
        tasks,
        groups,
        "5 other questions",
        same_layers,
        "avl ablate",
    )


def frontier(*, hostile: bool = False) -> Frontier:
    """Eight questions of two tasks with answers of several tokens, four of one answered in one.

    All are right with the full cache and with A-VL's own settings; at half the bytes A-VL keeps six
    of the eight and random selection two, at a quarter both keep four. Batches hold more than the
    rows themselves at their ends.
    """
    right = {
        ("full", None): ("1111", "1111", 1.0),
        ("A-VL (paper)", None): ("1111", "1111", 0.55),
        ("A-VL", 0.5): ("1111", "1100", 0.5),
        ("A-VL", 0.25): ("1100", "1100", 0.25),
        ("random", 0.5): ("1000", "1000", 0.5),
        ("random", 0.25): ("0011", "0011", 0.26),
    }
    lines = [
        {
            "task": task,
            "policy": name,
            "budget": budget,
            "right": letters,
            "bytes": held,
            "filled": min(1.0, held + 0.1),
            "answer_tokens": 1 if task == "shape" else 3,
        }
        for (name, budget), (*both, held) in right.items()
        for task, letters in zip(
            ("colour" + _EVIL * hostile, "count", "shape"), (*both, "1110"), strict=True
        )
    ]
    return Frontier({"command": "avl frontier --out f.jsonl", "split": "comparison"}, lines)


def knockout() -> xr.Dataset:
    """Ten answers, three layers: the first flow costs 2 nats in layer 1 and nothing elsewhere, the
    others cost nothing; answers change where a nat or more is lost.
    """
    rng = np.random.default_rng(0)
    flows = ["image -> question", "image -> answer", "question -> last"]
    change = rng.normal(0, 0.01, (len(flows), LAYERS, 10))
    change[0, 1] -= 2.0
    dims = ("flow", "layer", "sample")
    return xr.Dataset(
        {
            "log_prob_change": (dims, change),
            "probability": (dims, np.exp(change) * 0.9),
            "same_answer": (dims, (change > -1).astype(float)),
            "plain_probability": ("sample", np.full(10, 0.9)),
            "answer": ("sample", np.full(10, "a")),
        },
        {"flow": flows, "layer": range(LAYERS), "sample": [f"q{i}" for i in range(10)]},
        {"model": "made-up", "model_revision": "1", "window": 1},
    )


def sinks() -> xr.Dataset:
    """Ten questions with eight image tokens: the first, on the ground, gets half of the picture's
    attention in layer 1; hidden it costs nothing, and it moves with its embedding.
    """
    rng = np.random.default_rng(0)
    count, tokens = 10, 8
    attention = np.ones((count, LAYERS, tokens))
    attention[:, 1] = 0.5 / 7 * tokens
    attention[:, 1, 0] = 0.5 * tokens
    by_condition = rng.normal(0, 0.005, (count, len(CONDITIONS)))
    unknown = np.full((count, LAYERS, tokens), np.nan)
    layers, of_token = ("sample", "layer"), ("sample", "layer", "token")
    return xr.Dataset(
        {
            "attention": (of_token, attention),
            "value_norm": (of_token, np.ones_like(attention)),
            "massive": (of_token, unknown),
            "input_norm": (("sample", "token"), np.ones((count, tokens))),
            "on_object": (("sample", "token"), np.tile([0.0, 1.0], (count, tokens // 2))),
            **{
                name: (layers, np.full((count, LAYERS), value))
                for name, value in (
                    ("image_mass", 0.8),
                    ("image_largest", 3.0),
                    ("first_mass", 0.01),
                    ("first_value_norm", 1.0),
                    ("first_largest", 3.0),
                )
            },
            "before": ("sample", 4 + rng.normal(0, 0.1, count)),
            "followed": ("sample", 3 + rng.normal(0, 0.1, count)),
            "stayed": ("sample", 1 + rng.normal(0, 0.1, count)),
            "log_prob_change": (("sample", "condition"), by_condition),
            "same_answer": (("sample", "condition"), np.ones_like(by_condition)),
            "hidden_attention": (("sample", "condition"), np.full_like(by_condition, 0.2)),
        },
        {
            "sample": [f"q{i}" for i in range(count)],
            "layer": range(LAYERS),
            "condition": list(CONDITIONS),
        },
        {
            "model": "made-up",
            "model_revision": "1",
            "signature": "concentration",
            "dimensions": "",
            "concentrated": 4.0,
            "drained": 0.5,
            "massive": 6.9,
            "draws": 3,
        },
    )
