"""The packed forward pass computes what the transformers module computes, branch by branch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avl_analysis.scenes import questions, world
from avl_analysis.scenes.training import batches, packed, train
from avl_analysis.scenes.training.architecture import build_model
from avl_analysis.scenes.training.muon import Muon, orthogonalise


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    model = build_model(seed=1, width=64, vision_layers=2, text_layers=3)
    with torch.no_grad():  # larger than freshly drawn, so that attention is far from uniform
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(5)
    return model.eval()


@pytest.fixture(scope="module")
def batch() -> batches.Batch:
    return batches.make(np.random.default_rng(4), 2, batches.LAST_MIX)


def _packed_logits(model, batch: batches.Batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
    weights = dict(model.named_parameters())
    image = packed.project(weights, packed.vision(weights, model.config, batch.pixels))
    return packed.decode(weights, model.config, image, batch)


def test_packed_logits_equal_the_modules_for_every_branch_alone(
    model, batch: batches.Batch
) -> None:  # type: ignore[no-untyped-def]
    found = _packed_logits(model, batch).detach()
    place = {int(flat): i for i, flat in enumerate(batch.scored)}
    compared = 0
    for b in range(len(batch.ids)):
        for r in range(batches.ROWS_PER_PICTURE):
            for n in range(int(batch.branch[b, r].max()) + 1):
                at = (batch.branch[b, r] == n).nonzero()[:, 0]
                ids = torch.tensor([[*batches.prefix_ids(), *batch.ids[b, r, at].tolist()]])
                with torch.no_grad():
                    alone = model(input_ids=ids, pixel_values=batch.pixels[b : b + 1]).logits[
                        0, batches.PREFIX :
                    ]
                for j, flat in enumerate(
                    ((b * batches.ROWS_PER_PICTURE + r) * batches.ROW + at).tolist()
                ):
                    if flat in place:
                        torch.testing.assert_close(
                            found[place[flat]], alone[j], atol=2e-4, rtol=2e-4
                        )
                        compared += 1
    assert compared == len(batch.scored)


def test_gradients_of_the_hand_written_backwards_are_right() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    x, weight, seen = draw(3, 5, 8), draw(8), draw(3, 5, 8).detach()
    expected = torch.autograd.grad((plain_norm(x, weight) * seen).sum(), (x, weight))
    found = torch.autograd.grad((packed.rms_norm(x, weight) * seen).sum(), (x, weight))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one, two, atol=1e-5, rtol=1e-5
        )  # the mean square is taken in float32
    turned, angle = draw(2, 4, 1, packed.HEAD), draw(2, 4, 1, packed.HEAD // 2).detach()
    assert torch.autograd.gradcheck(lambda t: packed.rotate(t, angle.cos(), angle.sin()), (turned,))


def test_a_branch_is_scored_on_its_answers_and_end_marks_only(batch: batches.Batch) -> None:
    tokens = batches.build_tokenizer()
    flat = batch.ids.flatten()
    assert torch.equal(flat[batch.scored + 1], batch.targets)
    for number in range(len(batch.tasks)):
        ids = batch.targets[batch.owner == number]
        assert ids[-1] == tokens.eos_token_id
        assert not torch.isin(
            ids, torch.tensor(tokens.convert_tokens_to_ids(["<user>", "<assistant>", "<pad>"]))
        ).any()


def test_every_scene_fits_its_rows_and_a_part_of_the_branches_has_several_turns() -> None:
    batch = batches.make(np.random.default_rng(6), 24, batches.FIRST_MIX)
    several = sum(task == "" for task in batch.tasks) / len(batch.tasks)
    assert 0.08 < several < 0.25
    assert batch.tasks.count("caption") >= 12
    assert (batch.branch >= 0).float().mean() > 0.85


def test_patch_labels_name_what_stands_on_each_token() -> None:
    rng = np.random.default_rng(8)
    for _ in range(10):
        scene = batches.world.draw(rng)
        labels = batches.patch_labels(scene)
        for patch in scene.background:
            assert (
                labels["colour"][patch]
                == labels["shape"][patch]
                == labels["character"][patch]
                == -1
            )
        for thing in scene.things:
            assert {batches.COLOURS[i] for i in labels["colour"][list(thing.patches)]} == {
                thing.colour
            }
            assert {batches.SHAPES[i] for i in labels["shape"][list(thing.patches)]} == {
                thing.shape
            }
        if scene.text:
            assert (labels["character"][list(scene.text.patches)] >= 0).sum() >= 2 * len(
                scene.text.string
            )


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_processes_together_make_the_update_one_alone_makes() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (8, 16), "b": (8, 16), "c": (16, 8)}
    gradients = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    alone = Muon({n: torch.zeros(s) for n, s in shapes.items()}).directions(gradients)
    shared = [
        Muon({n: torch.zeros(s) for n, s in shapes.items()}, rank=r, world=2).directions(gradients)
        for r in (0, 1)
    ]
    torch.testing.assert_close(
        shared[0] + shared[1], alone, atol=2e-2, rtol=2e-2
    )  # bfloat16, batched differently
    assert all((part == 0).any() for part in shared)


def test_a_short_run_logs_saves_and_resumes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    settings = train.Settings(
        minutes=1.0, processes=1, pictures=2, early_pictures=2, patches_only_minutes=0.0
    )
    trainer = train.Trainer(settings, 0, tmp_path)
    before = trainer.model.lm_head.weight.clone()
    losses = [trainer.update(float(second)) for second in range(1, 4)]
    assert set(losses[0]) == {"patches", "words", "answers"}
    assert losses[2]["answers"] < losses[0]["answers"]
    assert not torch.equal(before, trainer.model.lm_head.weight)
    trainer.save()
    again = train.Trainer(settings, 0, tmp_path)
    again.resume()
    assert (again.step, again.elapsed) == (3, 3.0)
    for name, p in trainer.model.state_dict().items():
        assert torch.equal(p, again.model.state_dict()[name]), name


def test_resuming_nothing_and_overwriting_a_run_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="without --resume"):
        train.train(train.Settings(1.0, processes=1), tmp_path / "none", resume=True)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(FileExistsError, match="--resume"):
        train.train(train.Settings(1.0, processes=1), tmp_path)


def test_spelled_answers_are_letters_and_everything_else_stays() -> None:
    rng = np.random.default_rng(7)
    tokenizer = batches.build_tokenizer()
    longest = 0
    for _ in range(40):
        scene = world.draw(rng)
        question = questions.ask(rng, scene, "caption")
        assert question is not None
        whole, spelled = batches.branch([question]), batches.branch([question], spelled=True)
        # The same question in front; in the answer single letters that say the same.
        assert spelled.ids[: spelled.scored[0] + 1] == whole.ids[: whole.scored[0] + 1]
        answer = [spelled.ids[position + 1] for position in spelled.scored[:-1]]
        assert all(len(token) == 1 for token in tokenizer.convert_ids_to_tokens(answer))
        assert tokenizer.decode(answer).strip() == question.answer
        longest = max(longest, len(spelled.ids))
    assert batches.ROW < longest <= batches.SPELLED_ROW
    batch = batches.make(rng, 2, batches.LAST_MIX, spelled=True)
    assert batch.ids.shape == (2, batches.SPELLED_ROWS_PER_PICTURE, batches.SPELLED_ROW)
    flat = batch.ids.flatten()
    assert torch.equal(flat[batch.scored + 1], batch.targets)
