"""What the model could have written at every token: probabilities of the likeliest next tokens.

`NextTokens` is given to `generate` as a logits processor and looks at every distribution a token is
chosen from; it changes nothing. Only the likeliest tokens are kept, so that memory does not grow
with the vocabulary. `sampling` gives the arguments of `generate` for answers that are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from avl_analysis.errors import InputError
from avl_analysis.models.loading import greedy

HOTTEST = 10.0
"""Highest temperature; far below it every token is about as likely as any other."""


@dataclass(frozen=True)
class NextToken:
    """The distribution that one token was chosen from.

    Attributes:
        ids: the likeliest tokens, the likeliest first.
        probabilities: theirs.
        chosen: id of the token that was written.
        probability: its probability.
        rank: number of tokens that were likelier, 0 for the likeliest.
        entropy: of the whole distribution, in nats.
    """

    ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    chosen: int
    probability: float
    rank: int
    entropy: float


class NextTokens(LogitsProcessor):
    """Remembers the distributions of the first row; passes all scores on as they are.

    The distribution is the softmax of the scores divided by the temperature, after the penalties
    and forbidden tokens of the model's generation settings: the one that is drawn from.

    Args:
        count: how many of the likeliest tokens are kept.
        temperature: 0 for greedy choice, which is shown at temperature 1.
    """

    def __init__(self, count: int, temperature: float = 0.0) -> None:
        self.count, self.temperature = count, temperature or 1.0
        self.tokens: list[NextToken] = []
        self._logs: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # (vocabulary,) of the first row.
        self._logs = torch.log_softmax(scores[0].float() / self.temperature, -1)
        return scores

    def note(self, chosen: int) -> None:
        """Say which token was chosen from the latest distribution."""
        assert self._logs is not None
        # Taken away, so that a second call without a new distribution fails.
        logs, self._logs = self._logs, None
        best = logs.topk(min(self.count, logs.numel()))
        shares = logs.exp()
        # a forbidden token has probability 0 and adds nothing: 0 log 0 = 0
        entropy = -(shares * logs.where(shares > 0, 0.0)).sum()
        self.tokens.append(
            NextToken(
                tuple(best.indices.tolist()),
                tuple(best.values.exp().tolist()),
                chosen,
                float(shares[chosen]),
                int((logs > logs[chosen]).sum()),
                float(entropy),
            )
        )


@contextmanager
def sampling(model: PreTrainedModel, temperature: float, seed: int) -> Iterator[dict[str, Any]]:
    """Arguments of `generate` for an answer at a temperature; greedy at 0.

    Above 0 every token is drawn from the softmax of the scores divided by the temperature, from the
    whole vocabulary. Inside the block torch's random numbers start at `seed`; behind it they go on
    as if nothing had been drawn.

    Args:
        model: what will generate.
        temperature: 0 to `HOTTEST`.
        seed: 0 or more.

    Raises:
        InputError: a temperature or seed out of range.
    """
    if not (math.isfinite(temperature) and 0 <= temperature <= HOTTEST):
        raise InputError(f"temperature {temperature}: choose 0 (greedy) to {HOTTEST:g}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed {seed}: choose a whole number of 0 or more")
    options = greedy(model)
    if temperature == 0:
        yield options
        return
    # top_k 0 and top_p 1 switch both cuts off, whatever the model's own settings say.
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    device = model.device
    # Forked on the model's device, where tokens are drawn; the CPU's state is always included.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield {**options, **drawn}
