"""One batch, generated once.

Freely or along given tokens, under a policy or without, with its times and logits.

Teacher forcing goes through `generate()` too: a logits processor leaves only the next given token
possible, so that every pass (positions, masks, cache, a policy's decode step per token) is exactly
what free generation would have run. Logits are taken from the model's own output, before any
processor.

Attention is timed apart from the passes: everything that happens inside an attention module except
its projections, that is rotary embedding, cache update, attention and whatever the policy does.
That clock costs a little itself, so times per token come from runs without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from avl import Policy, Usage, adaptive
from avl.families import describe
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.models.loading import VLM, end_tokens, greedy

OnLogits = Callable[[int, Tensor], None]
"""Called after every pass with its step (0: the prompt) and the (batch, vocabulary) logits of the
next token.
"""


@dataclass(eq=False)
class Run:
    """What one call of `generate` did.

    Attributes:
        tokens: generated ids of each row, the end-of-sequence token included, padding behind it
            left out.
        prompt_tokens: true tokens of each row's prompt.
        ttft: seconds from the call to the first token.
        tpot: seconds per further token of the batch; NaN where there was only one.
        attention: seconds inside attention per pass, the prompt first; empty if not timed.
        usage: keys and bytes under the policy, None without a policy.
    """

    tokens: list[list[int]]
    prompt_tokens: list[int]
    ttft: float
    tpot: float
    attention: list[float]
    usage: Usage | None


def generate(
    vlm: VLM,
    samples: Sequence[Sample],
    policy: Policy | None,
    *,
    max_new_tokens: int,
    forced: Sequence[Sequence[int]] | None = None,
    on_logits: OnLogits | None = None,
    time_attention: bool = False,
    processor_time: bool = False,
) -> Run:
    """Greedy answers to a batch of samples.

    Args:
        vlm: a loaded model.
        samples: questions of one batch.
        on_logits: called after every pass.
        time_attention: whether attention is timed apart, which costs time itself.
        processor_time: whether that is time of this process's threads, which other work on the
            machine lengthens little, in place of elapsed time. On a CPU only.
        policy: None leaves the model as it is, with its stock cache.
        max_new_tokens: longest answer, in tokens.
        forced: tokens of each row to follow instead of the model's own choice.

    Raises:
        InputError: pictures or prompts that cannot be used; several questions, one of which
            continues a conversation. Whatever the model raises is passed on.
    """
    systems = {sample.system for sample in samples}
    if len(systems) > 1:
        raise InputError("the questions of one batch have different system prompts; ask them apart")
    system = next(iter(systems), None)
    if any(sample.history for sample in samples):
        if len(samples) > 1:
            raise InputError(
                f"a batch of {len(samples)} questions, of which some continue a conversation:"
                " ask these one at a time"
            )
        (one,) = samples
        inputs = vlm.prepare(list(one.images), one.prompt, system=system, history=one.history)
    else:
        inputs = vlm.prepare(
            [list(sample.images) for sample in samples],
            [sample.prompt for sample in samples],
            system=system,
        )
    length = int(inputs["input_ids"].shape[1])
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if forced is not None:
        # As many steps as the longest of the given answers has; shorter rows go on unseen.
        options["max_new_tokens"] = max(map(len, forced))
        options["logits_processor"] = LogitsProcessorList(
            [_Forced(forced, length, vlm.model.device)]
        )
    watch = _Watch(on_logits)
    clock: AbstractContextManager[list[float]] = (
        _attention_clock(vlm.model, processor_time) if time_attention else nullcontext([])
    )
    scope: AbstractContextManager[Any] = (
        adaptive(vlm.model, policy) if policy is not None else nullcontext(None)
    )
    # Attention is timed as it runs under the policy, whose own work is part of it.
    with torch.no_grad(), scope as session, clock as attention, watch.on(vlm.model):
        started = _now(vlm.model)
        out = vlm.model.generate(**inputs, **greedy(vlm.model), **options)
    # A pass for each new token: the prompt's gives the first.
    steps = int(out.shape[1]) - length
    times = watch.times[:steps]
    return Run(
        tokens=[_until_end(row, vlm.model) for row in out[:, length:].tolist()],
        prompt_tokens=inputs["attention_mask"].sum(1).tolist(),
        ttft=times[0] - started,
        tpot=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else float("nan"),
        attention=list(attention)[:steps],
        usage=session.usage() if session is not None else None,
    )


def decode_texts(vlm: VLM, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Generated ids as text, special tokens left out."""
    return [
        text.strip()
        for text in vlm.processor.batch_decode(
            [list(row) for row in tokens], skip_special_tokens=True
        )
    ]


def _until_end(row: list[int], model: nn.Module) -> list[int]:
    ends = end_tokens(model)
    # The end token belongs to the answer, the padding behind it does not.
    return next((row[: at + 1] for at, token in enumerate(row) if token in ends), row)


class _Forced(LogitsProcessor):
    """Leaves one token possible at every step.

    The given one (rows that are through may take any).
    """

    def __init__(self, tokens: Sequence[Sequence[int]], prompt: int, device: torch.device) -> None:
        longest = max(map(len, tokens))
        # Rows that are through repeat their last token; what is predicted there is not looked at.
        padded = [[*row, *[row[-1]] * (longest - len(row))] for row in tokens]
        self.tokens = torch.tensor(padded, device=device)
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Probability 0 for every token but one; the score of that one does not matter.
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, self.tokens[:, input_ids.shape[1] - self.prompt, None], 0.0)


@dataclass(eq=False)
class _Watch:
    """A hook at the end of every pass: the time, and the logits if somebody wants them."""

    on_logits: OnLogits | None
    times: list[float] = field(default_factory=list)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.times.append(_now(model))
            if self.on_logits is not None:
                # (batch, positions, vocabulary), of which the last position predicts the next
                # token.
                self.on_logits(len(self.times) - 1, output.logits[:, -1])

        handle = model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _attention_clock(model: nn.Module, processor_time: bool = False) -> Iterator[list[float]]:
    """Seconds inside attention modules but outside their linear projections.

    One number per pass through the model.
    """
    passes: list[float] = []
    # A list, so that the functions below change the same number.
    current = [0.0]

    def now() -> float:
        return time.process_time() if processor_time else _now(model)

    # Entering attention subtracts the time, leaving it adds it; around a linear projection inside
    # it the other way round, so that these do not count.
    def start(*_: Any) -> None:
        current[0] -= now()

    def stop(*_: Any) -> None:
        current[0] += now()

    def finish(*_: Any) -> None:
        passes.append(current[0])
        current[0] = 0.0

    handles = []
    try:
        for module in attention_modules(model):
            handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
            # Projections may lie in a module inside the attention module.
            for inner in module.modules():
                if isinstance(inner, nn.Linear):
                    handles += [
                        inner.register_forward_pre_hook(stop),
                        inner.register_forward_hook(start),
                    ]
        handles.append(model.register_forward_hook(finish))
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The decoder's attention modules: the innermost ones that know the index of their layer."""
    having = [
        m
        for m in describe(model).decoder.modules()
        if isinstance(getattr(m, "layer_idx", None), int)
    ]
    # A module around attention may know the layer's index, too (a whole decoder layer).
    return [
        m for m in having if not any(other is not m for other in m.modules() if other in having)
    ]


def _now(model: nn.Module) -> float:
    """Seconds on a clock that only runs forward.

    Taken after all work given to the model's device is done.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bytes_share_of_row(run: Run, row: int) -> float:
    """Bytes of a row when its answer ended, as a share of the stock cache's.

    Of keys and values, for the same tokens; whatever its neighbours in the batch held or did later.

    Args:
        run: answers under a policy, with their usage.
        row: which of the batch.
    """
    assert run.usage is not None
    # The pass that produced the row's last token; step 0 produced the first.
    end = run.usage.steps[len(run.tokens[row]) - 1]
    # Bytes of one token in the stock cache, all layers. `full` counts padding too, as the stock
    # cache holds it; the share below counts true tokens only.
    of_token = end.full / (end.seen * len(end.by_row))
    return end.by_row[row] / (of_token * (run.prompt_tokens[row] + len(run.tokens[row]) - 1))
