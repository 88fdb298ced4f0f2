"""Training of the larger model: words, texts, forward pass, measures, stages."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avl_analysis.scenes import questions, world
from avl_analysis.scenes.language import pixel_values
from avl_analysis.scenes.training import packed
from avl_analysis.scenes.training.large import (
    controls,
    conversations,
    forward,
    language,
    measure,
    reader,
    steps,
    texts,
    train,
)
from avl_analysis.scenes.training.large.model import build_model

SIZES = {"width": 64, "text_layers": 2, "vision_width": 64, "vision_layers": 1}


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    model = build_model(seed=1, **SIZES)
    with torch.no_grad():  # larger than freshly drawn, so that attention is far from uniform
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(5)
    return model.eval()


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    rng = np.random.default_rng(4)
    return [world.draw(rng) for _ in range(2)]


@pytest.fixture(scope="module")
def batch(scenes: list[world.Scene]) -> conversations.TuningBatch:
    return conversations.make(np.random.default_rng(5), scenes)


def _image(model, scenes: list[world.Scene]) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return measure.image_tokens(dict(model.named_parameters()), model, scenes)


def test_content_words_are_cut_into_their_pieces_and_come_back_whole() -> None:
    for word in language.CONTENT:
        pieces = language.pieces_of(word)
        expected = [f"▁{pieces[0]}", *pieces[1:]]
        assert language.TOKENIZER.tokenize(word) == expected
    assert len(language.TOKENIZER.tokenize("triangle")) == 3
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = world.draw(rng)
        for task in questions.TASKS:
            question = questions.ask(rng, scene, task)
            for text in (question.prompt, question.answer) if question else ():
                ids = language.encode(text)
                assert ids == language.TOKENIZER(text, add_special_tokens=False).input_ids
                assert language.TOKENIZER.decode(ids) == text


def test_the_chat_template_makes_the_opening_that_training_used() -> None:
    processor = language.build_processor()
    message = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read the text."}]}
    ]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    picture = world.draw(np.random.default_rng(1)).image
    ids = processor(text=prompt, images=picture, return_tensors="pt").input_ids[0].tolist()
    question = [*language.encode("Read the text."), language.ASSISTANT_ID]
    assert ids == [*language.OPENING, *[language.IMAGE_ID] * language.IMAGE_TOKENS, *question]
    assert 30 <= len(language.OPENING) <= 40


def test_a_chain_copies_after_its_triggers_and_follows_its_table_elsewhere() -> None:
    ids = texts.chain(np.random.default_rng(2), 2000)
    copies = 0
    for before, now, after in zip(ids, ids[1:], ids[2:], strict=False):
        if texts.IS_TRIGGER[now] and not texts.IS_TRIGGER[before]:
            assert after == before
            copies += 1
        else:
            assert after in texts.FOLLOWERS_OF[now] or texts.IS_TRIGGER[after]
    assert copies > 100


def test_repeated_passages_occur_twice_at_least() -> None:
    ids = texts.repeat(np.random.default_rng(3), 300)
    again = sum(any(ids[i : i + 6] == ids[j : j + 6] for j in range(i)) for i in range(6, 294))
    assert again > 100


def test_a_described_scene_names_every_object_and_answers_from_it() -> None:
    rng = np.random.default_rng(5)
    scene = world.draw(rng)
    text = texts.describe(rng, scene)
    assert sorted(text.split(", ")) == sorted(questions.caption(scene).split(", "))


def test_rows_of_text_begin_alike_and_jump_over_the_length_of_a_picture_in_half_of_them() -> None:
    drawn = texts.rows(np.random.default_rng(6), 64, 96)
    ids, positions = drawn.ids, drawn.positions
    assert torch.equal(drawn.weights.sum(0), torch.tensor([64.0] * 95 + [0.0]))
    assert ids.shape == positions.shape == (64, 96)
    opening = torch.tensor(language.OPENING)
    assert (ids[:, : len(opening)] == opening).all()
    steps = positions.diff(dim=1)
    elsewhere = torch.cat([steps[:, : len(opening) - 1], steps[:, len(opening) :]], 1)
    assert (elsewhere == 1).all()
    jumps = steps[:, len(opening) - 1] - 1
    assert 0.2 < (jumps > 0).float().mean() < 0.8
    assert jumps.max() <= language.IMAGE_TOKENS


def test_text_logits_equal_the_modules(model) -> None:  # type: ignore[no-untyped-def]
    drawn = texts.rows(np.random.default_rng(7), 3, 80)
    ids, positions = drawn.ids, drawn.positions
    found = forward.text_logits(dict(model.named_parameters()), model.config, ids, positions)
    with torch.no_grad():
        hidden = model.model.language_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
        ).last_hidden_state
        torch.testing.assert_close(found.detach(), model.lm_head(hidden), atol=2e-4, rtol=2e-4)


def test_packed_logits_equal_the_modules_for_every_branch_alone(  # type: ignore[no-untyped-def]
    model, scenes: list[world.Scene], batch: conversations.TuningBatch
) -> None:
    weights = dict(model.named_parameters())
    found = forward.packed_logits(weights, model.config, _image(model, scenes), batch).detach()
    opening = [*language.OPENING, *[language.IMAGE_ID] * language.IMAGE_TOKENS]
    for b, r in np.ndindex(2, conversations.ROWS_PER_PICTURE):
        for number in range(int(batch.branch[b, r].max()) + 1):
            at = (batch.branch[b, r] == number).nonzero()[:, 0]
            ids = torch.tensor([[*opening, *batch.ids[b, r, at].tolist()]])
            with torch.no_grad():
                alone = model(
                    input_ids=ids, pixel_values=pixel_values(scenes[b].image[None])
                ).logits[0, language.PREFIX :]
            torch.testing.assert_close(found[b, r, at], alone, atol=3e-4, rtol=3e-4)


def test_dropped_image_tokens_are_hidden_from_answering_tokens_only(  # type: ignore[no-untyped-def]
    model, scenes: list[world.Scene], batch: conversations.TuningBatch
) -> None:
    weights = dict(model.named_parameters())
    image = _image(model, scenes)
    dropped = torch.rand(2, language.IMAGE_TOKENS, generator=torch.Generator().manual_seed(1)) > 0.5
    full = forward.packed_logits(weights, model.config, image, batch).detach()
    found = forward.packed_logits(weights, model.config, image, batch, dropped).detach()
    for _, b, r, first, last in batch.spans:  # conversations of one turn
        start = int((batch.branch[b, r] == batch.branch[b, r, first]).nonzero()[0])
        assert torch.equal(full[b, r, start:first], found[b, r, start:first])
        assert not torch.allclose(full[b, r, first : last + 1], found[b, r, first : last + 1])
    # Reference: the stock decoder on one branch with a mask as long as the sequence.
    _, b, r, first, last = batch.spans[3]
    at = (batch.branch[b, r] == batch.branch[b, r, first]).nonzero()[:, 0]
    words = model.get_input_embeddings()(batch.ids[b, r, at])
    x = torch.cat([model.get_input_embeddings()(torch.tensor(language.OPENING)), image[b], words])[
        None
    ]
    allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    answering = torch.cat(
        [torch.zeros(language.PREFIX, dtype=torch.bool), batch.answering[b, r, at]]
    )
    picture = torch.zeros(x.shape[1], dtype=torch.bool)
    picture[len(language.OPENING) : language.PREFIX] = dropped[b]
    allowed &= ~(answering[:, None] & picture)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[
        None, None
    ]
    with torch.no_grad():
        hidden = model.model.language_model(
            inputs_embeds=x, attention_mask=mask, use_cache=False
        ).last_hidden_state
        expected = model.lm_head(hidden)[0, language.PREFIX :]
    torch.testing.assert_close(found[b, r, at], expected, atol=3e-4, rtol=3e-4)


def test_answers_weigh_more_than_questions_and_branch_ends_nothing(
    batch: conversations.TuningBatch,
) -> None:
    for task, b, r, first, last in batch.spans:
        assert batch.ids[b, r, first] == language.ASSISTANT_ID
        assert batch.ids[b, r, last + 1] == language.EOS_ID
        assert batch.weights[b, r, last + 1] == 0
        full = conversations.CAPTION_WEIGHT if task == "caption" else 1.0
        assert (batch.weights[b, r, first : last + 1] == full).all()
    asking = (batch.branch >= 0) & ~batch.answering & (batch.weights > 0)
    assert (batch.weights[asking] == torch.tensor(conversations.QUESTION_WEIGHT)).all()
    assert [span[0] for span in batch.spans].count("caption") == 2


def test_the_readers_labels_spell_the_scene() -> None:
    scene = next(s for s in (world.draw(np.random.default_rng(i)) for i in range(20)) if s.text)
    truth = reader.labels([scene])
    assert {(t.cell, t.colour, t.shape, t.size) for t in scene.things} == {
        (cell, reader.COLOURS[int(c)], reader.SHAPES[int(s)], reader.SIZES[int(z)])
        for cell, (c, s, z) in enumerate(
            zip(*(truth[g][0] for g in ("colour", "shape", "size")), strict=True)
        )
        if c < len(reader.COLOURS)
    }
    characters = [
        reader.CHARACTERS[int(i)] for i in truth["character"][0] if i < len(reader.CHARACTERS)
    ]
    assert "".join(characters) == scene.text.string
    assert (int(truth["cell"]), reader.COLOURS[int(truth["text_colour"])]) == (
        scene.text.cell,
        scene.text.colour,
    )
    perfect = {
        group: torch.nn.functional.one_hot(values, size).float() * 50
        for (group, values), size in zip(truth.items(), (9, 9, 3, 34, 9, 10), strict=True)
    }
    assert reader.loss(perfect, truth) < 1e-6
    assert set(reader.accuracy(perfect, truth).values()) == {1.0}


def test_described_attention_is_the_mean_over_steps_of_what_each_head_gives() -> None:
    opening, picture, total = len(language.OPENING), language.IMAGE_TOKENS, language.PREFIX + 20
    last = language.PREFIX + 5
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 3, total, total, generator=generator) * 2
    hidden = torch.ones(total, total, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    weights[1, 2] = 0.0  # a head that gives everything to the first token
    weights[1, 2, :, 0] = 1.0
    weights[1, 2, :, opening : opening + 2] = 1e-6
    weights = weights.masked_fill(hidden, 0.0)
    found = measure.describe_attention(weights, range(opening, language.PREFIX), last)
    rows = weights.numpy()
    image = slice(opening, opening + picture)
    for layer in range(2):
        steps = rows[layer, :, last:]
        assert found["system"][layer] == pytest.approx(steps[..., :opening].sum(-1).mean(), 1e-5)
        assert found["image"][layer] == pytest.approx(steps[..., image].sum(-1).mean(), 1e-5)
        merged = steps[..., image].mean(0)
        best = [set(np.argsort(-row)[: int(0.3 * picture)]) for row in merged]
        shared = [len(a & b) / int(0.3 * picture) for a, b in zip(best, best[3:], strict=False)]
        assert found["overlap3"][layer] == pytest.approx(np.mean(shared), abs=1e-5)
        for head in range(3):
            mean = rows[layer, head, : last + 1, 0].mean()
            assert found["sink"][layer, head] == pytest.approx(mean, 1e-5)
            key = max(
                rows[layer, head, k : last + 1, k].mean() for k in range(opening, language.PREFIX)
            )
            assert found["image_sink"][layer, head] == pytest.approx(key, 1e-5)
    assert found["sink"][1, 2] == 1.0


def test_coverage_counts_the_keys_that_hold_the_share() -> None:
    weights = (
        torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.97, 0.03]])
        * 0.4
    )
    assert measure.coverage(weights).tolist() == [0.75, 1.0, 0.25]


def test_measures_read_the_attention_of_the_module(model) -> None:  # type: ignore[no-untyped-def]
    found = measure.image_attention(model, language.build_processor(), samples=2)
    shares = np.array(found["system_by_layer"]) + np.array(found["image_by_layer"])
    assert (shares < 1).all()
    assert (np.array(found["first_by_layer"]) <= np.array(found["system_by_layer"])).all()
    assert 0 < found["keys95"] < 1
    assert found["overlap1"] > 0.3 - 0.1  # two random sets of 30 % share 30 %
    with torch.no_grad():  # all keys alike: attention is uniform, and no head has a sink
        for layer in model.model.language_model.layers:
            kept = layer.self_attn.k_proj.weight.clone()
            layer.self_attn.k_proj.weight.zero_()
            flat = measure.text_attention(model, rows=8, length=64)
            layer.self_attn.k_proj.weight.copy_(kept)
    assert flat["sink_rate"] == 0.0


def test_the_forward_pass_stays_on_the_device_of_its_inputs(
    batch: conversations.TuningBatch,
) -> None:
    device = torch.device("meta")
    model = build_model(**SIZES).to(device)
    weights = dict(model.named_parameters())
    rows = texts.rows(np.random.default_rng(8), 2, 64).to(device)
    logits = forward.text_logits(weights, model.config, rows.ids, rows.positions)
    assert train.mean_loss(logits, rows.ids, rows.weights).device == device
    pixels = torch.zeros(2, 3, 96, 96, device=device)
    image = packed.project(weights, packed.vision(weights, model.config, pixels))
    dropped = torch.zeros(2, language.IMAGE_TOKENS, dtype=torch.bool, device=device)
    logits = forward.packed_logits(weights, model.config, image, batch.to(device), dropped)
    assert logits.device == device
    assert logits.shape == (*batch.ids.shape, len(language.TOKENIZER))


def test_answers_in_rows_of_text_are_what_follows_the_assistants_mark_up_to_its_end() -> None:
    ids = torch.tensor([texts.conversation(np.random.default_rng(9), 150)])
    mask = texts.answering(ids)[0]
    inside, expected = False, []
    for token in ids[0].tolist():
        inside = token == language.ASSISTANT_ID or (inside and token != language.EOS_ID)
        expected.append(inside)
    assert mask.tolist() == expected
    assert 0 < mask.sum() < 75


def test_the_loss_is_the_weighted_mean_over_tokens_that_follow() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 5, 7, generator=generator)
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    weights = torch.rand(2, 5, generator=generator)
    total = sum(
        float(-weights[b, i] * logits[b, i].log_softmax(-1)[ids[b, i + 1]])
        for b in range(2)
        for i in range(4)
    )
    expected = total / float(weights[:, :4].sum())
    assert float(train.mean_loss(logits, ids, weights)) == pytest.approx(expected, 1e-5)


def _trainer(stage: str, out: Path, **changed: float) -> train.StageTrainer:
    small = {"text_rows": 2, "text_length": 64, "pictures": 2, "tune_text_rows": 1}
    return train.StageTrainer(stage, train.StageSettings(**small | changed), 0, out, **SIZES)


@pytest.mark.parametrize(
    ("stage", "changed"),
    [(stage, {}) for stage in train.STAGES]
    + [("text", {"muon_rate": 0.01, "answers_only": 1, "text_length": 128})],
)
def test_a_resumed_stage_goes_on_exactly_where_it_stopped(
    stage: str, changed: dict[str, float], tmp_path: Path
) -> None:
    through, first = _trainer(stage, tmp_path, **changed), _trainer(stage, tmp_path, **changed)
    for _ in range(2):
        through.update(1.0)
        first.update(1.0)
    first.save()
    second = _trainer(stage, tmp_path, **changed)
    second.resume()
    assert second.update(1.0) == through.update(1.0)
    for name, p in through.model.state_dict().items():
        assert torch.equal(p, second.model.state_dict()[name]), name


def test_the_text_stage_learns_and_leaves_the_vision_tower_alone(tmp_path: Path) -> None:
    trainer = _trainer("text", tmp_path, text_rows=4)
    before = {n: p.clone() for n, p in trainer.model.state_dict().items()}
    losses = [trainer.update(1.0)["text"] for _ in range(30)]
    assert losses[-1] < losses[0] - 1
    changed = {n for n, p in trainer.model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.startswith((packed.DECODER, "lm_head")) for n in changed)


def test_tuning_joins_both_stages_with_image_tokens_as_long_as_words(tmp_path: Path) -> None:
    for stage in ("text", "vision"):
        trainer = _trainer(stage, tmp_path)
        trainer.update(1.0)
        trainer.save()
    text, vision = (
        torch.load(tmp_path / f"{stage}.pt", weights_only=True)["model"]
        for stage in ("text", "vision")
    )
    joined = _trainer("tune", tmp_path)
    joined.join()
    state = joined.model.state_dict()
    for name, value in state.items():
        if name.startswith(packed.DECODER):
            assert torch.equal(value, text[name]), name
        elif name.startswith(packed.VISION):
            assert torch.equal(value, vision[name]), name
    rng = np.random.default_rng(0)
    four = [world.draw(rng) for _ in range(4)]
    words = state[f"{packed.DECODER}embed_tokens.weight"][texts.FIRST_WORD :].pow(2).mean().sqrt()
    assert _image(joined.model, four).pow(2).mean().sqrt().item() == pytest.approx(
        words.item(), rel=0.1
    )


def test_a_finished_call_has_logged_and_saved_and_an_annealed_one_ends_near_rate_zero(
    tmp_path: Path,
) -> None:
    settings = train.StageSettings(
        text_rows=2, text_length=64, log_seconds=0.0, warm_up=1, anneal_from=2
    )
    train.train("text", settings, tmp_path, steps=2, sizes=SIZES)
    with pytest.raises(FileExistsError, match="--resume"):
        train.train("text", settings, tmp_path, steps=2, sizes=SIZES)
    train.train("text", settings, tmp_path, steps=6, resume=True, sizes=SIZES)
    lines = train.read_log(tmp_path / "text.jsonl")
    assert [line["factor"] for line in lines if "step" in line] == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert lines[-1]["step"] == 6
    assert "sink_rate" in lines[-1]["held_out"]["text"]
    assert lines[-1]["text"] > 0
    with pytest.raises(FileNotFoundError, match="without --resume"):
        train.train("vision", settings, tmp_path, steps=1, resume=True, sizes=SIZES)
    with pytest.raises(FileNotFoundError, match="run that stage before tune"):
        train.train("tune", settings, tmp_path, steps=1, sizes=SIZES)
    with pytest.raises(ValueError, match="choose one of text, vision, tune"):
        train.train("speech", settings, tmp_path, steps=1, sizes=SIZES)


@pytest.mark.parametrize("name", ["Muon", "Muon, scenes, loss on answers"])
def test_a_control_changes_what_it_names_and_logs_what_it_measured(
    name: str, tmp_path: Path
) -> None:
    controls.run(name, steps=3, every=2, log=tmp_path / "log.jsonl")
    lines = train.read_log(tmp_path / "log.jsonl")
    assert [(line["control"], line["step"]) for line in lines] == [(name, 2), (name, 3)]
    assert len(lines[0]["first_token_by_layer"]) == controls.CONTROLS[name]["text_layers"]
    assert 0 < lines[0]["first_token_by_layer"][0] < 0.2


def test_a_run_told_to_stop_saves_and_logs_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = train.StageTrainer.update

    def told(trainer: train.StageTrainer, *arguments: Any) -> dict[str, float]:
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer, *arguments)

    monkeypatch.setattr(train.StageTrainer, "update", told)
    before = signal.getsignal(signal.SIGTERM)
    settings = train.StageSettings(text_rows=2, text_length=64)
    train.train("text", settings, tmp_path, steps=50, sizes=SIZES)
    assert signal.getsignal(signal.SIGTERM) == before
    assert train.read_log(tmp_path / "text.jsonl")[-1]["step"] == 2
    assert torch.load(tmp_path / "text.pt", weights_only=True)["step"] == 2


def test_tuning_hides_a_part_of_some_pictures_and_changes_nothing_else() -> None:
    plain, hiding = (
        steps.Steps("tune", steps.StageSettings(pictures=8, hide=share), 0)[3]
        for share in (0.0, 0.5)
    )
    assert plain.hidden is None
    assert hiding.hidden is not None
    assert torch.equal(plain.pixels, hiding.pixels)
    assert torch.equal(plain.batch.ids, hiding.batch.ids)
    shares = hiding.hidden.float().mean(1)
    assert hiding.hidden.shape == (8, language.IMAGE_TOKENS)
    assert (shares == 0).any()
    assert (shares > 0).any()
    assert (shares < steps.HIDDEN_MOST + 0.15).all()
