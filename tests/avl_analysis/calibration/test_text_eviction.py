"""The text rule played through on recorded weights, against a version with sets and loops."""

import numpy as np
import pytest

from avl.hooks import attached
from avl_analysis.calibration.text_eviction import TextTrace, caught
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.evaluation.generation import generate
from avl_analysis.models.loading import VLM
from tests import tiny
from tests.avl_analysis import shared
from tests.taps import Notes

SHARES = (0.1, 0.5, 0.8, 1.0)
LONG = Sample(
    "long",
    (tiny.picture(),),
    "where is the red picture and what is the colour of the blue picture in it",
)


def _slow(prompt: np.ndarray, steps: list[np.ndarray], share: float) -> tuple[float, float]:
    """One layer: attention on held keys, and all; a list of keys per head, one key dropped at a
    time.
    """
    kept = seen = 0.0
    for head in range(len(prompt)):
        held, score = list(range(prompt.shape[1])), dict(enumerate(prompt[head]))
        for step in range(len(steps) + 1):
            length = prompt.shape[1] + step
            if step:
                held.append(length - 1)
                score[length - 1] = 0.0
                weights = steps[step - 1][head]
                kept += sum(weights[key] for key in held)
                seen += weights.sum()
                for key in held:
                    score[key] += weights[key]
            budget = max(round(share * length), 20)
            recent = budget - int(0.7 * budget)
            while len(held) > budget:
                held.remove(min(sorted(held)[: len(held) - recent], key=lambda key: score[key]))
    return kept, seen


@pytest.mark.parametrize("heads", [1, 3])
def test_what_is_caught_equals_the_slow_version(heads: int) -> None:
    random = np.random.default_rng(heads)
    prompt = {layer: random.random((heads, 25)) ** 4 for layer in range(2)}
    steps = {
        layer: [random.random((heads, 26 + step)) ** 6 for step in range(30)] for layer in range(2)
    }
    trace = TextTrace(prompt, steps)
    for share, found in zip(SHARES, caught(trace, SHARES), strict=True):
        slow = [_slow(trace.prompt[layer], trace.steps[layer], share) for layer in range(2)]
        np.testing.assert_allclose(
            found, sum(k for k, _ in slow) / sum(s for _, s in slow), rtol=1e-9
        )


def test_keeping_every_key_catches_everything_and_less_catches_less() -> None:
    random = np.random.default_rng(0)
    trace = TextTrace(
        {0: random.random((2, 40))}, {0: [random.random((2, 41 + step)) for step in range(20)]}
    )
    found = caught(trace, (0.5, 0.6, 0.8, 1.0))
    assert found[-1] == pytest.approx(1)
    assert (np.diff(found) > 0).all()


def test_short_texts_and_single_tokens_say_nothing() -> None:
    random = np.random.default_rng(0)
    short = TextTrace(
        {0: random.random((1, 10))}, {0: [random.random((1, 11 + step)) for step in range(5)]}
    )
    single = TextTrace({0: random.random((1, 60))}, {})
    for trace in (short, single):
        assert np.isnan(caught(trace, SHARES)).all()


def _record(vlm: VLM, samples: list[Sample], max_new_tokens: int) -> list[TextTrace]:
    recording = record_samples(
        vlm,
        samples,
        max_new_tokens=max_new_tokens,
        batch_size=len(samples),
        statistics=["accumulated_score"],
        keep="attention",
        queries="steps",
        maps=False,
    )
    attention = recording.drop_attention()
    return [TextTrace.of(recording, name, attention) for name in recording.samples]


def test_the_trace_holds_the_weights_on_text_keys_summed_over_groups_and_prompt_rows() -> None:
    vlm = shared.vlm(kv_heads=2)  # 4 query heads
    notes = Notes()
    with attached(vlm.model, notes):
        generate(vlm, [LONG], None, max_new_tokens=4)
    (trace,) = _record(vlm, [LONG], 4)
    inputs = vlm.prepare(list(LONG.images), LONG.prompt)
    start = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero().max()) + 1
    for layer in range(2):
        prompt, *steps = [weights[0].numpy() for weights in notes.of_layer(layer)]
        grouped = prompt.reshape(2, 2, *prompt.shape[1:]).sum(1)
        np.testing.assert_allclose(
            trace.prompt[layer], grouped[:, start:, start:].sum(1), rtol=1e-5
        )
        assert len(steps) == 3
        for found, weights in zip(trace.steps[layer], steps, strict=True):
            np.testing.assert_allclose(
                found, weights.reshape(2, 2, -1).sum(1)[:, start:], rtol=1e-5
            )


def test_a_sample_of_a_batch_has_the_trace_that_it_has_alone() -> None:
    vlm = shared.vlm(kv_heads=2, stops=True)  # answers of different lengths
    samples = [LONG, *shared.questions(3)]
    together = _record(vlm, samples, 8)
    assert len({len(trace.steps[0]) for trace in together}) > 1
    for sample, trace in zip(samples, together, strict=True):
        (alone,) = _record(vlm, [sample], 8)
        for layer in range(2):
            np.testing.assert_allclose(trace.prompt[layer], alone.prompt[layer], rtol=1e-4)
            assert len(trace.steps[layer]) == len(alone.steps[layer])
            for one, other in zip(trace.steps[layer], alone.steps[layer], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4)
