"""How the decoder attends and answers on fixed held-out samples.

Attention is read from the transformers module in float32; answers come from the packed forward pass
in bfloat16. Nothing here is used in a loss.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from avl_analysis.scenes import questions, world
from avl_analysis.scenes.language import pixel_values
from avl_analysis.scenes.training import packed
from avl_analysis.scenes.training.large import conversations, texts
from avl_analysis.scenes.training.large.forward import packed_logits, text_logits
from avl_analysis.scenes.training.large.language import (
    ASSISTANT_ID,
    EOS_ID,
    IMAGE_TOKENS,
    OPENING,
    PREFIX,
)

WATCH_SEED = 910_000
SINK_THRESHOLD = 0.3  # Gu et al., When attention sink emerges (ICLR 2025), sec. 3
LAGS = (1, 3, 10)
BEST = 0.3


def _rounded(values: Tensor | np.ndarray, digits: int = 3) -> list[float]:
    return [round(float(v), digits) for v in values]


@torch.no_grad()
def text_attention(
    model: LlavaForConditionalGeneration, rows: int = 32, length: int = 224, bare: float = 0.0
) -> dict[str, Any]:
    """Sink rate and shares by layer on fixed rows of text."""
    ids, positions = texts.rows(np.random.default_rng([WATCH_SEED, 0]), rows, length, bare)
    received, opening = [], []
    for part in range(0, rows, 8):
        out = model.model.language_model(
            # without a mask, a jump in the positions would be taken for the start of another text
            attention_mask=torch.ones_like(ids[part : part + 8]),
            input_ids=ids[part : part + 8],
            position_ids=positions[part : part + 8],
            output_attentions=True,
            use_cache=False,
        )
        stack = torch.stack(out.attentions)  # (layers, rows, heads, queries, keys)
        received.append(stack[..., 0].mean(-1))
        opening.append(stack[..., len(OPENING) :, : len(OPENING)].sum(-1).mean(-1))
    first = torch.cat(received, 1)  # (layers, rows, heads)
    return {
        "sink_rate": round(float((first > SINK_THRESHOLD).float().mean()), 4),
        "sink_heads": round(float((first.mean(1) > SINK_THRESHOLD).float().mean()), 4),
        "first_token_by_layer": _rounded(first.mean((1, 2))),
        "system_by_layer": _rounded(torch.cat(opening, 1).mean((1, 2))),
    }


@torch.no_grad()
def text_answers(model: LlavaForConditionalGeneration, rows: int = 32, length: int = 224) -> float:
    """Share of questions about described scenes answered exactly, teacher forced, on fixed rows."""
    rng = np.random.default_rng([WATCH_SEED, 4])
    body = length - len(OPENING)
    ids = torch.tensor([[*OPENING, *texts.conversation(rng, body)] for _ in range(rows)])
    weights = dict(model.named_parameters())
    positions = torch.arange(length).expand(rows, -1)
    logits = text_logits(weights, model.config, ids, positions)
    hit = logits[:, :-1].argmax(-1) == ids[:, 1:]
    right = []
    for row, hits in zip(ids.tolist(), hit.tolist(), strict=True):
        begin = None
        for place, token in enumerate(row):
            if token == ASSISTANT_ID:
                begin = place
            elif token == EOS_ID and begin is not None:
                right.append(all(hits[begin:place]))
                begin = None
    return round(float(np.mean(right)), 4)


def coverage(shares: Tensor, tau: float = 0.95) -> Tensor:
    """Share of keys that holds ``tau`` of the attention on them: (...) from weights (..., keys)."""
    ranked = (shares / shares.sum(-1, keepdim=True)).sort(-1, descending=True).values.cumsum(-1)
    return ((ranked < tau - 1e-6).sum(-1) + 1).float() / shares.shape[-1]


@torch.no_grad()
def image_attention(model: LlavaForConditionalGeneration, samples: int = 32) -> dict[str, Any]:
    """Attention while a caption is given (teacher forced) about ``samples`` held-out pictures."""
    collected: dict[str, list[Tensor]] = defaultdict(list)
    rng = np.random.default_rng([WATCH_SEED, 1])
    for _ in range(samples):
        scene = world.draw(rng)
        question = questions.ask(rng, scene, "caption")
        assert question is not None  # every scene has a caption
        words, answering = conversations.tokens([question])
        weights = dict(model.named_parameters())
        image = packed.project(
            weights, packed.vision(weights, model.config, pixel_values(scene.image[None]))
        )
        table = model.get_input_embeddings()
        x = torch.cat([table(torch.tensor([OPENING])), image, table(torch.tensor([words[:-1]]))], 1)
        out = model.model.language_model(inputs_embeds=x, output_attentions=True, use_cache=False)
        stack = torch.cat(out.attentions)  # (layers, heads, queries, keys)
        start = PREFIX + answering.index(
            True
        )  # the last prompt token gives the first word of the answer
        first = stack[:, :, : start + 1, 0].mean(-1)
        collected["sink"].append(first)
        causal = stack[:, :, : start + 1, len(OPENING) : PREFIX]
        rows = torch.arange(start + 1)[:, None] >= torch.arange(len(OPENING), PREFIX)
        collected["image_sink"].append((causal.sum(2) / rows.sum(0)).amax(-1))
        steps = stack[:, :, start:]
        on_image = steps[..., len(OPENING) : PREFIX]
        collected["first"].append(steps[..., 0].mean((1, 2)))
        collected["system"].append(steps[..., : len(OPENING)].sum(-1).mean((1, 2)))
        collected["image"].append(on_image.sum(-1).mean((1, 2)))
        collected["keys95"].append(coverage(on_image).mean((1, 2)))
        collected["keys95_head_mean"].append(coverage(on_image.mean(1)).mean(1))
        best = torch.zeros(on_image.mean(1).shape).scatter_(
            -1, on_image.mean(1).topk(int(BEST * IMAGE_TOKENS)).indices, 1.0
        )
        for lag in LAGS:
            shared = (best[:, :-lag] * best[:, lag:]).sum(-1) / int(BEST * IMAGE_TOKENS)
            collected[f"overlap{lag}"].append(shared.mean(1))
        collected["image_norm"].append(image.norm(dim=-1).mean()[None])
    mean = {name: torch.stack(values).mean(0) for name, values in collected.items()}
    found: dict[str, Any] = {
        "sink_rate": round(
            float((torch.stack(collected["sink"]) > SINK_THRESHOLD).float().mean()), 4
        ),
        "sink_heads_over_0.2": round(float((mean["sink"] > 0.2).float().mean()), 4),
        "sink_rate_image": round(
            float((torch.stack(collected["image_sink"]) > SINK_THRESHOLD).float().mean()), 4
        ),
        "keys95": round(float(mean["keys95"].mean()), 4),
        **{f"overlap{lag}": round(float(mean[f"overlap{lag}"].mean()), 4) for lag in LAGS},
        "image_norm": round(float(mean["image_norm"]), 2),
    }
    by_layer = ("first", "system", "image", "keys95", "keys95_head_mean", "overlap3")
    return found | {f"{name}_by_layer": _rounded(mean[name]) for name in by_layer}


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration, pictures: int = 32, seed: int = 2
) -> dict[str, dict[str, float]]:
    """Exact match by task with the whole picture, a random half and quarter of it, and another one.

    Teacher forced, which for exact match of greedy answers is the same as generating. Image tokens
    are hidden from the tokens that answer, the last prompt token among them; the tokens of the
    question still see the whole picture.

    Args:
        model: what to measure.
        pictures: number of held-out pictures, a multiple of 8.
        seed: which held-out pictures.
    """
    weights = {n: p.detach().to(torch.bfloat16) for n, p in model.named_parameters()}
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    mix = {task: 1.0 for task in questions.TASKS if task != "caption"}
    for part in range(0, pictures, 8):
        batch = conversations.make(np.random.default_rng([WATCH_SEED, seed, part]), 8, mix)
        image = packed.project(weights, packed.vision(weights, model.config, batch.pixels))
        places = torch.rand(8, IMAGE_TOKENS, generator=torch.Generator().manual_seed(part))
        shown = {
            "full": (image, None),
            "half": (image, places > 0.5),
            "quarter": (image, places > 0.25),
            "other": (image.roll(1, 0), None),
        }
        for name, (tokens, dropped) in shown.items():
            hit = (
                packed_logits(weights, model.config, tokens, batch, dropped)[..., :-1, :].argmax(-1)
                == batch.ids[..., 1:]
            )
            for task, b, r, start, end in batch.spans:
                right[name][task].append(bool(hit[b, r, start : end + 1].all()))
    return {
        name: {
            task: round(float(np.mean(by_task[task])), 3)
            for task in questions.TASKS
            if task in by_task
        }
        for name, by_task in right.items()
    }
