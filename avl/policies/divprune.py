"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.before_decoder import BeforeDecoderPolicy, ImageTokens, cosines


@dataclass(frozen=True, kw_only=True)
class DivPrunePolicy(BeforeDecoderPolicy):
    """Image tokens as different from each other as possible (DivPrune).

    Alvar et al., CVPR 2025, arXiv 2503.02175.

    Distance is one minus the cosine of two tokens' features behind the projector. The first token
    is the one whose nearest neighbour is farthest; then, again and again, the one whose distance to
    the tokens selected so far is largest.

    Deviations: all images of a prompt are pruned together, so that one of little variety keeps
    fewer tokens; tokens keep their positions, where the released program numbers them anew.
    """

    name: ClassVar[str] = "divprune"
    label: ClassVar[str] = "DivPrune"
    color_slot: ClassVar[int] = 14

    def select(self, tokens: ImageTokens, count: int) -> Tensor:
        distances = 1 - cosines(tokens.features)
        # A token's distance to itself, 0, must not count as its nearest neighbour's.
        others = distances + torch.diag(torch.full((len(distances),), torch.inf))
        selected = [int(others.amin(1).argmax())]
        # Kept up to date: distance of every token to the nearest selected one; -inf once it is
        # selected.
        nearest = distances[selected[0]].clone()
        nearest[selected[0]] = -torch.inf
        while len(selected) < count:
            token = int(nearest.argmax())
            selected.append(token)
            nearest = torch.minimum(nearest, distances[token])
            nearest[token] = -torch.inf
        return torch.tensor(selected)
