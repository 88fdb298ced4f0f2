"""Muon: momentum whose matrix updates are orthogonalised, shared out between processes.

For hidden weight matrices only (K. Jordan et al., "Muon: An optimizer for hidden layers in neural
networks", 2024): the momentum matrix is pushed towards the nearest orthogonal one by five steps of
a quintic Newton-Schulz iteration, so every direction of a matrix learns at one speed. Matrices of
one shape go through it as one batch, and each process does only its share of the batches; the flat
buffer that comes back is summed over processes by the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, from the source above."""


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly the orthogonal factor of each matrix.

    (n, rows, columns), bfloat16, singular values near 1.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    # Wide matrices have the smaller Gram matrix, (rows, rows).
    x = x.transpose(1, 2) if tall else x
    # The Frobenius norm is at least the largest singular value, so all of them start at 1 or less,
    # the range in which the iteration pushes them towards 1.
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        # x <- a x + (b G + c G G) x with G = x x^T: the odd quintic, applied to every singular
        # value.
        gram = x @ x.transpose(1, 2)
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.transpose(1, 2) if tall else x


class Muon:
    """Momentum state and updates for named matrices.

    ``rank`` of ``world`` processes computes its share.
    """

    def __init__(
        self, matrices: dict[str, Tensor], momentum: float = 0.95, rank: int = 0, world: int = 1
    ) -> None:
        self.matrices, self.momentum, self.world = matrices, momentum, world
        self.velocity = {name: torch.zeros_like(p) for name, p in matrices.items()}
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, p in matrices.items():
            shapes.setdefault(tuple(p.shape), []).append(name)
        # Of every shape each process takes its share, in one batch; a process may get none of a
        # shape.
        self.mine = [names[rank::world] for names in shapes.values() if names[rank::world]]
        self.offsets, at = {}, 0
        for name, p in matrices.items():
            self.offsets[name] = at
            at += p.numel()
        self.size = at

    def directions(self, gradients: dict[str, Tensor]) -> Tensor:
        """This process's share of the update as a flat float32 buffer of ``size``.

        Zero elsewhere.
        """
        flat = torch.zeros(self.size, device=next(iter(gradients.values())).device)
        ahead = {}
        for name, gradient in gradients.items():
            self.velocity[name].lerp_(gradient, 1 - self.momentum)
            # Nesterov momentum: the new gradient counts once more. Every process keeps the velocity
            # of every matrix; the gradients they are given are equal, so these stay equal too.
            ahead[name] = gradient.lerp(self.velocity[name], self.momentum)
        for names in self.mine:
            stack = orthogonalise(torch.stack([ahead[name] for name in names])).float()
            rows, columns = stack.shape[1:]
            # Tall matrices take larger steps, by the root of rows over columns.
            for name, update in zip(names, stack * max(1.0, rows / columns) ** 0.5, strict=True):
                flat[self.offsets[name] : self.offsets[name] + update.numel()] = update.reshape(-1)
        return flat

    @torch.no_grad()
    def apply(self, flat: Tensor, rate: float, decay: float = 0.0) -> None:
        """Subtract ``rate`` times the summed update from every matrix.

        Each is shrunk by ``rate * decay`` before.
        """
        for name, p in self.matrices.items():
            p.mul_(1 - rate * decay)
            p.sub_(flat[self.offsets[name] : self.offsets[name] + p.numel()].view_as(p), alpha=rate)
