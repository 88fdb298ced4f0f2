"""What the vision tower is trained on: telling the whole scene from the whole picture.

Fifteen learned queries attend over all patch features (no query and no patch is told where to look)
and name what is in each of the nine cells, the characters of the text, and its colour and place. No
patch has a label of its own. The reader is thrown away after training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avl_analysis.scenes.drawing import CHARACTERS, COLOURS, SHAPES
from avl_analysis.scenes.world import SIZES, Scene

CELLS, LONGEST = 9, 5
GROUPS = {
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "character": len(CHARACTERS),
    "cell": CELLS,
}
"""Number of classes; one more stands for "none"."""


class Reader(nn.Module):
    """Cross attention from learned queries, one hidden layer, and a classifier for every group."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        # Nine for the cells, five for the characters of the longest text, one for the text itself.
        self.queries = nn.Parameter(torch.randn(CELLS + LONGEST + 1, width))
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.norm, self.out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.hidden = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.classes = nn.Linear(width, sum(GROUPS.values()) + len(GROUPS))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits by group (B, queries of the group, classes + 1) from features (B, N, width)."""
        b, n, width = features.shape
        # Each (B, heads, patches, width / heads).
        k, v = self.kv(self.norm(features)).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = self.q(self.queries).view(-1, self.heads, width // self.heads).transpose(0, 1)
        mixed = (
            F.scaled_dot_product_attention(q.expand(b, -1, -1, -1), k, v)
            .transpose(1, 2)
            .reshape(b, -1, width)
        )
        x = self.queries + mixed
        # Every query has logits of all groups; below, those that it is asked for are picked.
        split = self.classes(x + self.hidden(self.out(x))).split(
            [size + 1 for size in GROUPS.values()], -1
        )
        logits = dict(zip(GROUPS, split, strict=True))
        text = slice(CELLS + LONGEST, None)
        return {
            **{group: logits[group][:, :CELLS] for group in ("colour", "shape", "size")},
            "character": logits["character"][:, CELLS : CELLS + LONGEST],
            "text_colour": logits["colour"][:, text],
            "cell": logits["cell"][:, text],
        }


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The truth in the order of the reader's queries; the last class of each group is "none"."""
    groups = ("colour", "shape", "size", "character", "text_colour", "cell")
    made: dict[str, list[list[int]]] = {group: [] for group in groups}
    for scene in scenes:
        colour, shape, size = [len(COLOURS)] * CELLS, [len(SHAPES)] * CELLS, [len(SIZES)] * CELLS
        for thing in scene.things:
            colour[thing.cell], shape[thing.cell] = (
                COLOURS.index(thing.colour),
                SHAPES.index(thing.shape),
            )
            size[thing.cell] = SIZES.index(thing.size)
        string = [CHARACTERS.index(c) for c in scene.text.string] if scene.text else []
        made["colour"].append(colour)
        made["shape"].append(shape)
        made["size"].append(size)
        made["character"].append(string + [len(CHARACTERS)] * (LONGEST - len(string)))
        made["text_colour"].append(
            [COLOURS.index(scene.text.colour) if scene.text else len(COLOURS)]
        )
        made["cell"].append([scene.text.cell if scene.text else CELLS])
    return {group: torch.tensor(values) for group, values in made.items()}


def loss(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """Mean over groups of the cross entropy of naming."""
    each = [
        F.cross_entropy(logits[group].flatten(0, 1), truth[group].flatten()) for group in logits
    ]
    return torch.stack(each).mean()


def accuracy(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Share of right names by group, over places where something is."""
    found = {}
    for group, scores in logits.items():
        there = truth[group] != scores.shape[-1] - 1
        found[group] = float((scores.argmax(-1) == truth[group])[there].float().mean())
    return found
