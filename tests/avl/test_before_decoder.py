"""Image tokens that leave before the decoder: which, against slow statements, and that nothing else
changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import avl
from avl.families import UnsupportedModelError
from avl.places import remember_originals
from avl.policies.downsample import grid_within
from tests import tiny
from tests.avl.generating import difference, generate

IMAGES = [1, 2, 0]


def inputs_of(model: Any) -> dict[str, Tensor]:
    return tiny.inputs(model, [9, 14, 20], images=IMAGES, between=4)


def embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What enters the decoder, (rows, tokens, width)."""
    seen: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def encoder_attention(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of each row: weights from the class token to each image token, summed over heads."""
    tower = model.model.vision_tower
    with torch.no_grad():
        out = tower(inputs["pixel_values"], output_attentions=True)
    weights = out.attentions[-2 if len(out.attentions) > 1 else 0][:, :, 0, 1:].sum(1)
    return [part.flatten() for part in weights.split(IMAGES)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def divprune(features: Tensor, saliency: Tensor, count: int) -> set[int]:
    n = range(len(features))
    far = [[1 - cosine(features[i], features[j]) for j in n] for i in n]
    chosen = [max(n, key=lambda i: min(far[i][j] for j in n if j != i))]
    while len(chosen) < count:
        others = [i for i in n if i not in chosen]
        chosen.append(max(others, key=lambda i: min(far[i][j] for j in chosen)))
    return set(chosen)


def scope(features: Tensor, saliency: Tensor, count: int) -> set[int]:
    n = range(len(features))
    like = [[cosine(features[i], features[j]) for j in n] for i in n]
    chosen: list[int] = []
    while len(chosen) < count:
        cover = [max([0.0, *(like[i][j] for j in chosen)]) for i in n]
        gain = {
            j: float(saliency[j]) * sum(max(like[i][j] - cover[i], 0.0) for i in n)
            for j in n
            if j not in chosen
        }
        chosen.append(max(gain, key=gain.__getitem__))
    return set(chosen)


def held_images(session: avl.AdaptiveSession, layer: int, row: int) -> list[int]:
    return session.selection.images(avl.State.CORE, layer)[row]


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (avl.DivPrunePolicy(budget_tokens=11), divprune),
        (avl.SCOPEPolicy(budget_tokens=11), scope),
        (avl.DivPrunePolicy(budget=0.7), divprune),
        (avl.SCOPEPolicy(budget=0.7), scope),
    ],
)
def test_the_tokens_that_go_on_are_those_of_the_slow_statement(
    policy: avl.BudgetPolicy, rule: Callable[[Tensor, Tensor, int], set[int]]
) -> None:
    model = tiny.llava(grid=5, kv_heads=2, attn="eager")
    inputs = inputs_of(model)
    features, saliency = embeddings(model, inputs), encoder_attention(model, inputs)
    with avl.adaptive(model, policy) as session:
        generate(model, inputs, 1)
    attended = session.usage().steps[0].attended
    for row in range(3):
        places = (inputs["input_ids"][row] == tiny.IMAGE).nonzero()[:, 0]
        tokens = int(inputs["attention_mask"][row].sum())
        others = tokens - len(places)
        allowed = others + 11 if policy.budget_tokens is not None else int(0.7 * tokens)
        count = min(allowed - others, len(places))
        expected = rule(features[row, places], saliency[row], count) if len(places) else set()
        for layer in range(2):
            assert held_images(session, layer, row) == sorted(int(places[i]) for i in expected)
            assert attended[layer][row] == others + max(count, 0)


def test_downsampling_averages_cells_of_the_grid() -> None:
    model = tiny.llava(grid=6, kv_heads=2)
    inputs = tiny.inputs(model, [9, 14], images=[1, 2], between=4)
    features = embeddings(model, inputs)
    shown: list[Tensor] = []
    hook = model.model.language_model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda module, args: shown.append(args[0].clone())
    )
    with avl.adaptive(model, avl.DownsamplePolicy(budget_tokens=9)) as session:
        generate(model, inputs, 1)
    hook.remove()
    places = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    grid = features[0, places].view(6, 6, -1)
    expected = {}
    for down in range(3):
        for across in range(3):
            cell = grid[2 * down : 2 * down + 2, 2 * across : 2 * across + 2]
            token = int(places[2 * down * 6 + 2 * across])
            expected[token] = cell.mean((0, 1))
    assert held_images(session, 0, 0) == sorted(expected)
    for token in expected:
        distances = (shown[0][0] - expected[token]).abs().amax(-1)
        assert float(distances.min()) < 1e-5
    # Two images share nine tokens, 4 and 5 of them; 5 allow for 1 x 5, which is no grid's shape.
    counts = [len(held_images(session, layer, 1)) for layer in (0, 1)]
    assert counts[0] == counts[1]
    assert 7 <= counts[0] <= 9


@pytest.mark.parametrize(
    ("grid", "count", "cells"),
    [((12, 12), 36, (6, 6)), ((12, 12), 144, (12, 12)), ((6, 12), 18, (3, 6)), ((5, 5), 1, (1, 1))],
)
def test_cells_keep_the_proportions_of_the_grid(
    grid: tuple[int, int], count: int, cells: tuple[int, int]
) -> None:
    assert grid_within(*grid, count) == cells


@pytest.mark.parametrize("policy", [avl.DivPrunePolicy, avl.SCOPEPolicy, avl.DownsamplePolicy])
def test_the_decoder_computes_what_it_computes_for_the_tokens_that_go_on(policy: Any) -> None:
    model = tiny.llava(grid=5, kv_heads=2)
    inputs = tiny.inputs(model, [14])
    hidden = embeddings(model, inputs)
    entered: list[Tensor] = []
    hook = model.model.language_model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda module, args: entered.append(args[0].clone())
    )
    with avl.adaptive(model, policy(budget_tokens=8)) as session:
        _, logits = generate(model, inputs, 6)
    hook.remove()
    state = session.selection.state(0, 0)[0, 0]
    positions = (state > avl.State.MINOR).nonzero()[:, 0]
    assert len(positions) < hidden.shape[1]
    with torch.no_grad():
        # The mask says that it is one sequence; gaps in the positions alone would mean several.
        out = model.model.language_model(
            inputs_embeds=entered[0],
            position_ids=positions[None],
            attention_mask=torch.ones(1, len(positions), dtype=torch.long),
            use_cache=False,
        )
        expected = model.lm_head(out.last_hidden_state[:, -1])
    assert difference(expected, logits[0]) < 1e-4
    text = torch.tensor([p not in range(3, 28) for p in positions.tolist()])
    assert torch.equal(entered[0][0, text], hidden[0, positions[text]])


def test_an_encoder_whose_attention_cannot_be_read_is_refused() -> None:
    model = tiny.llava()
    for layer in model.model.vision_tower.modules():
        if hasattr(layer, "q_proj"):
            layer.query = layer.q_proj
            del layer.q_proj
    with (
        pytest.raises(UnsupportedModelError, match="divprune does without"),
        avl.adaptive(model, avl.SCOPEPolicy()),
    ):
        pass
    with avl.adaptive(model, avl.FullPolicy()):
        pass  # nothing was left behind


def test_a_prompt_whose_image_does_not_pass_the_encoder_is_refused() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [9])
    with avl.adaptive(model, avl.SCOPEPolicy()):
        model(**inputs)
        with pytest.raises(ValueError, match="pixel_values"):
            model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
            )


@pytest.mark.parametrize("policy", [avl.DivPrunePolicy(), avl.FastVPolicy(prefill_layer=2)])
def test_a_decoder_that_adds_image_features_behind_the_filter_is_refused(
    policy: avl.Policy,
) -> None:
    model = tiny.llava(layers=4)
    # As Qwen3-VL's decoder is called: features for the outputs of its first three layers.
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {**kwargs, "deepstack_visual_embeds": [torch.zeros(16, 64)] * 3},
        ),
        with_kwargs=True,
        prepend=True,
    )
    with (
        avl.adaptive(model, policy),
        pytest.raises(UnsupportedModelError, match="after layer 4 at the earliest"),
    ):
        model(**tiny.inputs(model, [9]))
    hook.remove()


def test_downsampling_divides_every_frame_of_a_video_by_itself() -> None:
    """As it divides the same frames given as pictures; a video's tokens are otherwise one image."""
    model = tiny.llava(grid=4)
    batch = tiny.inputs(model, [9], images=3, between=4)
    policy = avl.DownsamplePolicy(budget=0.5)
    found = []
    for frames in ([[0, 0, 0]], [[3]]):
        shown = {name: tensor.clone() for name, tensor in batch.items()}
        remember_originals(shown, [[(24, 24)] * len(frames[0])], None, frames)
        with avl.adaptive(model, policy) as session:
            out = model.generate(**shown, max_new_tokens=4, do_sample=False)
        layout = session.selection.layout
        found.append((out.tolist(), session.selection.state(0).tolist(), layout.frame.max()))
    assert found[0][:2] == found[1][:2]
    assert (int(found[0][2]), int(found[1][2])) == (-1, 2)
