"""Do heads do what their kind says?

Silence the heads of one kind, and as many others, and ask the same questions.

The kinds of `heads.taxonomy` are read from attention weights, and weights are not contributions.
So the claim behind "visual head" is tested by taking such heads away: a silenced head's output
(weights times values, before the output projection) is zero at every position, which is what Voita
et al. (ACL 2019) and Michel et al. (NeurIPS 2019) do to find heads a model can be without. The
control is as many heads drawn at random from all other kinds, several times.

    with silenced(model, [(3, 0), (3, 5)]):     # layer, head
        model.generate(...)

Where a kind has more heads than others, as many of it are silenced as others can be drawn: those
with the largest share of attention on the picture. Heads are found on other questions than those
they are judged by.

Note: heads of a kind crowd in some layers, and layers differ in how much every answer
needs them. With `same_layers` a layer loses as many heads of the kind as of others, so that the
comparison is of heads alone; layers all of one kind then stay whole. And heads that stand in for
each other show less than each of them does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from avl.attention import Attend, AttentionCall
from avl.families import describe
from avl.hooks import Intervention, attached
from avl_analysis.capture.provenance import provenance
from avl_analysis.corpus.batches import (
    Failure,
    batches_by_length,
    halve_on_failure,
    images_encoded_once,
    longest_right_answer,
)
from avl_analysis.corpus.questions import Sample, describe_questions, shared_questions
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.corpus.regions import recorded_regions
from avl_analysis.corpus.scoring import correct
from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.evaluation.generation import decode_texts, generate
from avl_analysis.files import user_path, write_text
from avl_analysis.heads.localisation import first_word_hits
from avl_analysis.heads.taxonomy import KINDS, Matrix, kinds, matrix, measure
from avl_analysis.intervals import (
    Estimate,
    crossed,
    paired_share_difference,
    share_interval,
)
from avl_analysis.models.loading import VLM
from avl_analysis.recordings.origin import Origin, check_same_model
from avl_analysis.recordings.recording import Recording

Head = tuple[int, int]
"""Layer, query head."""

FORMAT, VERSION = "avl-ablation", 1
NEEDED = ("modality_mass", "first_token_mass", "recent_text_mass")
"""Statistics a recording must hold for heads to be told apart."""


# -- silencing -------------------------------------------------------------------------------------


class _Silencer(Intervention):
    def __init__(self, heads: Sequence[Head]) -> None:
        # Layer -> its silenced query heads.
        self.by_layer: dict[int, list[int]] = {}
        for layer, head in heads:
            self.by_layer.setdefault(layer, []).append(head)

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        output = inner(call)
        if (silent := self.by_layer.get(call.layer)) is None:
            return output
        # The backend's tensor may be a view of a buffer that it reads again.
        output = output.clone()
        # (batch, rows, query heads, head width): before the output projection mixes the heads.
        output[:, :, silent] = 0
        return output


@contextmanager
def silenced(model: nn.Module, heads: Sequence[Head]) -> Iterator[None]:
    """Inside, the attention output of these heads is zero; without heads the logits keep every bit.

    Args:
        model: a loaded vision-language model; no policy may be on it.
        heads: (layer, query head) of its decoder.

    Raises:
        InputError: a layer or head the model does not have.
        avl.families.UnsupportedModelError, avl.hooks.HookError: as for a policy.
    """
    family = describe(model)
    for layer, head in heads:
        if not (0 <= layer < family.layers and 0 <= head < family.query_heads):
            raise InputError(
                f"there is no head {head} in layer {layer}: this model has layers 0 to"
                f" {family.layers - 1} with heads 0 to {family.query_heads - 1}"
            )
    with attached(model, _Silencer(heads)):
        yield


# -- choosing heads --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silenced:
    """What was silenced and what came of it.

    Attributes:
        name: "nothing", the kind, or "random 1", "random 2", ...
        heads: the silenced heads.
        right: one letter per question: 1 right, 0 wrong, - not measured.
    """

    name: str
    heads: tuple[Head, ...]
    right: str = ""

    @property
    def values(self) -> np.ndarray:
        """(questions,) 1, 0 or NaN."""
        # A letter per question, as in the saved file; "-" becomes NaN.
        return np.array([{"1": 1.0, "0": 0.0}.get(letter, np.nan) for letter in self.right])

    @property
    def accuracy(self) -> Estimate:
        """Share of right answers with its Wilson interval."""
        return share_interval(self.values)


def find_heads(recording: Recording, kind: str = "visual") -> tuple[list[Head], list[Head]]:
    """Heads of a kind, those with most attention on the picture first, and all others in order.

    Visual heads are told from scanning ones where the recording knows what words are about.

    Raises:
        InputError: an unknown kind, or a recording without the statistics the taxonomy needs.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of heads {kind!r}: choose one of {', '.join(KINDS)}")
    found = kinds(recording, visual_head_score(recording))
    layers = [int(layer) for layer in recording["modality_mass"]["layer"].values]
    image = matrix(recording, measure(recording, "modality_mass/image"))
    # Places (row, head) of the matrices; a row is a recorded layer, named by its number below.
    of_kind = sorted(zip(*np.nonzero(found == kind), strict=True), key=lambda at: -image[at])
    others = zip(*np.nonzero(found != kind), strict=True)
    return [(layers[row], int(head)) for row, head in of_kind], [
        (layers[row], int(head)) for row, head in others
    ]


def visual_head_score(recording: Recording) -> Matrix | None:
    """Share of samples whose first word's region a head's strongest patch is on.

    (layers, heads); None where no region is known.
    """
    regions = recorded_regions(recording)
    hits = first_word_hits(recording, regions) if regions else None
    return None if hits is None else np.asarray(hits.mean("sample").values, dtype=np.float64)


def plan(
    of_kind: Sequence[Head],
    others: Sequence[Head],
    kind: str,
    draws: int,
    seed: int = 0,
    *,
    same_layers: bool = False,
) -> list[Silenced]:
    """Nothing, the kind's heads, and up to `draws` different sets of as many others.

    All there are, if fewer.

    Args:
        of_kind: the heads of the kind.
        others: all other heads.
        kind: its name.
        draws: most random sets.
        seed: of the draws.
        same_layers: take equally many of both from every layer.

    Raises:
        InputError: no heads to compare, or no draw.
    """
    rng = np.random.default_rng(seed)
    # The kind's heads and the others: once for all layers, or layer by layer.
    pairs = [(list(of_kind), list(others))]
    if same_layers:
        layers = sorted({layer for layer, _ in of_kind})
        pairs = [(_of_layer(of_kind, layer), _of_layer(others, layer)) for layer in layers]
    pools: list[tuple[list[Head], list[Head], int]] = []
    for own, rest in pairs:
        # half of all others at most, so that draws can differ; within a layer every one of them,
        # there are so few
        count = min(len(own), len(rest) if same_layers else (len(rest) + 1) // 2)
        pools.append((own, rest, count))
    if not sum(count for _, _, count in pools) or draws < 1:
        where = " in the same layers" if same_layers else ""
        raise InputError(
            f"{len(of_kind)} {kind} heads, {len(others)} others and {draws} draws: there must be"
            f" one of each{where}; choose another kind, or ask questions that show more of the"
            " heads"
        )
    sets: dict[tuple[Head, ...], None] = {}
    # Draws may repeat where there are few others; after so many tries there are hardly any left.
    for _ in range(100 * draws):
        chosen: list[Head] = []
        for _, rest, count in pools:
            if count:
                chosen += [rest[i] for i in rng.choice(len(rest), count, replace=False)]
        # The keys of a dict: equal draws fall together, and the order of drawing is kept, so that a
        # seed gives the same numbering.
        sets[tuple(sorted(chosen))] = None
        if len(sets) == draws:
            break
    random = [Silenced(f"random {number}", heads) for number, heads in enumerate(sets, 1)]
    # Of the kind no more than there are others to compare with; those that look at the picture
    # most.
    silent = tuple(head for own, _, count in pools for head in own[:count])
    return [Silenced("nothing", ()), Silenced(kind, silent), *random]


def _of_layer(heads: Sequence[Head], layer: int) -> list[Head]:
    return [head for head in heads if head[0] == layer]


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ablation:
    """What silencing did to a model's answers.

    Attributes:
        kind: which heads were silenced; found: how many of them there are among all `heads` heads.
        model: name and revision; samples, tasks: ids and kinds of the questions; groups: as `plan`
            made them, with answers.
        found_on: the questions, or the recording, that the kinds of heads were read from.
        same_layers: whether as many others means as many of the same layers; command: how to make
            it again.
    """

    kind: str
    found: int
    heads: int
    model: str
    samples: tuple[str, ...]
    tasks: tuple[str, ...]
    groups: tuple[Silenced, ...]
    found_on: str = ""
    same_layers: bool = False
    command: str = ""

    @property
    def origin(self) -> Origin:
        """The model it was measured on."""
        name, _, revision = self.model.partition(" ")
        return Origin("the ablation", name, revision)

    @property
    def others(self) -> str:
        """What the random sets are, in words."""
        return "as many others of the same layers" if self.same_layers else "as many others"

    @property
    def nothing(self) -> Silenced:
        return self.groups[0]

    @property
    def of_kind(self) -> Silenced:
        return self.groups[1]

    @property
    def random(self) -> tuple[Silenced, ...]:
        return self.groups[2:]

    @property
    def loss(self) -> Estimate:
        """Change of accuracy by silencing the kind's heads, paired by question."""
        return paired_share_difference(self.of_kind.values, self.nothing.values)

    @property
    def random_loss(self) -> Estimate:
        """Change of accuracy by silencing as many others.

        Mean over draws, resampling questions and draws.
        """
        # (draws, questions) differences of 1 and 0; NaN where either side was not measured.
        return crossed(np.array([group.values for group in self.random]) - self.nothing.values)

    @property
    def contrast(self) -> Estimate:
        """Accuracy with others silenced less accuracy with the kind silenced.

        Above 0, the kind matters more.

        Questions and draws are both resampled, since another run would draw both anew.
        """
        return crossed(np.array([group.values for group in self.random]) - self.of_kind.values)

    def select_task(self, task: str) -> Ablation:
        """Only the questions of one task."""
        at = [index for index, name in enumerate(self.tasks) if name == task]
        groups = tuple(
            replace(one, right="".join(one.right[index] for index in at)) for one in self.groups
        )
        return replace(
            self,
            samples=tuple(self.samples[index] for index in at),
            tasks=(task,) * len(at),
            groups=groups,
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Write it as JSON.

        Raises:
            InputError: the file cannot be written.
        """
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        groups = content.pop("groups")
        # Without the closing brace: the groups follow, a line each, since a list of heads with an
        # entry per line would make files of thousands of lines.
        head = json.dumps(content, indent=1)[:-2]
        lines = ",\n  ".join(json.dumps(group) for group in groups)
        return write_text(path, f'{head},\n "groups": [\n  {lines}\n ]\n}}\n')


def load_ablation(path: str | PathLike[str]) -> Ablation:
    """Read what `Ablation.save` wrote.

    Raises:
        InputError: no such file, or not one of these.
    """
    source = user_path(path)
    if not source.is_file():
        raise InputError(f"there is no ablation {source}; make one with avl ablate --out {source}")
    with blamed_on_input(f"{source} is not an ablation", ": make one with avl ablate"):
        content = json.loads(source.read_text(encoding="utf-8"))
        # Popped, since what is left of the content becomes the arguments of `Ablation`.
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ValueError("another format or version")
        groups = [
            Silenced(
                str(one["name"]),
                tuple((int(layer), int(head)) for layer, head in one["heads"]),
                str(one["right"]),
            )
            for one in content.pop("groups")
        ]
        lists = {name: tuple(map(str, content[name])) for name in ("samples", "tasks")}
        result = Ablation(**{**content, "groups": tuple(groups), **lists})
        _check(result)
    return result


def _check(result: Ablation) -> None:
    """Refuse values that no ablation has."""
    texts = (result.model, result.found_on, result.command)
    if not all(isinstance(text, str) for text in texts) or not result.model:
        raise ValueError("the model, or where its heads were found, is no text")
    if result.kind not in KINDS or type(result.same_layers) is not bool:
        raise ValueError(f"kind of heads {result.kind!r}")
    if not (type(result.found) is type(result.heads) is int and 0 < result.found < result.heads):
        raise ValueError(f"{result.found!r} of {result.heads!r} heads")
    count = len(result.samples)
    # Three groups at least: nothing, the kind, and one random set.
    if count < 2 or len(result.tasks) != count or len(result.groups) < 3:
        raise ValueError(f"{count} questions, {len(result.groups)} groups")
    for group in result.groups:
        if len(group.right) != count or set(group.right) - set("01-"):
            raise ValueError(f"the answers with {group.name} silenced")


def ablate(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    kind: str = "visual",
    recording: Recording | None = None,
    recorded: Sequence[Sample] | None = None,
    draws: int = 8,
    seed: int = 0,
    same_layers: bool = False,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    command: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> Ablation:
    """Silence the heads of a kind, and as many others, and count right answers.

    Args:
        vlm: a loaded model.
        samples: questions with known answers.
        kind: which heads, one of `taxonomy.KINDS`.
        recording: where the kinds are read from; None records questions for that.
        recorded: questions to record, none of them among `samples`; None takes every third of
            `samples` for that and leaves it out of the answers.
        draws: how many random sets of other heads.
        seed: of these draws.
        same_layers: see `plan`.
        max_new_tokens: longest answer, in tokens; cut earlier where all right answers are shorter.
        batch_size: questions per pass.
        command: how to make this again, kept in the result.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        InputError: questions without known answers, too few of them, questions that the heads were
            found by, no heads to compare, a
            recording of another model.
    """
    # Questions by which heads are found are kept apart from those by which they are judged;
    # otherwise a head could look needed for questions that it was chosen by.
    found_on = "" if recording is None else f"a recording of {len(recording)} samples"
    if recording is None:
        if recorded is None:
            # As `calibrate` parts questions: every third, as a file may be sorted by task.
            recorded = samples[2::3]
            samples = [sample for i, sample in enumerate(samples) if i % 3 != 2]
        _check_apart(shared_questions(samples, recorded))
        recording = _record(vlm, recorded, max_new_tokens, batch_size, progress)
        found_on = f"{describe_questions(recorded)} of their own"
    else:
        _check_apart(_recorded_scenes(recording, samples))
    if len(samples) < 2 or any(not sample.answers for sample in samples):
        raise InputError(
            f"{len(samples)} questions: at least two are needed, each with its right answer"
        )
    asked = provenance(vlm.model, describe(vlm.model), ())
    check_same_model(
        Origin.of_attrs("the recording", recording.attrs), Origin.of_attrs("the model", asked)
    )
    of_kind, others = find_heads(recording, kind)
    groups_ = plan(of_kind, others, kind, draws, seed, same_layers=same_layers)
    right = _ask_all(vlm, samples, groups_, max_new_tokens, batch_size, progress)
    done = tuple(
        Silenced(one.name, one.heads, letters) for one, letters in zip(groups_, right, strict=True)
    )
    name = f"{vlm.name} {vlm.revision or ''}".strip()
    ids, tasks = tuple(sample.id for sample in samples), tuple(sample.task for sample in samples)
    total = len(of_kind) + len(others)
    return Ablation(
        kind, len(of_kind), total, name, ids, tasks, done, found_on, same_layers, command
    )


def _check_apart(shared: Sequence[str]) -> None:
    """Refuse to judge heads by the questions they were found by."""
    if shared:
        raise InputError(
            f"{len(shared)} of the questions are also those the kinds of heads are read from, for"
            f" example {shared[0]}: heads that were found by a question cannot be judged by it;"
            " record or ask other questions"
        )


def _recorded_scenes(recording: Recording, samples: Sequence[Sample]) -> list[str]:
    """Ids of the drawn scenes among the samples that the recording holds."""
    known = [recording.facts(name).get("scene") for name in recording.samples]
    return [sample.id for sample in samples if sample.scene and dict(sample.scene) in known]


def _record(
    vlm: VLM,
    samples: Sequence[Sample],
    tokens: int,
    batch: int,
    progress: Callable[[str, int, int], None] | None,
) -> Recording:
    if not samples:
        raise InputError(
            "too few questions: a third of them is needed to find out what kinds the heads are of"
        )
    watch = (
        None if progress is None else lambda done, _: progress("finding heads", done, len(samples))
    )
    return record_samples(
        vlm,
        samples,
        max_new_tokens=tokens,
        batch_size=batch,
        statistics=list(NEEDED),
        on_token=watch,
    )


def _ask_all(
    vlm: VLM,
    samples: Sequence[Sample],
    plans: Sequence[Silenced],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[str, int, int], None] | None,
) -> list[str]:
    """Per group one letter per sample.

    Questions of equal length share a pass and see their pictures once.
    """
    # (groups, questions)
    letters = np.full((len(plans), len(samples)), "-", dtype="<U1")
    total, done = len(plans) * len(samples), 0
    for indices in _batches(vlm, samples, batch_size):
        # An answer longer than any right one is wrong already.
        longest = min(
            max_new_tokens, longest_right_answer(vlm, [samples[index] for index in indices])
        )
        # The decoder alone is silenced, so the pictures' features are the same for all groups.
        with images_encoded_once(vlm.model):
            for number, one in enumerate(plans):
                # Defaults hold the values of this turn of the loop.
                def ask(
                    part: Sequence[int], heads: Sequence[Head] = one.heads, longest: int = longest
                ) -> list[Any]:
                    chosen = [samples[index] for index in part]
                    with silenced(vlm.model, heads):
                        run = generate(vlm, chosen, None, max_new_tokens=longest)
                    texts = decode_texts(vlm, run.tokens)
                    return [
                        correct(text, sample) for text, sample in zip(texts, chosen, strict=True)
                    ]

                for index, found in zip(indices, halve_on_failure(ask, indices), strict=True):
                    letters[number, index] = "-" if isinstance(found, Failure) else str(int(found))
                done += len(indices)
                if progress is not None:
                    progress("silencing", done, total)
    return ["".join(row) for row in letters]


def _batches(vlm: VLM, samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Indices of samples of one task and length, whose answers are about as long."""
    for task in dict.fromkeys(sample.task for sample in samples):
        places = [index for index, sample in enumerate(samples) if sample.task == task]
        for group in batches_by_length(vlm, [samples[index] for index in places], batch_size):
            yield [places[index] for index in group]
