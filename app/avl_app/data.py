"""Everything between the pages and the models: questions in, immutable results out.

All visitors share the loaded models and the results. A `Question` says everything a result depends
on, so results are kept under it and a page drawn twice costs nothing. A model runs for one caller
at a time: each run takes the model's lock, attaches what it needs, generates, detaches, and only
then lets go, so a policy that one visitor switches on is on the model for that visitor's run alone.
Waiting callers poll, because a page that is closed must stop waiting.

Nothing here draws or knows widgets.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from avl_analysis.corpus.questions import Sample, scene_sample
from avl_analysis.models.videos import Video
from avl_app.examples import asked_scene
from avl_app.pictures import Picture

# For annotations only. The methods import what they need when they are called, so that the first
# page does not wait for it.
if TYPE_CHECKING:
    import xarray as xr

    import avl
    from avl_analysis.evaluation.comparison import Comparison
    from avl_analysis.heads.lens import Lens
    from avl_analysis.heads.patch_words import PatchWords
    from avl_analysis.heads.rollout import Rollout
    from avl_analysis.live import Answer, Disagreement, Observation
    from avl_analysis.models.loading import VLM
    from avl_analysis.recordings.recording import Recording
    from avl_analysis.relevance.maps import Relevance

Result = TypeVar("Result")
OnToken = Callable[[str, int], None]
Waiting = Callable[[int], None]
"""Called while others use the model, with how many runs come before this one."""
_POLL = 0.1  # seconds between two looks at a lock that is taken
_PART = 4  # samples recorded in one pass
# seconds the lock is free between two parts of long work; waiting callers take it at once
_TURN = 0.005


@dataclass(frozen=True)
class Question:
    """What a result depends on, the policy aside.

    Attributes:
        model: name of the model.
        picture: what is asked about; compared by its pixels.
        prompt: the question.
        tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token every time; above, tokens are drawn.
        seed: of the draws.
        system: system prompt, empty for the model's own.
        history: earlier (question, answer) pairs of the conversation, the oldest first.
    """

    model: str
    # A `Picture` is compared by identity, and a file that is sent twice gives two of them. In ==
    # and in the hash `digest` stands for the pixels.
    picture: Picture = field(compare=False)
    prompt: str
    tokens: int
    temperature: float = 0.0
    seed: int = 0
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    digest: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        # A frozen dataclass sets a derived field in no other way.
        object.__setattr__(self, "digest", self.picture.digest)

    @property
    def sample(self) -> Sample:
        """As the analysis takes it, with the truth where it is known."""
        # `Sample` writes None for the model's own system prompt; the empty text field means the
        # same.
        system = self.system or None
        # A prompt of an example brings its right answer and the boxes of what is drawn with it.
        if (scene := asked_scene(self.picture, self.prompt)) is not None:
            return replace(scene_sample(scene), system=system, history=self.history)
        pictures = (Video(self.picture.frames) if self.picture.frames else self.picture.pixels,)
        return Sample("question", pictures, self.prompt, system=system, history=self.history)

    @property
    def drawing(self) -> dict[str, Any]:
        """How tokens are chosen, as arguments of `live.answer` and `live.observe`."""
        # Greedy answers take the defaults of `live`: a seed has no meaning for them.
        return {"temperature": self.temperature, "seed": self.seed} if self.temperature else {}


class LruCache:
    """Results by key; the least recently used are dropped first.

    Safe to use from several threads.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._items: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """What is kept under `key`, or None."""
        with self._lock:
            if key in self._items:
                # Reading counts as use, so what is read often is kept.
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: Any, value: Any) -> None:
        with self._lock:
            self._items[key] = value
            self._items.move_to_end(key)
            while len(self._items) > self.most:
                self._items.popitem(last=False)


@dataclass(eq=False)
class Shared:
    """A loaded model, the lock of who runs it, and who waits for it, in order of arrival."""

    vlm: VLM
    lock: threading.Lock
    _queue: deque[object] = field(default_factory=deque, repr=False)
    # Number of the thread that holds the lock, which a lock itself does not know.
    _holder: int | None = field(default=None, repr=False)

    def yield_lock(self, waiting: Waiting | None = None) -> None:
        """Let others run for a moment in the middle of long work.

        Call it inside `use`, with nothing attached. `waiting` may raise to stop; the work must then
        end, since the model is no longer this caller's.
        """
        # Afterwards this caller stands at the end of the queue.
        self._release()
        time.sleep(_TURN)
        self._take(waiting)

    def _take(self, waiting: Waiting | None) -> None:
        """Take the lock when it is this caller's turn: first come, first served."""
        # A new object equals nothing but itself, so one caller may stand in the queue several
        # times.
        ticket = object()
        self._queue.append(ticket)
        try:
            # Only the first in the queue tries the lock, so turns are taken in order of arrival.
            # Its timeout brings it back to `waiting`, in which Streamlit ends the run of a page
            # that was closed.
            while self._queue[0] is not ticket or not self.lock.acquire(timeout=_POLL):
                # the run that holds the lock comes first, then those who came before
                ahead = self._queue.index(ticket)
                if waiting is not None:
                    waiting(ahead + 1)
                # The first has waited inside `acquire`; the others would turn without a pause.
                if ahead:
                    time.sleep(_TURN)
        finally:
            # Also when `waiting` raises: behind a ticket that is left in front nobody gets a turn.
            self._queue.remove(ticket)
        self._holder = threading.get_ident()

    def _release(self) -> None:
        # Before the release: afterwards another thread may already have written its own number.
        self._holder = None
        self.lock.release()

    @contextmanager
    def use(self, waiting: Waiting | None = None) -> Iterator[VLM]:
        """The model for the length of a block, alone.

        `waiting` is called now and then until it is free.
        """
        self._take(waiting)
        try:
            yield self.vlm
        finally:
            # Not held where an exception has left `yield_lock` while it waited; by then the lock
            # can be somebody else's. Only this thread writes its own number, so the test is safe.
            if self._holder == threading.get_ident():
                self._release()


@dataclass(frozen=True, eq=False)
class Timings:
    """Seconds of several policies' answers to one question, measured in turn.

    Attributes:
        ttft: (policies, rounds) time to the first token.
        tpot: (policies, rounds) time per output token after the first, NaN for a single token.
    """

    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]


class ModelServer:
    """Models and results of one server.

    Args:
        allow_hub: whether hub ids may be fetched.
        results: how many results are kept.
        loaded: how many models are kept; one that is in use stays until its run has ended.
        loader: reads a model by name.
    """

    def __init__(
        self,
        *,
        allow_hub: bool = False,
        results: int = 48,
        loaded: int = 2,
        loader: Callable[[str], VLM] | None = None,
    ) -> None:
        self._loader = loader or (lambda name: _load(name, allow_hub))
        self._models = LruCache(loaded)
        # One lock for all names: models are read one after the other, each of them once.
        self._loading = threading.Lock()
        self._shelf = LruCache(results)
        self._pictures = LruCache(results)

    def model(self, name: str) -> Shared:
        """The model called `name`, loaded once.

        Raises:
            InputError: it cannot be loaded; the message says why and what to do.
        """
        known: Shared | None = self._models.get(name)
        if known is not None:
            return known  # without waiting for another one that is being loaded
        with self._loading:
            # Another caller may have loaded it while this one waited for the lock.
            if (known := self._models.get(name)) is None:
                known = Shared(self._loader(name), threading.Lock())
                self._models.put(name, known)
            return known

    def loaded(self, name: str) -> VLM | None:
        """The model called `name` if it is in memory, for reading what it is; None if it is not."""
        known = self._models.get(name)
        return None if known is None else known.vlm

    def remember(self, picture: Picture) -> None:
        """Keep a picture for links that name it."""
        self._pictures.put(picture.digest, picture)

    def picture(self, digest: str) -> Picture | None:
        """A picture that was sent before, by its hash; None if it is not kept."""
        kept: Picture | None = self._pictures.get(digest)
        return kept

    # -- results -----------------------------------------------------------------------------------

    def known(self, kind: str, question: Question, policy: avl.Policy | None = None) -> Any:
        """A result that is there already, or None.

        Args:
            kind: name of the method that makes it.
            question: what was asked.
            policy: under which policy; None for the stock cache.
        """
        return self._shelf.get((kind, question, policy))

    def observation(
        self,
        question: Question,
        policy: avl.Policy | None = None,
        on_token: OnToken | None = None,
        waiting: Waiting | None = None,
    ) -> Observation:
        """The answer with where every token looked.

        Args:
            question: what is asked.
            policy: what is switched on; None for the stock cache.
            on_token: called with the answer so far and its number of tokens after every token.
            waiting: called while others use the model.
        """
        from avl_analysis import live

        def run(vlm: VLM) -> Observation:
            return live.observe(
                vlm,
                question.sample,
                policy,
                max_new_tokens=question.tokens,
                on_token=on_token,
                **question.drawing,
            )

        return self._once("observation", question, policy, run, waiting)

    def answer(
        self,
        question: Question,
        policy: avl.Policy | None = None,
        on_token: OnToken | None = None,
        waiting: Waiting | None = None,
    ) -> Answer:
        """The answer alone, with nothing but the policy on the model.

        Args:
            question: what is asked.
            policy: what is switched on; None for the stock cache.
            on_token: called with the answer so far and its number of tokens after every token.
            waiting: called while others use the model.
        """
        from avl_analysis import live

        def run(vlm: VLM) -> Answer:
            return live.answer(
                vlm,
                question.sample,
                policy,
                max_new_tokens=question.tokens,
                on_token=on_token,
                **question.drawing,
            )

        return self._once("answer", question, policy, run, waiting)

    def timings(
        self,
        question: Question,
        policies: Sequence[avl.Policy],
        *,
        rounds: int = 5,
        progress: Callable[[int, int], None],
        waiting: Waiting | None = None,
    ) -> Timings:
        """How long each policy takes to answer, measured in turn.

        Every round answers once under each policy, so that what else the machine does falls on all
        of them alike. A round before the first is not counted: it warms caches and allocators.

        Args:
            question: what is asked.
            policies: which are measured.
            rounds: how often each policy is measured.
            progress: called with (answers given, answers in all); may raise to stop.
            waiting: called while others use the model.
        """
        from avl_analysis import live

        # One round more than is reported: the first warms up.
        shared, total = self.model(question.model), (rounds + 1) * len(policies)
        # (ttft and tpot, policies, rounds with the warm-up first)
        seconds = np.full((2, len(policies), rounds + 1), np.nan)
        for place in range(total):
            round_, which = divmod(place, len(policies))
            # Taken anew for every answer: others run between two answers, never during one that is
            # timed.
            with shared.use(waiting) as vlm:
                said = live.answer(
                    vlm,
                    question.sample,
                    policies[which],
                    max_new_tokens=question.tokens,
                    **question.drawing,
                )
            seconds[:, which, round_] = said.ttft, said.tpot
            progress(place + 1, total)
        # without the warm-up
        return Timings(*seconds[..., 1:])

    def disagreement(
        self,
        question: Question,
        policy: avl.Policy,
        reference: Answer,
        waiting: Waiting | None = None,
    ) -> Disagreement:
        """How the policy's predictions differ along the full cache's answer.

        Args:
            question: what is asked.
            policy: whose predictions are compared.
            reference: the full cache's answer to the same question.
            waiting: called while others use the model.
        """
        from avl_analysis import live

        def run(vlm: VLM) -> Disagreement:
            return live.disagreement(vlm, question.sample, policy, reference.ids)

        return self._once("disagreement", question, policy, run, waiting)

    def relevance(
        self, question: Question, answer: Answer, step: int, waiting: Waiting | None = None
    ) -> Relevance:
        """The relevance maps of one token of the full cache's answer.

        Args:
            question: what is asked.
            answer: the full cache's answer to it.
            step: number of the token, from 0.
            waiting: called while others use the model.
        """
        from avl_analysis.relevance import maps

        def run(vlm: VLM) -> Relevance:
            return maps.relevance(vlm, question.sample, answer.ids, step)

        # The ids of the answer are no part of the key: the question determines the full cache's
        # answer. So it is for the rollout and the lens below.
        return self._once(f"relevance {step}", question, None, run, waiting)

    def rollout(
        self,
        question: Question,
        answer: Answer,
        layer: int | None,
        waiting: Waiting | None = None,
    ) -> Rollout:
        """Attention rollout of the full cache's answer, through the layers up to one.

        Args:
            question: what is asked.
            answer: the full cache's answer to it.
            layer: the last layer that is followed; None for all.
            waiting: called while others use the model.
        """
        from avl_analysis.heads import rollout

        def run(vlm: VLM) -> Rollout:
            return rollout.rollout(vlm, question.sample, answer.ids, layer)

        return self._once(f"rollout {layer}", question, None, run, waiting)

    def lens(
        self, question: Question, answer: Answer, waiting: Waiting | None = None
    ) -> tuple[Lens, tuple[tuple[str, ...], ...]]:
        """Logit lens of the full cache's answer, and the likeliest words: a tuple a token.

        Args:
            question: what is asked.
            answer: the full cache's answer to it.
            waiting: called while others use the model.
        """
        from avl_analysis import live
        from avl_analysis.heads.lens import logit_lens

        def run(vlm: VLM) -> tuple[Lens, tuple[tuple[str, ...], ...]]:
            found = logit_lens(vlm, question.sample, answer.ids)
            # One row of `likeliest` (tokens, layers) becomes the texts of one token, layer by
            # layer.
            words = tuple(live.token_texts(vlm, row.tolist()) for row in found.likeliest)
            return found, words

        return self._once("lens", question, None, run, waiting)

    def without_heads(
        self,
        question: Question,
        heads: Sequence[tuple[int, int]],
        on_token: OnToken | None = None,
        waiting: Waiting | None = None,
    ) -> Answer:
        """The answer while the output of some heads is zero.

        Args:
            question: what is asked.
            heads: the silenced ones, (layer, head).
            on_token: called with the answer so far and its number of tokens after every token.
            waiting: called while others use the model.
        """
        from avl_analysis import live
        from avl_analysis.heads.ablation import silenced

        def run(vlm: VLM) -> Answer:
            with silenced(vlm.model, heads):
                return live.answer(
                    vlm,
                    question.sample,
                    max_new_tokens=question.tokens,
                    # the page compares the first token's probability with that of all heads
                    choices=live.CHOICES,
                    on_token=on_token,
                    **question.drawing,
                )

        return self._once(f"without heads {tuple(heads)}", question, None, run, waiting)

    def patch_words(self, question: Question, waiting: Waiting | None = None) -> PatchWords:
        """What the patches of the picture say, layer by layer."""
        from avl_analysis.heads import patch_words

        def run(vlm: VLM) -> PatchWords:
            return patch_words.patch_words(vlm, question.sample)

        return self._once("patch_words", question, None, run, waiting)

    def knockout(
        self,
        model: str,
        samples: Sequence[Sample],
        *,
        tokens: int,
        progress: Callable[[int, int], None],
    ) -> xr.Dataset:
        """What answers lose when attention is cut; others may use the model between two cuts.

        Args:
            model: its name.
            samples: the questions.
            tokens: longest answer, in tokens.
            progress: called with (cuts done, cuts in all); may raise to stop.
        """
        from avl_analysis.heads.knockout import knockout

        shared = self.model(model)
        # Held for all cuts together; `advance` lets others in after each of them.
        with shared.use() as vlm:

            def advance(done: int, total: int) -> None:
                shared.yield_lock()
                progress(done, total)

            return knockout(vlm, samples, max_new_tokens=tokens, progress=advance)

    def comparison(
        self,
        model: str,
        samples: Sequence[Sample],
        chosen: Mapping[str, avl.Policy],
        *,
        tokens: int,
        progress: Callable[[int, int], None],
        waiting: Waiting | None = None,
    ) -> Comparison:
        """Policies compared on many samples; others may use the model between two batches.

        Args:
            model: its name.
            samples: the questions.
            chosen: policies by name.
            tokens: longest answer, in tokens.
            progress: called with (done, total) after each batch under each policy; may raise to
                stop.
            waiting: called while others use the model before the first batch.
        """
        from avl_analysis.evaluation.compare import compare

        shared = self.model(model)
        with shared.use(waiting) as vlm:

            def advance(done: int, total: int) -> None:
                shared.yield_lock()
                progress(done, total)

            return compare(vlm, samples, chosen, max_new_tokens=tokens, progress=advance)

    def corpus(
        self,
        model: str,
        samples: Sequence[Sample],
        *,
        tokens: int,
        progress: Callable[[int, int], None],
        waiting: Waiting | None = None,
    ) -> Recording:
        """All statistics of many samples; others may use the model in between.

        Args:
            model: its name.
            samples: the questions.
            tokens: longest answer, in tokens.
            progress: called with (samples done, samples in all); may raise to stop.
            waiting: called while others use the model.
        """
        from avl_analysis import merge
        from avl_analysis.corpus.record_samples import record_samples

        shared, parts = self.model(model), []
        # The lock is taken for each part rather than given up inside one, so statistics are never
        # attached while somebody else runs the model.
        for start in range(0, len(samples), _PART):
            part = samples[start : start + _PART]
            with shared.use(waiting) as vlm:
                parts.append(
                    record_samples(
                        vlm, part, max_new_tokens=tokens, batch_size=_PART, first_sample=start
                    )
                )
            progress(min(start + _PART, len(samples)), len(samples))
        return merge(parts)

    def _once(
        self,
        kind: str,
        question: Question,
        policy: avl.Policy | None,
        run: Callable[[VLM], Result],
        waiting: Waiting | None,
    ) -> Result:
        # `kind` names everything else that a result depends on: token, layer, heads. Long work on
        # many samples is not kept here but in the session of the visitor who asked for it.
        key = (kind, question, policy)
        shared = self.model(question.model)
        # Before the lock, so that a page drawn again does not wait for the runs of others.
        if (known := self._shelf.get(key)) is not None:
            return known
        with shared.use(waiting) as vlm:
            # somebody else may have made it while this caller waited
            if (known := self._shelf.get(key)) is None:
                known = run(vlm)
                self._shelf.put(key, known)
            return known


def _load(name: str, allow_hub: bool) -> VLM:
    from avl_analysis import load_model

    return load_model(name, allow_download=allow_hub)
