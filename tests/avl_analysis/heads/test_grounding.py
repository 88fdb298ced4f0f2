"""Localisation heads and their boxes, against loops over patches, heads and pixels."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from avl_analysis import Recording, load_model, scene_samples
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError
from avl_analysis.heads.grounding import choose_heads, elbow, found_box, ground, iou
from tests import tiny
from tests.avl_analysis import shared
from tests.avl_analysis.models import folders

SIDE, GRID, BOXES = 48, 6, ((0, 0, 20, 20), (16, 24, 48, 40), (30, 2, 46, 14))


@pytest.fixture(scope="module")
def recording() -> Recording:
    """Nine questions, three about each of three pictures, whose boxes are known."""
    samples = [
        Sample(
            f"{picture}-{number}",
            (tiny.picture((SIDE, SIDE), seed=picture),),
            ("what is red", "where is blue?", "describe the image")[number],
            regions=(BOXES[picture],),
        )
        for picture in range(3)
        for number in range(3)
    ]
    vlm = shared.vlm(layers=3, grid=GRID)
    return record_samples(vlm, samples, max_new_tokens=2)


# -- the slow versions -----------------------------------------------------------------------------


def grids(recording: Recording) -> dict[str, np.ndarray]:
    """(layers, heads, rows, columns) weights of the last prompt row, sample by sample."""
    scores = recording.data["maps"]["image_score_last"]
    found = {}
    for name in recording.samples:
        rows = scores.sel(sample=name).transpose("layer", "head", "token").values
        found[name] = rows.reshape(*rows.shape[:2], GRID, GRID).astype(float)
    return found


def slow_entropy(grid: np.ndarray) -> float:
    above = np.clip(grid - grid.mean(), 0, None)
    share = [sum(above[cell] for cell in part) for part in parts(above > 0)]
    return -sum(one / sum(share) * math.log(one / sum(share)) for one in share)


def parts(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Connected cells with 8 neighbours, by flood fill."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    found = []
    while left:
        queue, part = deque([left.pop()]), []
        while queue:
            row, column = queue.popleft()
            part.append((row, column))
            for r in (row - 1, row, row + 1):
                for c in (column - 1, column, column + 1):
                    if (r, c) in left:
                        left.remove((r, c))
                        queue.append((r, c))
        found.append(part)
    return found


def slow_elbow(values: list[float]) -> float:
    ordered = sorted(values)
    (x0, y0), (x1, y1) = (0, ordered[0]), (len(ordered) - 1, ordered[-1])
    distances = [
        abs((y1 - y0) * x - (x1 - x0) * y + x1 * y0 - y1 * x0) / math.hypot(y1 - y0, x1 - x0)
        for x, y in enumerate(ordered)
    ]
    return ordered[distances.index(max(distances))]


def smoothed(grid: np.ndarray) -> np.ndarray:
    """Gaussian of a 24th of the grid, the border repeated, up to 4 widths away."""
    sigma = GRID / 24
    reach = int(4 * sigma + 0.5)
    weights = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)]
    result = np.zeros_like(grid)
    for row in range(GRID):
        for column in range(GRID):
            for dr, wr in enumerate(weights, -reach):
                for dc, wc in enumerate(weights, -reach):
                    r, c = min(max(row + dr, 0), GRID - 1), min(max(column + dc, 0), GRID - 1)
                    result[row, column] += wr * wc * grid[r, c] / sum(weights) ** 2
    return result


def slow_box(combined: np.ndarray) -> tuple[float, float, float, float]:
    top = np.unravel_index(int(combined.argmax()), combined.shape)
    part = next(p for p in parts(combined >= 0.5 * combined.max()) if tuple(top) in p)
    rows, columns = [r for r, _ in part], [c for _, c in part]
    return (
        min(columns) / GRID,
        min(rows) / GRID,
        (max(columns) + 1) / GRID,
        (max(rows) + 1) / GRID,
    )


def slow_iou(one: tuple[float, ...], other: tuple[float, ...], fine: int = 480) -> float:
    """By counting small squares."""
    masks = []
    for left, top, right, bottom in (one, other):
        mask = np.zeros((fine, fine), bool)
        mask[round(top * fine) : round(bottom * fine), round(left * fine) : round(right * fine)] = 1
        masks.append(mask)
    return (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()


# -- tests -----------------------------------------------------------------------------------------


def test_heads_are_those_that_loops_over_samples_choose(recording: Recording) -> None:
    maps = grids(recording)
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    sums = {h: np.mean([maps[n][h].sum() for n in recording.samples]) for h in heads}
    least = slow_elbow(list(sums.values()))
    passed = [h for h in heads if sums[h] >= least]
    lowest = max(1, min(10, len(passed) // 2))
    votes = dict.fromkeys(heads, 0)
    for name in recording.samples:
        ranked = sorted(passed, key=lambda h: slow_entropy(maps[name][h]))
        for head in ranked[:lowest]:
            votes[head] += 1
    found = choose_heads(recording, 2)
    assert found.elbow == pytest.approx(least)
    assert 0 < len(passed) < len(heads)
    for layer, head in heads:
        assert float(found.votes.sel(layer=layer, head=head)) == pytest.approx(
            votes[layer, head] / 9
        )
    assert set(found.heads) <= set(passed)
    assert votes[found.heads[0]] >= votes[found.heads[1]] >= sorted(votes.values())[-2]


def test_pointing_and_overlap_equal_loops_over_patches_and_pixels(recording: Recording) -> None:
    sets = {"one": [(0, 1)], "three": [(0, 0), (1, 2), (2, 3)]}
    found = ground(recording, sets)
    assert dict(found.sizes) == {"set": 2, "picture": 3}
    maps = grids(recording)
    for name, heads in sets.items():
        for picture, box in enumerate(BOXES):
            hits, ious = [], []
            for number in range(3):
                sample = recording.samples[3 * picture + number]
                combined = sum(smoothed(maps[sample][head]) for head in heads)
                row, column = np.unravel_index(int(combined.argmax()), combined.shape)
                inside = 0.0
                for y in range(8):  # pixels of the strongest patch
                    for x in range(8):
                        pixel = (8 * column + x, 8 * row + y)
                        inside += box[0] <= pixel[0] < box[2] and box[1] <= pixel[1] < box[3]
                hits.append(inside >= 32)
                ious.append(slow_iou(slow_box(combined), tuple(edge / SIDE for edge in box)))
                values, edges = found_box(recording, sample, heads)
                np.testing.assert_allclose(values.reshape(GRID, GRID), combined, rtol=1e-5)
                np.testing.assert_allclose(edges, slow_box(combined), atol=1e-6)
            one = found.sel(set=name).isel(picture=picture)
            assert float(one["pointing"]) == pytest.approx(np.mean(hits))
            assert float(one["iou"]) == pytest.approx(np.mean(ious), abs=0.01)
    assert 0 < float(found["iou"].max()) < 1


def test_the_elbow_is_the_point_farthest_from_the_chord() -> None:
    values = [0.0, 0.01, 0.02, 0.9, 0.95, 1.0]
    assert elbow(np.array(values)) == slow_elbow(values) == 0.02
    scaled = [1000 * value for value in values]
    assert elbow(np.array(scaled)) == 20.0
    assert elbow(np.full(4, 0.3)) == 0.3


def test_boxes_that_agree_touch_or_hold_each_other() -> None:
    unit = np.array([0.0, 0.0, 1.0, 1.0])
    assert iou(unit, unit) == 1.0
    assert iou(unit, np.array([1.0, 0.0, 2.0, 1.0])) == 0.0
    assert iou(unit, np.array([0.0, 0.0, 0.5, 0.5])) == 0.25


def test_recordings_without_boxes_scores_or_enough_heads_are_refused(recording: Recording) -> None:
    vlm = shared.vlm()
    plain = record_samples(vlm, shared.questions(2), max_new_tokens=1)
    with pytest.raises(InputError, match="no sample has one image and one known box"):
        ground(plain, {"one": [(0, 0)]})
    without = record_samples(vlm, shared.questions(1), max_new_tokens=1, maps="none")
    with pytest.raises(InputError, match="maps other than none"):
        choose_heads(without)
    with pytest.raises(InputError, match="fewer than 13"):
        choose_heads(recording, 13)


def test_the_embedded_model_points_at_objects_and_qwen_is_scored_too(tmp_path: Path) -> None:
    vlm = load_model("scenes")
    tasks = ["colour", "shape", "where"]
    first = record_samples(vlm, scene_samples(4, tasks, split="heads"), max_new_tokens=2)
    second = record_samples(vlm, scene_samples(4, tasks, split="recording"), max_new_tokens=2)
    chosen = choose_heads(first)
    found = ground(second, {"chosen": chosen.heads})
    assert float(found["pointing"].mean()) > 3 * float(found["area"].mean())
    qwen = load_model(folders.save_folder(tmp_path, "qwen2_vl"))
    scored = record_samples(qwen, scene_samples(1, tasks), max_new_tokens=2)
    found = ground(scored, {"chosen": choose_heads(scored, 1).heads})
    assert found.sizes["picture"] == 3
    assert bool(np.isfinite(found["iou"]).all())
