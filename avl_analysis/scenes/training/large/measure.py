"""How the decoder attends and answers on fixed held-out samples.

Attention is read from the transformers module in float32; answers come from the packed forward pass
in bfloat16. Nothing here is used in a loss.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from avl_analysis.scenes import MODEL_DIR, questions, world
from avl_analysis.scenes.language import ASSISTANT, conversation, load_processor, pixel_values
from avl_analysis.scenes.questions import Question
from avl_analysis.scenes.samples import SPLITS
from avl_analysis.scenes.training import packed
from avl_analysis.scenes.training.batches import spell
from avl_analysis.scenes.training.large import conversations, texts
from avl_analysis.scenes.training.large.forward import packed_logits, text_logits
from avl_analysis.scenes.training.large.language import (
    ASSISTANT_ID,
    EOS_ID,
    IMAGE_TOKENS,
    OPENING,
)
from avl_analysis.scenes.training.large.reader import Reader, accuracy, labels
from avl_analysis.scenes.training.packed import Weights
from avl_analysis.scenes.world import Scene

WATCH_SEED = SPLITS["watch-large"]
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
    drawn = texts.rows(np.random.default_rng([WATCH_SEED, 0]), rows, length, bare)
    drawn = drawn.to(model.device)
    received, opening = [], []
    # Weights of all layers are held for 8 rows at a time.
    for part in range(0, rows, 8):
        out = model.model.language_model(
            # without a mask, a jump in the positions would be taken for the start of another text
            attention_mask=torch.ones_like(drawn.ids[part : part + 8]),
            input_ids=drawn.ids[part : part + 8],
            position_ids=drawn.positions[part : part + 8],
            output_attentions=True,
            use_cache=False,
        )
        stack = torch.stack(out.attentions)  # (layers, rows, heads, queries, keys)
        received.append(stack[..., 0].mean(-1))
        # Of rows behind the opening, the share of attention on it.
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
    ids = torch.tensor(
        [[*OPENING, *texts.conversation(rng, body)] for _ in range(rows)],
        device=model.device,
    )
    weights = dict(model.named_parameters())
    positions = torch.arange(length, device=model.device).expand(rows, -1)
    logits = text_logits(weights, model.config, ids, positions)
    # hit[i] says whether token i + 1 is foretold, so the answer is from the mark to just before the
    # end.
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
    # Sorted and summed up; the number of keys still below tau, and one more, reach it. The margin
    # is for rounding: a sum that equals tau must not ask for another key.
    ranked = (shares / shares.sum(-1, keepdim=True)).sort(-1, descending=True).values.cumsum(-1)
    return ((ranked < tau - 1e-6).sum(-1) + 1).float() / shares.shape[-1]


def image_tokens(
    weights: Weights, model: LlavaForConditionalGeneration, scenes: list[Scene]
) -> Tensor:
    """Projected image tokens of scenes."""
    pixels = pixel_values(np.stack([scene.image for scene in scenes])).to(model.device)
    return packed.project(weights, packed.vision(weights, model.config, pixels))


@torch.no_grad()
def reading(model: LlavaForConditionalGeneration, head: Reader) -> dict[str, float]:
    """Share of right names by group that the reader gives 64 held-out pictures."""
    rng = np.random.default_rng([WATCH_SEED, 3])
    scenes = [world.draw(rng) for _ in range(64)]
    pixels = pixel_values(np.stack([scene.image for scene in scenes])).to(model.device)
    features = packed.vision(dict(model.named_parameters()), model.config, pixels)
    named = {group: scores.cpu() for group, scores in head(features).items()}
    return accuracy(named, labels(scenes))


def _caption(scene: Scene) -> Question:
    question = questions.ask(np.random.default_rng(0), scene, "caption")
    assert question is not None  # every scene has a caption
    return question


def caption_tokens(processor: LlavaProcessor, scene: Scene) -> list[str]:
    """The tokens of a scene's caption, as the tokenizer spells them, without the end mark."""
    return processor.tokenizer.tokenize(_caption(scene).answer)


@torch.no_grad()
def caption_attention(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scene: Scene,
    spelled: bool = False,
) -> tuple[Tensor, range, int]:
    """Attention over a prompt and its caption (teacher forced), of either scenes model.

    Args:
        model: with attention that returns weights ("eager").
        processor: the model's.
        scene: what is captioned.
        spelled: whether the caption's words are cut into letters (of the small model's tokenizer).

    Returns:
        Weights (layers, heads, queries, keys), positions of the image tokens, row of the last
        prompt token, which is the first one that answers.
    """
    question = _caption(scene)
    answer = {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
    text = processor.apply_chat_template([*conversation(question.prompt), answer])
    inputs = processor(text=text, images=scene.image, return_tensors="pt").to(model.device)
    ids = inputs["input_ids"][0, :-1]  # nothing is asked of the row of the end mark
    mark = processor.tokenizer.convert_tokens_to_ids(ASSISTANT)
    last = int((ids == mark).nonzero()[-1])
    if spelled:
        ids = torch.cat([ids[: last + 1], torch.tensor(spell(question.answer)).to(ids.device)])
    out = model(
        input_ids=ids[None],
        pixel_values=inputs["pixel_values"],
        output_attentions=True,
        use_cache=False,
    )
    image = (ids == model.config.image_token_id).nonzero()[:, 0].tolist()
    return torch.cat(out.attentions).float(), range(image[0], image[-1] + 1), last


def describe_attention(weights: Tensor, image: range, last: int) -> dict[str, Tensor]:
    """What is read from the attention of one captioned picture; means over steps.

    Args:
        weights: (layers, heads, queries, keys) over prompt and caption.
        image: positions of the image tokens.
        last: row of the last prompt token, the first one that answers.

    Returns:
        By name, (layers, heads) for sinks (mean attention to a key of the prompt's rows that see
        it), else (layers,).
    """
    picture = slice(image.start, image.stop)
    prompt = weights[:, :, : last + 1]
    # Rows of the prompt that see each image token: under a causal mask a later token has fewer, and
    # a plain mean over rows would make it look less attended.
    seen = torch.ones_like(prompt[0, 0]).tril().sum(0)[picture]
    # From the last prompt token on, every row produces a token of the caption.
    steps, on_image = weights[:, :, last:], weights[:, :, last:, picture]
    head_mean, size = on_image.mean(1), int(BEST * len(image))
    best = torch.zeros_like(head_mean).scatter_(-1, head_mean.topk(size).indices, 1.0)
    found = {
        "sink": prompt[..., 0].mean(-1),
        "image_sink": (prompt[..., picture].sum(2) / seen).amax(-1),
        "first": steps[..., 0].mean((1, 2)),
        "system": steps[..., : image.start].sum(-1).mean((1, 2)),
        "image": on_image.sum(-1).mean((1, 2)),
        "keys95": coverage(on_image).mean((1, 2)),
        "keys95_head_mean": coverage(head_mean).mean(1),
    }
    for lag in LAGS:
        # Share of the best image tokens that two steps `lag` apart have in common.
        found[f"overlap{lag}"] = ((best[:, :-lag] * best[:, lag:]).sum(-1) / size).mean(1)
    return found


def image_attention(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: int = 32,
    spelled: bool = False,
) -> dict[str, Any]:
    """Attention while a caption is given (teacher forced), mean over held-out pictures.

    Args:
        model: with attention that returns weights ("eager").
        processor: the model's.
        samples: number of pictures, always the same ones.
        spelled: whether the captions' words are cut into letters.
    """
    rng = np.random.default_rng([WATCH_SEED, 1])
    each = [
        describe_attention(*caption_attention(model, processor, world.draw(rng), spelled))
        for _ in range(samples)
    ]
    stacked = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    mean = {name: values.mean(0) for name, values in stacked.items()}

    def share(values: Tensor) -> float:
        return round(float(values.float().mean()), 4)

    found: dict[str, Any] = {
        "sink_rate": share(stacked["sink"] > SINK_THRESHOLD),
        "sink_heads_over_0.2": share(mean["sink"] > 0.2),
        "sink_rate_image": share(stacked["image_sink"] > SINK_THRESHOLD),
        "keys95": share(mean["keys95"]),
        **{f"overlap{lag}": share(mean[f"overlap{lag}"]) for lag in LAGS},
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
    # As in training, so that the numbers are those of the weights' bfloat16 copies.
    weights = {n: p.detach().to(torch.bfloat16) for n, p in model.named_parameters()}
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    mix = {task: 1.0 for task in questions.TASKS if task != "caption"}
    for part in range(0, pictures, 8):
        rng = np.random.default_rng([WATCH_SEED, seed, part])
        scenes = [world.draw(rng) for _ in range(8)]
        batch = conversations.make(rng, scenes, mix).to(model.device)
        image = image_tokens(weights, model, scenes)
        places = torch.rand(8, IMAGE_TOKENS, generator=torch.Generator().manual_seed(part))
        shown = {
            "full": (image, None),
            "half": (image, (places > 0.5).to(model.device)),
            "quarter": (image, (places > 0.25).to(model.device)),
            # Each question with another picture of its eight: what is still right was not seen.
            "other": (image.roll(1, 0), None),
        }
        for name, (tokens, dropped) in shown.items():
            logits = packed_logits(weights, model.config, tokens, batch, dropped)
            # (B, R, L - 1); the spans name the positions whose successors belong to an answer.
            hit = (logits[..., :-1, :].argmax(-1) == batch.ids[..., 1:]).cpu()
            for task, b, r, first, last in batch.spans:
                right[name][task].append(bool(hit[b, r, first : last + 1].all()))
    return {
        name: {
            task: round(float(np.mean(by_task[task])), 3)
            for task in questions.TASKS
            if task in by_task
        }
        for name, by_task in right.items()
    }


def main() -> None:
    """Measure a model from the command line."""
    parser = argparse.ArgumentParser(description="Attention of a scenes model on captions.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder (default: shipped)")
    parser.add_argument("--samples", type=int, default=32)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(
        chosen.model, dtype=torch.float32, attn_implementation="eager"
    )
    found = image_attention(model, load_processor(chosen.model), chosen.samples)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
