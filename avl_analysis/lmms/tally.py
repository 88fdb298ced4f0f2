"""What answers cost while another program calls `generate`, and whether all of them were given.

Evaluation programs may swallow an exception of `generate` and score an empty answer. `Tally` keeps
every exception and counts answers, so that a run in which a policy failed ends with an error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

import avl
from avl import Policy, Usage


class TallyError(RuntimeError):
    """Answers are missing or failed; a score over them would not mean anything."""


@dataclass(frozen=True)
class AnswerCost:
    """The cost of one call of `generate`.

    Attributes:
        rows: questions in the batch.
        filled, full: bytes of keys and values in use at the end, and those of the stock cache; 0
            where no policy was on, since the stock cache is not counted.
        read: keys read per decode step / keys seen; 1.0 where no policy was on.
        ttft: seconds to the first token.
        tpot: seconds per further token of the batch; None where there was none.
    """

    rows: int
    filled: int
    full: int
    read: float
    ttft: float
    tpot: float | None


class _Clock(StoppingCriteria):
    """Notes when each token was there; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # Work on the device runs behind the program; without waiting, times would be of launches.
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Tally:
    """Inside its `with` block, every `model.generate` runs under the policy and is counted.

    Args:
        model: a loaded transformers model.
        policy: None leaves the model and its stock cache as they are.
    """

    def __init__(self, model: nn.Module, policy: Policy | None) -> None:
        self.model, self.policy = model, policy
        self.answers: list[AnswerCost] = []
        self.failures: list[Exception] = []
        self._session: avl.AdaptiveSession | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Tally:
        # If a step fails, those before it are undone; after the last, `pop_all` leaves that to
        # __exit__.
        with ExitStack() as stack:
            if self.policy is not None:
                self._session = stack.enter_context(avl.adaptive(self.model, self.policy))
            self.model.generate = self._generate  # an attribute of this one object
            stack.callback(self.model.__dict__.pop, "generate", None)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        clock = _Clock()
        criteria = [*(kwargs.pop("stopping_criteria", None) or []), clock]
        started = time.perf_counter()
        try:
            # The class's method: the model's own attribute is this function, which would call
            # itself.
            output = type(self.model).generate(
                self.model, *args, stopping_criteria=StoppingCriteriaList(criteria), **kwargs
            )
            usage = None if self._session is None else self._session.usage()
        except Exception as error:  # noted and raised again: lmms-eval swallows it
            self.failures.append(error)
            raise
        tokens = output if isinstance(output, Tensor) else output.sequences
        self.answers.append(_answer(len(tokens), usage, clock.times, started))
        return output

    def check(self, questions: int) -> None:
        """Make sure that every question was answered.

        Raises:
            TallyError: an answer failed, or there are fewer answers than questions.
        """
        if self.failures:
            first = self.failures[0]
            raise TallyError(
                f"{len(self.failures)} of {questions} questions failed under {self.policy!r}; the"
                f" first with {type(first).__name__}: {first}"
            ) from first
        answered = sum(answer.rows for answer in self.answers)
        if answered != questions:
            raise TallyError(
                f"{answered} of {questions} questions were put to the model; the others were left"
                " out by the evaluation, so scores and costs would be of different questions"
            )

    def summary(self) -> dict[str, float]:
        """Sums of bytes and means of the rest; what lmms-eval puts beside its scores."""
        return summarise(self.answers)


def summarise(answers: Sequence[AnswerCost]) -> dict[str, float]:
    """Number of questions, summed bytes, share of bytes, mean share of keys read, mean times."""
    full, filled = sum(a.full for a in answers), sum(a.filled for a in answers)
    # An answer of one token has no time per further token.
    later = [answer.tpot for answer in answers if answer.tpot is not None]
    count = max(len(answers), 1)
    found = {
        "avl_questions": float(sum(answer.rows for answer in answers)),
        "avl_kv_bytes": float(filled),
        "avl_kv_bytes_full": float(full),
        "avl_kv_bytes_share": filled / full if full else 1.0,
        "avl_keys_read_share": sum(answer.read for answer in answers) / count,
        "avl_ttft_seconds": sum(answer.ttft for answer in answers) / count,
    }
    return found | ({"avl_tpot_seconds": sum(later) / len(later)} if later else {})


def _answer(rows: int, usage: Usage | None, times: Sequence[float], started: float) -> AnswerCost:
    ttft = times[0] - started if times else float("nan")
    tpot = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    if usage is None:
        return AnswerCost(rows, 0, 0, 1.0, ttft, tpot)
    return AnswerCost(rows, usage.filled, usage.full, usage.attended_share, ttft, tpot)
