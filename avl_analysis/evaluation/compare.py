"""`compare`: the same questions under several policies, measured against the full cache.

Four groups of numbers, each of which can be left out:

    fidelity   teacher-forced on the full cache's own answer: KL divergence, top-1 agreement,
               perplexity
    text       answering freely: how far the answer agrees with the full cache's
    accuracy   answering freely: right or wrong, where the right answer is known
    cost       answering freely: bytes, keys read, operations, seconds

The yardstick of fidelity and text is the model as it was loaded, with the stock cache and no
policy; `FullPolicy` is measured like any other, and its zeros show that nothing but the policies
differs. Another policy is first in every batch, so that a machine that slows down slows all of
them.

A batch that fails is halved until the sample that fails is alone; that one is reported with its
reason and the others count. Note: rows of one batch share their seconds, so times are
those of this batch size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avl import FullPolicy, Policy
from avl.families import Family, describe
from avl_analysis.capture.provenance import provenance
from avl_analysis.corpus.batches import Failure, batches_of_similar_length, halve_on_failure
from avl_analysis.corpus.questions import Sample, describe_questions
from avl_analysis.corpus.scoring import common_prefix, correct, rouge_l
from avl_analysis.errors import InputError
from avl_analysis.evaluation.comparison import METRICS, Comparison, build
from avl_analysis.evaluation.flops import attention_flops, linear_flops
from avl_analysis.evaluation.generation import (
    Run,
    bytes_share_of_row,
    decode_texts,
    generate,
)
from avl_analysis.models.loading import VLM

Values = dict[str, Any]
"""What is known of one sample (under one policy): number, array over steps, or text, by variable
name.
"""


@dataclass(eq=False)
class Reference:
    """The full cache's answer to one sample.

    Attributes:
        tokens: its ids; text: as a reader sees it; prompt: true tokens of the prompt, None where it
            was not asked.
        log_probs: (steps, vocabulary) float32 on the CPU, or None if fidelity was not asked for.
    """

    tokens: list[int]
    text: str
    prompt: int | None
    log_probs: Tensor | None


def compare(
    vlm: VLM,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    metrics: Iterable[str] = METRICS,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure policies against the full cache on the same samples.

    Args:
        vlm: a loaded model.
        samples: questions; see `avl_analysis.corpus.questions`.
        policies: name -> policy, in the order of the result. A `FullPolicy` named "full" is put in
            front if there is none, since differences are taken to it.
        max_new_tokens: longest answer, in tokens.
        batch_size: samples per pass. Fidelity keeps batch_size x max_new_tokens x vocabulary x 4
            bytes of logits.
        metrics: which of "fidelity", "text", "accuracy", "cost". Without the first two the model
            runs once per policy.
        progress: called with (done, total) after every batch under every policy.

    Returns:
        The comparison; samples that failed are in `failures`, with NaN in their place.

    Raises:
        InputError: no samples, ids that repeat, policies that are none, unknown metrics, numbers
            below 1; or every single sample failed (with the first reason).
        UnsupportedModelError: the model cannot be adapted.
    """
    wanted = _check(samples, policies, metrics, max_new_tokens, batch_size)
    policies = _with_full(policies)
    names, done, total = list(policies), 0, len(samples) * len(policies)
    job = _Job(vlm, samples, max_new_tokens, wanted)
    facts: dict[int, Values] = {}
    results: dict[tuple[str, int], Values | Failure] = {}
    if "cost" in wanted:
        _warm_up(vlm, samples)
    for number, chunk in enumerate(batches_of_similar_length(vlm, samples, batch_size)):
        references = halve_on_failure(job.references, chunk)
        # chunk holds indices of samples; references come in the same order.
        facts |= {pair[0]: _facts(pair[1]) for pair in zip(chunk, references, strict=True)}
        failed = {i: r for i, r in zip(chunk, references, strict=True) if isinstance(r, Failure)}
        # A sample whose reference failed counts as failed under every policy.
        good = [(i, r) for i, r in zip(chunk, references, strict=True) if isinstance(r, Reference)]
        # Every batch begins with another policy: what the first one pays (caches of the processor,
        # clock speed) is not always the same policy's.
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            results |= {(name, i): failure for i, failure in failed.items()}
            measured = halve_on_failure(partial(job.measure, policies[name]), good)
            for (i, _), values in zip(good, measured, strict=True):
                results[name, i] = values
                if isinstance(values, dict) and "prompt_tokens" in values:
                    facts[i]["prompt_tokens"] = values.pop("prompt_tokens")
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    reasons = [value.reason for value in results.values() if isinstance(value, Failure)]
    if len(reasons) == len(results):
        raise InputError(
            f"none of the {len(samples)} samples could be measured; the first failed with:"
            f" {reasons[0]}"
        )
    attrs = {
        **provenance(vlm.model, job.family, ()),
        "questions": describe_questions(samples),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "metrics": " ".join(sorted(wanted)),
        "reference": next(
            name for name, policy in policies.items() if isinstance(policy, FullPolicy)
        ),
    }
    return build(samples, policies, facts, results, attrs)


# -- one batch -------------------------------------------------------------------------------------


class _Job:
    """What stays the same from batch to batch."""

    def __init__(
        self, vlm: VLM, samples: Sequence[Sample], max_new_tokens: int, wanted: frozenset[str]
    ) -> None:
        self.vlm, self.samples = vlm, samples
        self.max_new_tokens, self.wanted = max_new_tokens, wanted
        self.family = describe(vlm.model)
        self.linear = linear_flops(vlm.model) if "cost" in wanted else 0.0

    def references(self, part: Sequence[int]) -> list[Reference]:
        """The unadapted model's answers to some samples.

        Empty ones where nothing is compared with them.
        """
        if not self.wanted & {"fidelity", "text"}:
            return [Reference([], "", None, None) for _ in part]
        # One (batch, vocabulary) tensor for each step.
        steps: list[Tensor] = []

        def keep(step: int, logits: Tensor) -> None:
            # Log-probabilities leave the device at once: batch x steps x vocabulary numbers do not
            # fit there beside the model.
            steps.append(logits.float().log_softmax(-1).cpu())

        watch = keep if "fidelity" in self.wanted else None
        chosen = [self.samples[i] for i in part]
        run = generate(self.vlm, chosen, None, max_new_tokens=self.max_new_tokens, on_logits=watch)
        texts = decode_texts(self.vlm, run.tokens)
        return [
            Reference(
                tokens,
                text,
                prompt,
                # (steps, vocabulary): rows that ended go on in the batch, so each is cut at its own
                # answer.
                torch.stack([s[row] for s in steps[: len(tokens)]]) if steps else None,
            )
            for row, (tokens, text, prompt) in enumerate(
                zip(run.tokens, texts, run.prompt_tokens, strict=True)
            )
        ]

    def measure(self, policy: Policy, part: Sequence[tuple[int, Reference]]) -> list[Values]:
        """Everything about some samples under one policy."""
        samples = [self.samples[i] for i, _ in part]
        references = [reference for _, reference in part]
        found: list[Values] = [{} for _ in part]
        if "fidelity" in self.wanted:
            more = _fidelity(self.vlm, samples, references, policy, "cost" in self.wanted)
            # Led along the full cache's answer, so that both caches predict the same next token and
            # differences do not come from texts that have parted.
            found = [values | extra for values, extra in zip(found, more, strict=True)]
        # Nothing else needs an answer of the policy's own.
        if self.wanted == {"fidelity"}:
            return found
        run = generate(self.vlm, samples, policy, max_new_tokens=self.max_new_tokens)
        texts = decode_texts(self.vlm, run.tokens)
        for row, (values, sample, text) in enumerate(zip(found, samples, texts, strict=True)):
            values |= {
                "text": text,
                "tokens": len(run.tokens[row]),
                "correct": correct(text, sample),
            }
            values["prompt_tokens"] = run.prompt_tokens[row]
            if "text" in self.wanted:
                values |= _likeness(run.tokens[row], text, references[row])
            if "cost" in self.wanted:
                values |= _cost(run, row, self.family, self.linear)
        return found


def _likeness(tokens: Sequence[int], text: str, reference: Reference) -> Values:
    """How far a free answer agrees with the full cache's."""
    return {
        "exact_prefix": common_prefix(tokens, reference.tokens),
        "rouge_l": rouge_l(text, reference.text),
        "same_text": float(list(tokens) == reference.tokens),
    }


def _fidelity(
    vlm: VLM,
    samples: Sequence[Sample],
    references: Sequence[Reference],
    policy: Policy,
    time_attention: bool,
) -> list[Values]:
    """The policy's next-token distributions along the full cache's answers."""
    kl: list[list[float]] = [[] for _ in samples]
    agreement: list[list[float]] = [[] for _ in samples]
    nll: list[list[float]] = [[] for _ in samples]

    def watch(step: int, logits: Tensor) -> None:
        # Rows whose answer is over go on in the batch and are not counted.
        rows = [row for row, reference in enumerate(references) if step < len(reference.tokens)]
        if not rows:
            return
        full = torch.stack([references[row].log_probs[step] for row in rows])  # type: ignore[index]
        mine = logits[rows].float().log_softmax(-1).cpu()
        divergence = kl_divergence(full, mine).tolist()
        same = (full.argmax(-1) == mine.argmax(-1)).tolist()
        for at, row in enumerate(rows):
            kl[row].append(divergence[at])
            agreement[row].append(float(same[at]))
            # Of the full cache's token, not of the policy's likeliest.
            nll[row].append(-float(mine[at, references[row].tokens[step]]))

    run = generate(
        vlm,
        samples,
        policy,
        # Replaced by the longest of the forced answers.
        max_new_tokens=1,
        forced=[reference.tokens for reference in references],
        on_logits=watch,
        time_attention=time_attention,
    )
    found: list[Values] = []
    for row, reference in enumerate(references):
        values: Values = {
            "kl_by_step": np.array(kl[row]),
            "agreement_by_step": np.array(agreement[row]),
            "nll_by_step": np.array(nll[row]),
            "kl": np.mean(kl[row]),
            "agreement": np.mean(agreement[row]),
        }
        assert reference.log_probs is not None
        # (steps,) negative log-likelihood of the full cache's own tokens
        full = -reference.log_probs[
            torch.arange(len(reference.tokens)), torch.tensor(reference.tokens)
        ]
        values["perplexity"] = float(np.exp(np.mean(nll[row])))
        # exp(mean policy - mean full) - 1: the ratio of both perplexities, less 1.
        values["perplexity_change"] = float(
            np.exp(np.mean(nll[row]) - full.double().mean().item()) - 1
        )
        if time_attention and len(run.attention) > 1:
            # Without the prompt's pass: seconds per decode step.
            values["attention_seconds"] = float(np.mean(run.attention[1:]))
        found.append(values)
    return found


def kl_divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) in nats of log-probabilities or logits (rows, vocabulary).

    At least 0, exact zeros for equal rows.

    Normalised and summed in float64: normalisers rounded to float32 alone would show as 1e-8 nats.
    A token the full cache rules out (-inf) contributes nothing.
    """
    full, other = full.double().log_softmax(-1), other.double().log_softmax(-1)
    # Tokens ruled out by the full cache would give 0 * inf.
    terms = torch.where(full > -torch.inf, full.exp() * (full - other), 0.0)
    return terms.sum(-1).clamp_min(0.0)


def _cost(run: Run, row: int, family: Family, linear: float) -> Values:
    """Seconds of the batch.

    Bytes per row of it; keys the row's own decode steps attended to, mean over layers.
    """
    usage = run.usage
    assert usage is not None
    batch, last = len(run.tokens), usage.steps[-1]
    values: Values = {
        "ttft": run.ttft,
        "tpot": run.tpot,
        "batch": float(batch),
        "kv_filled": last.filled / batch,
        "kv_allocated": last.allocated / batch,
        "kv_bookkeeping": last.bookkeeping / batch,
        "kv_peak": usage.peak / batch,
        "kv_full": last.full / batch,
        "kv_filled_share": usage.filled_share,
        "kv_allocated_share": usage.allocated_share,
    }
    # Step 0 is the prompt, which produced the first token; an answer of n tokens took n - 1 steps.
    decode = usage.steps[1 : len(run.tokens[row])]
    # Where this row ended; others of the batch may have gone on.
    end = usage.steps[len(run.tokens[row]) - 1]
    values["keys_held"] = float(np.mean([layer[row] for layer in end.held]))
    values["keys_held_share"] = values["keys_held"] / (run.prompt_tokens[row] + len(decode))
    values["kv_row_share"] = bytes_share_of_row(run, row)
    if decode:
        # (steps, layers)
        keys = np.array([[layer[row] for layer in step.attended] for step in decode], dtype=float)
        attention = attention_flops(family, keys.sum(1).mean())
        values |= {"keys_attended_by_step": keys.mean(1), "keys_attended": keys.mean()}
        values |= {"attention_flops": attention, "step_flops": linear + attention}
    return values


def _facts(reference: Reference | Failure) -> Values:
    """What does not depend on a policy."""
    if isinstance(reference, Failure) or reference.prompt is None:
        return {}
    return {
        "full_text": reference.text,
        "full_tokens": len(reference.tokens),
        "prompt_tokens": reference.prompt,
    }


# -- at the door -----------------------------------------------------------------------------------


def _check(
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    metrics: Iterable[str],
    tokens: int,
    batch_size: int,
) -> frozenset[str]:
    wanted = frozenset([metrics] if isinstance(metrics, str) else metrics)
    if not wanted or not wanted <= set(METRICS):
        raise InputError(f"metrics {sorted(wanted)}: choose from {', '.join(METRICS)}")
    if not samples:
        raise InputError(
            "no samples to compare on: pass at least one, for example scene_samples(20)"
        )
    counts = Counter(sample.id for sample in samples)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise InputError(f"sample ids must differ; {', '.join(twice[:5])} occur more than once")
    if not policies:
        raise InputError('no policies to compare: pass for example {"A-VL": avl.AdaptivePolicy()}')
    for name, policy in policies.items():
        if not isinstance(policy, Policy):
            raise InputError(
                f"{name!r} is not a policy but {policy!r}; pass for example avl.AdaptivePolicy()"
            )
    for what, number in (("max_new_tokens", tokens), ("batch_size", batch_size)):
        if number < 1:
            raise InputError(f"{what} must be 1 or more; got {number}")
    return wanted


def _with_full(policies: Mapping[str, Policy]) -> dict[str, Policy]:
    if any(isinstance(policy, FullPolicy) for policy in policies.values()):
        return dict(policies)
    if "full" in policies:
        raise InputError(
            "the name 'full' is kept for avl.FullPolicy(), which everything is compared with;"
            " choose another"
        )
    return {"full": FullPolicy(), **policies}


def _warm_up(vlm: VLM, samples: Sequence[Sample]) -> None:
    """Pay once, and outside the clocks, for what happens only the first time.

    Failures show later.
    """
    halve_on_failure(
        lambda part: generate(vlm, part, FullPolicy(), max_new_tokens=2).tokens, list(samples[:1])
    )
