"""Attention knock-out: cut attention from one group of tokens to another, and see what is lost.

`knocked_out(model, "image", "question", layers=[3, 4])` hides image keys from the rows of question
tokens in those layers, so no information flows from the image into the question there. `knockout`
does this for every flow and every window of layers while the model is led along its own answer, and
keeps how probable the answer still is and whether the model would still give it. After Geva et al.
(2023, 2304.14767), for vision-language models "What's in the Image?" (2411.17491).

Groups part all positions: system and image tokens; question, the text of the prompt but its last
position; last, the position that produces the first answer token; answer, every later one. A row
always keeps its own key, so no row is left with nothing to attend to.

Cutting attention tells what a path carries, given that all others stay. It does not tell that the
model needs that path: what one window of layers loses, another may have moved before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from avl.attention import Attend, AttentionCall, Forward
from avl.families import UnsupportedModelError, describe
from avl.hooks import HookError, Intervention, attached
from avl.tokens import Modality
from avl_analysis.capture.provenance import provenance
from avl_analysis.corpus.batches import (
    Failure,
    batches_by_length,
    halve_on_failure,
    images_encoded_once,
)
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.evaluation.generation import generate
from avl_analysis.heads.led_answers import lead
from avl_analysis.models.loading import VLM
from avl_analysis.recordings.netcdf import read_labelled, write_labelled

GROUPS = ("system", "image", "question", "last", "answer")
"""Groups of tokens, in the order of their codes."""
FLOWS: tuple[tuple[str, str], ...] = (
    ("image", "question"),
    ("image", "last"),
    ("image", "answer"),
    ("question", "last"),
    ("question", "answer"),
    ("system", "all"),
)
"""Flows that `knockout` cuts unless told otherwise: keys of the first group, rows of the second."""
_PADDING = -1


class _KnockOut(Intervention):
    """Hides the keys of one group from the rows of another."""

    def __init__(
        self, source: str, target: str, layers: Sequence[int], heads: Sequence[int] | None
    ) -> None:
        self.source, self.layers = GROUPS.index(source), frozenset(layers)
        self.target = None if target == "all" else GROUPS.index(target)
        self.heads = None if heads is None else list(heads)
        self._groups: Tensor | None = None

    def begin(self, forward: Forward) -> None:
        if forward.kind == "extend":
            raise HookError("knock-out follows one question and its answer; start a new cache")
        if forward.kind == "prefill":
            # (batch, positions); it grows by "answer" with every decode step, up to the length of
            # the cache.
            self._groups = prompt_groups(forward)
        assert self._groups is not None
        # Tokens generated since the last pass.
        missing = forward.layout.length - self._groups.shape[1]
        if missing:
            answer = self._groups.new_full((len(self._groups), missing), GROUPS.index("answer"))
            self._groups = torch.cat([self._groups, answer], 1)

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        if call.layer in self.layers:
            call.mask = self._mask(call)
        return inner(call)

    def _mask(self, call: AttentionCall) -> Tensor:
        """The call's mask with the cut added, (batch, 1 or query heads, rows, keys) additive."""
        assert self._groups is not None
        groups = self._groups.to(call.query.device)
        row_index, key_index = row_and_key_places(call)
        # (batch, rows) and (batch, keys) codes. With target "all" every row but padding is cut.
        of_rows, of_keys = groups[:, row_index], groups[:, key_index]
        wanted = of_rows != _PADDING if self.target is None else of_rows == self.target
        cut = wanted[:, :, None] & (of_keys == self.source)[:, None]
        # (batch, rows, keys). A row without any key left would have no softmax.
        cut &= row_index[:, None] != key_index[None]  # a row keeps its own key
        mask = additive_mask(call, row_index, key_index)
        lowest = torch.finfo(call.query.dtype).min
        cut = cut[:, None]
        if self.heads is not None:
            chosen = torch.zeros(call.query.shape[1], dtype=torch.bool, device=cut.device)
            chosen[self.heads] = True
            cut = cut & chosen[None, :, None, None]
        return torch.where(cut, lowest, mask)


def prompt_groups(forward: Forward) -> Tensor:
    """(batch, positions) codes of `GROUPS` for a prompt, -1 for padding.

    A prompt without an image has no system part; all of it but its last position is question.
    """
    modality = forward.layout.modality.long()
    groups = torch.full_like(modality, GROUPS.index("question"))
    groups[modality == Modality.SYSTEM] = GROUPS.index("system")
    groups[modality == Modality.IMAGE] = GROUPS.index("image")
    groups[modality == Modality.PADDING] = _PADDING
    valid = modality != Modality.PADDING
    # The last position that is no padding, whichever side the padding is on. It is set after the
    # others, since it would count as question otherwise.
    place = torch.arange(modality.shape[1], device=modality.device).expand_as(modality)
    last = torch.where(valid, place, -1).amax(1)
    groups[torch.arange(len(groups), device=groups.device), last] = GROUPS.index("last")
    return groups


def row_and_key_places(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Sequence index of every query row, (rows,), and of every key, (keys,), of a call.

    Raises:
        UnsupportedModelError: keys differ between rows of the batch or heads.
    """
    # In a decode step the only row is at `start`, behind everything that is cached.
    rows, keys, start = call.query.shape[2], call.key.shape[2], call.forward.start
    device = call.query.device
    places = call.key_positions
    places = torch.arange(keys, device=device) if places is None else places.to(device)
    if places.dim() != 1:
        raise UnsupportedModelError("a cut needs one set of keys for all rows and heads")
    return torch.arange(start, start + rows, device=device), places


def additive_mask(call: AttentionCall, row_index: Tensor, key_index: Tensor) -> Tensor:
    """The mask of a call in additive form, (batch or 1, 1 or heads, rows, keys)."""
    dtype = call.query.dtype
    lowest = torch.finfo(dtype).min
    if call.mask is None:
        # Without a mask the kernel applies the causal rule itself, and it would no longer do so
        # once it is given a mask, so the rule has to be written out.
        hidden = (key_index[None] > row_index[:, None])[None, None]
        hidden = hidden if call.causal else torch.zeros_like(hidden)
        return torch.where(hidden, lowest, 0.0).to(dtype)
    if call.mask.dim() == 2:
        raise UnsupportedModelError(
            "knock-out needs a full mask, which flash kernels do not take; load the model with"
            " attn_implementation='sdpa' or 'eager'"
        )
    # A mask made for a longer cache has more columns than the call has keys.
    mask = call.mask[..., : call.key.shape[2]]
    return torch.where(mask, 0.0, lowest).to(dtype) if mask.dtype == torch.bool else mask


@contextmanager
def knocked_out(
    model: nn.Module,
    source: str,
    target: str,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Iterator[None]:
    """Inside, rows of `target` tokens do not attend to `source` tokens.

    Args:
        model: a loaded vision-language model without a policy, with SDPA or eager attention.
        source: group of the keys, one of `GROUPS`.
        target: group of the rows, one of `GROUPS`, or "all".
        layers: decoder layers in which attention is cut; None for all.
        heads: query heads in which it is cut; None for all.

    Raises:
        InputError: a group, layer or head the model does not have.
        avl.families.UnsupportedModelError, avl.hooks.HookError: as for a policy.
    """
    family = describe(model)
    if source not in GROUPS or target not in (*GROUPS, "all"):
        raise InputError(
            f"cannot cut attention from {source!r} to {target!r}: sources are {', '.join(GROUPS)};"
            " targets also all"
        )
    for name, chosen, count in (
        ("layer", layers, family.layers),
        ("head", heads, family.query_heads),
    ):
        for number in chosen or ():
            if not 0 <= number < count:
                raise InputError(f"there is no {name} {number}: this model has 0 to {count - 1}")
    cut = range(family.layers) if layers is None else layers
    with attached(model, _KnockOut(source, target, cut, heads)):
        yield


def knockout(
    vlm: VLM,
    samples: Sequence[Sample],
    flows: Sequence[tuple[str, str]] = FLOWS,
    *,
    window: int = 1,
    heads: Sequence[int] | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Cut every flow in every window of layers while the model is led along its own answer.

    Args:
        vlm: a loaded model.
        samples: questions, with or without known answers.
        flows: (source, target) pairs of groups.
        window: consecutive layers cut at once; a window is named by its first layer.
        heads: query heads in which attention is cut; None for all.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions per pass.
        progress: called with (windows done, windows in all) per batch of questions.

    Returns:
        Dimensions flow ("image -> question"), layer (first of the window), sample. Variables:
        `log_prob_change` (nats per answer token, against the same answer uncut), `probability`
        (of the whole answer, cut), `same_answer` (1 where greedy decoding would still give every
        token of the answer), and without flow and layer `plain_probability` and `answer`. NaN and
        "" where a sample failed.

    Raises:
        InputError: no samples, a window larger than the model, or every sample failed.
        avl.families.UnsupportedModelError: the model cannot be followed.
    """
    family = describe(vlm.model)
    if not samples:
        raise InputError("no questions to ask: pass at least one sample")
    if not 1 <= window <= family.layers:
        raise InputError(f"window {window}: choose 1 to {family.layers} layers")
    # The last window ends with the last layer.
    starts = list(range(family.layers - window + 1))
    names = [f"{source} -> {target}" for source, target in flows]
    shape = (len(flows), len(starts), len(samples))
    # (flows, windows, questions)
    change, probability, same = (np.full(shape, np.nan) for _ in range(3))
    plain, answers = np.full(len(samples), np.nan), np.full(len(samples), "", object)
    groups = batches_by_length(vlm, samples, batch_size)
    done, total = 0, len(groups) * len(flows) * len(starts)
    reasons: list[str] = []
    for indices in groups:
        batch = [samples[index] for index in indices]
        first = halve_on_failure(
            lambda part: generate(vlm, part, None, max_new_tokens=max_new_tokens).tokens, batch
        )
        reasons += [one.reason for one in first if isinstance(one, Failure)]
        kept = [
            (index, sample, tokens)
            for index, sample, tokens in zip(indices, batch, first, strict=True)
            if not isinstance(tokens, Failure)
        ]
        # Every question of this batch failed, and with it all of its cuts.
        if not kept:
            continue
        asked = [sample for _, sample, _ in kept]
        forced = [tokens for _, _, tokens in kept]
        # The model is led along its own answer also without a cut, so that both sides of the
        # difference go through the same code and the same batch.
        # The cut is in the decoder only, so the pictures' features are the same in every run.
        with images_encoded_once(vlm.model):
            uncut = lead(vlm, asked, forced)
            for (index, _, tokens), led in zip(kept, uncut, strict=True):
                plain[index] = led.probability
                text = vlm.processor.tokenizer.decode(tokens, skip_special_tokens=True)
                answers[index] = text.strip()
            for (f, flow), (w, start) in product(enumerate(flows), enumerate(starts)):
                layers = range(start, start + window)
                scope = knocked_out(vlm.model, *flow, layers=layers, heads=heads)
                cut = lead(vlm, asked, forced, scope)
                for (index, _, _), led, base in zip(kept, cut, uncut, strict=True):
                    change[f, w, index] = led.change(base)
                    probability[f, w, index] = led.probability
                    same[f, w, index] = led.same
                done += 1
                if progress is not None:
                    progress(done, total)
    if len(reasons) == len(samples):
        raise InputError(f"none of the {len(samples)} questions could be answered: {reasons[0]}")
    dims = ("flow", "layer", "sample")
    return xr.Dataset(
        {
            "log_prob_change": (dims, change, {"units": "nats per token"}),
            "probability": (dims, probability, {"units": "1"}),
            "same_answer": (dims, same, {"units": "1"}),
            "plain_probability": ("sample", plain, {"units": "1"}),
            "answer": ("sample", answers.astype(str)),
        },
        {"flow": names, "layer": starts, "sample": [sample.id for sample in samples]},
        {
            **provenance(vlm.model, family, ()),
            "window": window,
            "heads": "all" if heads is None else " ".join(map(str, heads)),
            "max_new_tokens": max_new_tokens,
        },
    )


FORMAT, VERSION = "avl-knockout", 1
_VARIABLES = {
    **dict.fromkeys(("log_prob_change", "same_answer"), ("flow", "layer", "sample")),
    "plain_probability": ("sample",),
    "flow": ("flow",),
    "layer": ("layer",),
}


def save_knockout(result: xr.Dataset, path: str | PathLike[str]) -> Path:
    """Write what `knockout` gave as one netCDF file.

    Raises:
        InputError: the file cannot be written.
    """
    return write_labelled(result, path, FORMAT, VERSION)


def load_knockout(path: str | PathLike[str]) -> xr.Dataset:
    """Read what `save_knockout` wrote.

    Raises:
        InputError: no such file, or not one of these.
    """
    return read_labelled(path, FORMAT, VERSION, "avl knockout", _VARIABLES)
