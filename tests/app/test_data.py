"""Between pages and models: results kept by what they depend on, one run at a time."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

import avl
from avl_analysis import live
from avl_analysis.errors import InputError
from avl_analysis.models.loading import VLM
from avl_app.data import LruCache, ModelServer, Question
from avl_app.pictures import picture
from avl_app.settings import Settings, settings
from tests import tiny

POLICY = avl.AdaptivePolicy(secondary=0.5, core=0.25, refresh_every=2, text=None)


def tiny_vlm(seed: int = 0) -> VLM:
    model = tiny.llava(2, seed=seed)
    return VLM("tiny", model, tiny.processor(model), "memory", None, "")


@pytest.fixture(scope="module")
def bench() -> ModelServer:
    return ModelServer(loader=lambda name: tiny_vlm())


def question(prompt: str = "what is the colour?", seed: int = 0, tokens: int = 12) -> Question:
    return Question(
        "tiny", picture(np.asarray(tiny.picture(seed=seed)), "a picture"), prompt, tokens
    )


def test_settings_survive_the_environment_and_nonsense_is_refused() -> None:
    given = Settings(("a", "b"), folders=False, hub=True)
    assert settings({"AVL_APP": given.as_json()}) == given
    assert settings({}) == Settings()
    with pytest.raises(InputError, match="not settings of the dashboard"):
        settings({"AVL_APP": '{"nonsense": 1}'})


# -- results ---------------------------------------------------------------------------------------


def test_the_shelf_gives_away_what_was_not_used_longest() -> None:
    shelf = LruCache(2)
    shelf.put("a", 1)
    shelf.put("b", 2)
    assert shelf.get("a") == 1
    shelf.put("c", 3)
    assert (shelf.get("a"), shelf.get("b"), shelf.get("c")) == (1, None, 3)


def test_results_are_kept_by_picture_prompt_length_and_policy(bench: ModelServer) -> None:
    one = bench.answer(question())
    assert bench.answer(question()) is one
    assert bench.known("answer", question()) is one
    others = [question("where is it?"), question(seed=1), question(tokens=3)]
    assert all(bench.known("answer", other) is None for other in others)
    assert bench.known("answer", question(), POLICY) is None
    assert bench.known("observation", question()) is None


def test_two_visitors_on_one_model_get_exactly_what_they_get_alone() -> None:
    """One with A-VL, one without, one watching, all at once and again and again on the same loaded
    model.
    """
    questions = [question(seed=seed) for seed in range(3)]
    alone = ModelServer(loader=lambda name: tiny_vlm())
    jobs = [(q, policy) for q in questions for policy in (None, POLICY, avl.H2OPolicy(budget=0.5))]
    expected = {job: alone.answer(*job).ids for job in jobs}
    assert len(set(expected.values())) > len(questions)  # the policies do change answers
    together = ModelServer(loader=lambda name: tiny_vlm())
    found: dict[tuple[Question, avl.Policy | None], set[tuple[int, ...]]] = {
        job: set() for job in jobs
    }
    start = threading.Barrier(3)

    def visit(policy: avl.Policy | None, watch: bool) -> None:
        start.wait()
        for q in questions:
            said = together.observation(q, policy).answer if watch else together.answer(q, policy)
            found[q, policy].add(said.ids)

    visits = [(None, True), (POLICY, False), (avl.H2OPolicy(budget=0.5), False)]
    threads = [threading.Thread(target=visit, args=visit_) for visit_ in visits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {job: {ids} for job, ids in expected.items()} == found


def test_a_visitor_who_leaves_in_the_middle_leaves_the_model_free_and_unchanged(
    bench: ModelServer,
) -> None:
    class Gone(BaseException):
        pass

    def leave(text: str, count: int) -> None:
        raise Gone

    before = bench.answer(question("what is the image?")).ids
    with pytest.raises(Gone):
        bench.observation(question("what is the image?"), POLICY, on_token=leave)
    assert bench.known("observation", question("what is the image?"), POLICY) is None
    assert bench.observation(question("what is the image?")).answer.ids == before


def test_a_waiting_visitor_is_told_and_may_leave(bench: ModelServer) -> None:
    class Gone(Exception):
        pass

    def leave(ahead: int) -> None:
        assert ahead == 1
        raise Gone

    with bench.model("tiny").use(), pytest.raises(Gone):
        bench.answer(question("describe the image"), waiting=leave)


def test_visitors_are_served_in_order_and_told_their_place(bench: ModelServer) -> None:
    shared = bench.model("tiny")
    places: dict[str, list[int]] = {"first": [], "second": []}
    served: list[str] = []

    def visit(name: str) -> None:
        with shared.use(places[name].append):
            served.append(name)

    threads = []
    with shared.use():
        for name in places:
            threads.append(threading.Thread(target=visit, args=(name,)))
            threads[-1].start()
            while not places[name]:  # until this one waits
                time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert served == ["first", "second"]
    assert set(places["first"]) == {1}
    assert places["second"][0] == 2


def test_who_leaves_while_letting_others_run_does_not_free_the_model_under_them(
    bench: ModelServer,
) -> None:
    class Gone(Exception):
        pass

    def leave(ahead: int) -> None:
        raise Gone

    shared, held, done = bench.model("tiny"), threading.Event(), threading.Event()

    def visit() -> None:
        with shared.use():
            held.set()
            done.wait(60)

    other = threading.Thread(target=visit)

    def long_work() -> None:
        with shared.use():
            other.start()
            while not shared._queue:  # until the other one waits
                time.sleep(0.01)
            shared.yield_lock(leave)

    with pytest.raises(Gone):
        long_work()
    assert held.wait(60)
    assert shared.lock.locked()  # by the other one, whose run goes on
    done.set()
    other.join()
    with shared.use():
        assert shared.lock.locked()
    assert not shared.lock.locked()


def test_times_are_measured_in_turn(bench: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[avl.Policy | None] = []
    plain = live.answer

    def answer(vlm: object, sample: object, policy: avl.Policy, **more: object) -> object:
        order.append(policy)
        return plain(vlm, sample, policy, **more)

    monkeypatch.setattr(live, "answer", answer)
    policies = [avl.FullPolicy(), POLICY]
    done: list[tuple[int, int]] = []
    times = bench.timings(
        question(), policies, rounds=2, progress=lambda now, total: done.append((now, total))
    )
    assert order == policies * 3
    assert times.ttft.shape == times.tpot.shape == (2, 2)
    assert np.isfinite(times.ttft).all()
    assert done[-1] == (6, 6)


def test_the_model_that_was_not_used_for_longest_is_given_away() -> None:
    loaded: list[str] = []

    def load(name: str) -> object:
        loaded.append(name)
        return tiny_vlm()

    bench = ModelServer(loader=load, loaded=2)
    for name in ("a", "b", "a", "c", "a", "b"):
        bench.model(name)
    assert loaded == ["a", "b", "c", "b"]
    assert bench.loaded("c") is None
    assert bench.loaded("b") is not None


def test_a_comparison_lets_others_in_between_two_batches(
    bench: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who began to wait during one batch has had the model before the next one ends."""
    shared, order = bench.model("tiny"), list[object]()
    plain, others = live.answer, list[threading.Thread]()

    def answer(*arguments: Any, **more: Any) -> object:
        order.append("other")
        assert shared.lock.locked()
        return plain(*arguments, **more)

    def progress(done: int, total: int) -> None:
        order.append(done)
        if not others:
            others.append(threading.Thread(target=bench.answer, args=(question("red"), POLICY)))
            others[0].start()
            while not shared._queue:  # until it waits
                time.sleep(0.01)

    monkeypatch.setattr(live, "answer", answer)
    samples = [question(seed=seed).sample for seed in range(2)]
    named = [type(s)(f"s{i}", s.images, s.prompt) for i, s in enumerate(samples)]
    result = bench.comparison("tiny", named, {"A-VL": POLICY}, tokens=6, progress=progress)
    others[0].join()
    assert result.policies == ["full", "A-VL"]
    numbers = [done for done in order if done != "other"]
    assert len(numbers) >= 2
    assert order == [numbers[0], "other", *numbers[1:]]
    assert shared.lock.acquire(timeout=1)
    shared.lock.release()


def test_pictures_are_copied_and_cannot_be_changed() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    kept = picture(pixels, "x")
    pixels[:] = 255
    assert kept.pixels.max() == 0
    with pytest.raises(ValueError, match="read-only"):
        kept.pixels[0] = 1
    assert picture(np.asarray(Image.new("RGB", (4, 4))), "other name").digest == kept.digest
