"""Which words the patches of an image say, layer by layer: the logit lens on image tokens.

The hidden state of an image token after a decoder layer is put through the model's final norm and
its output embedding, as if the layer were the last one, which gives a distribution over words
(nostalgebraist, "interpreting GPT: the logit lens", 2020; on image tokens of LLaVA Neo et al.,
2410.07149). `say_names` counts, where it is known what each patch shows, for which share of the
patches of an object the top words hold its name, beside the patches that show no object.

A word among the top words says that the state lies in its direction, not that the model uses it:
image tokens are never asked for their next word in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from avl.families import describe
from avl_analysis.capture.provenance import provenance
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.regions import Region, boxes_of, on_tokens, tokens_in_boxes
from avl_analysis.errors import InputError
from avl_analysis.heads.lens import decoder_layers, lens_head
from avl_analysis.models.images import open_image
from avl_analysis.models.loading import VLM
from avl_analysis.models.videos import Video
from avl_analysis.recordings.image_tokens import ImageTokens, images_of_layout
from avl_analysis.recordings.netcdf import read_labelled, write_labelled
from avl_analysis.scenes import generate as draw_scene

TOP = 5
"""Words that a patch is said to say."""
_ROWS = 256  # image tokens whose distributions are held at once
_LETTERS = 3  # of the first piece of a word that stands for it where no token is the whole word


@dataclass(frozen=True, eq=False)
class PatchWords:
    """What the patches of one prompt's images say.

    Attributes:
        model: name of the model.
        ids: (depths, image tokens, `TOP` or fewer) token ids, most probable first. Depth 0 is what
            enters the first decoder layer, depth d the state after d layers.
        probability: their probabilities.
        images: the tokens of every image and the part of the image under each.
        decode: text of one token id.
    """

    model: str
    ids: NDArray[np.int64]
    probability: NDArray[np.float32]
    images: tuple[ImageTokens, ...]
    decode: Callable[[int], str]

    @property
    def depths(self) -> int:
        """One more than decoder layers."""
        return int(self.ids.shape[0])

    def words(self, depth: int, rank: int = 0) -> list[str]:
        """The word of each image token at a depth; `rank` 0 is the most probable.

        Raises:
            InputError: a depth or rank that is not there.
        """
        if not 0 <= depth < self.depths or not 0 <= rank < self.ids.shape[2]:
            raise InputError(
                f"depth {depth}, rank {rank} is not there: depths 0 to {self.depths - 1}, ranks 0"
                f" to {self.ids.shape[2] - 1}"
            )
        return [self.decode(int(token)) for token in self.ids[depth, :, rank]]

    def holds(self, tokens: Sequence[int]) -> NDArray[np.bool_]:
        """(depths, image tokens) whether one of these ids is among the top words."""
        return np.asarray(np.isin(self.ids, list(tokens)).any(-1))


def patch_words(vlm: VLM, sample: Sample, top: int = TOP) -> PatchWords:
    """What the image tokens of a question's prompt say at every depth: one forward pass.

    Args:
        vlm: a loaded model.
        sample: the question, with at least one image.
        top: words per patch and depth.

    Raises:
        InputError: no image; images or prompts that cannot be used.
        avl.families.UnsupportedModelError: final norm or output embedding are not where the lens
            looks for them; it is compared with the model's own prediction.
    """
    if not sample.images:
        raise InputError("a question without an image has no image tokens to say anything")
    family = describe(vlm.model)
    inputs = vlm.prepare(
        list(sample.images), sample.prompt, system=sample.system, history=sample.history
    )
    layout = family.layout(inputs["input_ids"], inputs.get("attention_mask"), inputs)
    # (image tokens,) positions of the only row; `layout.image` is -1 outside images.
    at = (layout.image[0] >= 0).nonzero().flatten()
    with torch.no_grad(), _watched(decoder_layers(vlm.model), at) as states:
        output = vlm.model(**{**inputs, "use_cache": False})
        # The last position behind the last layer is the one state whose distribution the model
        # gives itself, so the lens is checked with it. All other uses leave this state out.
        head = lens_head(vlm.model, states[-1][-1], output.logits[0, -1].float())
        found = [_top(head, state[:-1], top) for state in states]
    tokenizer: Any = vlm.processor.tokenizer
    return PatchWords(
        vlm.name,
        torch.stack([ids for ids, _ in found]).numpy(),
        torch.stack([probability for _, probability in found]).numpy(),
        images_of_layout(layout, 0),
        lambda token: str(tokenizer.decode([token])),
    )


@contextmanager
def _watched(layers: nn.ModuleList, at: Tensor) -> Iterator[list[Tensor]]:
    """States of image tokens and of the last position behind them; a pass fills the list.

    Args:
        layers: of the decoder; the first entry is what enters the first of them.
        at: (image tokens,) positions.
    """
    states: list[Tensor] = []

    def keep(hidden: Any) -> None:
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        # (image tokens + 1,): the rest of the prompt is not kept.
        places = torch.cat([at.to(hidden.device), torch.tensor([-1], device=hidden.device)])
        states.append(hidden[0, places])

    def enter(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        keep(options["hidden_states"] if "hidden_states" in options else args[0])

    # Depth 0 comes from in front of the first layer, all later ones from behind a layer.
    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    for layer in layers:
        handles.append(layer.register_forward_hook(lambda module, args, output: keep(output)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _top(head: nn.Module, states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the most probable words, (states, count) each, on the CPU."""
    ids, probabilities = [], []
    # A distribution is as long as the vocabulary, so only `_ROWS` of them are held at once.
    for part in states.split(_ROWS):
        chances = torch.softmax(head(part).float(), -1)
        best = chances.topk(min(count, chances.shape[-1]), -1)
        ids.append(best.indices.cpu())
        probabilities.append(best.values.cpu())
    return torch.cat(ids), torch.cat(probabilities)


# -- names -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """Something a picture shows: what it is called, of which kind the name is, and its tokens."""

    kind: str
    name: str
    tokens: tuple[int, ...]


def say_names(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    top: int = TOP,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Share of an object's patches whose top words hold its name, by depth.

    Args:
        vlm: a loaded model.
        samples: drawn scenes, or questions whose `meta` names what their one picture shows:
            {"objects": [[left, top, right, bottom, "cat"], ...]} in pixels.
        top: words that a patch says.
        progress: called with (questions done, questions in all).

    Returns:
        Dimensions kind ("shape", "colour", "character" for scenes, "name" for `meta`), depth,
        picture. Variables `own` (share of an object's patches that say its name, mean over the
        picture's objects) and `background` (share of the patches on no object that say the same
        name). NaN where a picture shows nothing of a kind, or the tokenizer has no piece that
        stands for any name.

    Raises:
        InputError: no samples, or none of which it is known what its picture shows.
        avl.families.UnsupportedModelError: as `patch_words`.
    """
    rows: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
    seen: set[str] = set()
    names: list[str] = []
    depths = 0
    for done, sample in enumerate(samples):
        scene = sample.scene or {}
        # Scenes of one seed and index may be asked several questions about.
        key = f"{scene['seed']} {scene['index']}" if scene else sample.id
        if len(sample.images) != 1 or key in seen:
            continue  # a picture counts once, whatever is asked
        found = patch_words(vlm, sample, top)
        shown = what_is_shown(sample, found.images[0])
        depths = found.depths
        if shown:
            seen.add(key)
            names.append(sample.id)
            rows.append(_shares(vlm, found, shown))
        if progress is not None:
            progress(done + 1, len(samples))
    if not rows:
        raise InputError(
            "of none of the pictures it is known what they show: use drawn scenes, or name objects"
            ' with boxes under "meta": {"objects": [[left, top, right, bottom, "cat"], ...]}'
        )
    kinds = list(dict.fromkeys(kind for row in rows for kind in row))
    # (kinds, pictures, 2, depths): own and background.
    nothing = (np.full(depths, np.nan),) * 2
    values = np.array([[row.get(kind, nothing) for row in rows] for kind in kinds])
    dims = ("kind", "picture", "depth")
    family = describe(vlm.model)
    return xr.Dataset(
        {
            "own": (dims, values[:, :, 0], {"units": "1"}),
            "background": (dims, values[:, :, 1], {"units": "1"}),
        },
        {"kind": kinds, "picture": names, "depth": np.arange(depths)},
        {**provenance(vlm.model, family, ()), "top": top},
    )


def what_is_shown(sample: Sample, image: ImageTokens) -> list[Named]:
    """What the one picture of a question shows, where that is known.

    Args:
        sample: a drawn scene, or a question with objects in its `meta`.
        image: the tokens of its picture.
    """
    if sample.scene:
        scene = draw_scene(
            int(sample.scene["seed"]), int(sample.scene["index"]), sample.scene["task"]
        ).scene
        found = []
        for thing in scene.things:
            tokens = on_tokens(Region(boxes_of([thing.box]), thing.patches), image).tokens
            found += [Named("shape", thing.shape, tokens), Named("colour", thing.colour, tokens)]
        for one in scene.text.characters if scene.text else ():
            tokens = on_tokens(Region(boxes_of([one.box]), one.patches), image).tokens
            found.append(Named("character", one.character, tokens))
        return [named for named in found if named.tokens]
    objects = boxes_of((sample.meta or {}).get("objects", ()))
    picture = sample.images[0]
    if not objects or not image.placed or isinstance(picture, Video):
        return []
    width, height = open_image(picture).size
    places = image.boxes * [width, height, width, height]
    named = [
        Named(
            "name",
            box.label,
            tuple(tokens_in_boxes(places, [(box.left, box.top, box.right, box.bottom)])),
        )
        for box in objects
    ]
    return [one for one in named if one.tokens and one.name]


def _shares(
    vlm: VLM, found: PatchWords, shown: Sequence[Named]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind -> (depths,) share of own patches, and of the background's, that say the name."""
    image = found.images[0]
    taken = {token for named in shown for token in named.tokens}
    # Everything that anything covers is left out of the background, also things of another name.
    rest = [place for place in range(len(image.token)) if place not in taken]
    result: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for kind in dict.fromkeys(named.kind for named in shown):
        own, background = [], []
        for named in shown:
            ids = name_tokens(vlm.processor.tokenizer, named.name)
            if named.kind != kind or not ids:
                continue
            # (depths, tokens of this image): `image.token` counts over the image tokens of all
            # images.
            says = found.holds(ids)[:, image.token]
            own.append(says[:, list(named.tokens)].mean(1))
            background.append(says[:, rest].mean(1) if rest else np.full(len(says), np.nan))
        nothing = np.full(found.depths, np.nan)
        result[kind] = (np.mean(own, 0), np.mean(background, 0)) if own else (nothing, nothing)
    return result


def name_tokens(tokenizer: Any, name: str) -> tuple[int, ...]:
    """Ids of the tokens that stand for a name.

    The single tokens that are the whole name, with or without a space before it and with a capital;
    where there is none, first pieces of at least three letters. Empty where there are none either.
    """
    whole, begun = set(), set()
    for text in {name, f" {name}", name.capitalize(), f" {name.capitalize()}"}:
        ids = [
            token
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]
            # Some tokenizers write a space in front of a word as a token of its own.
            if tokenizer.decode([token]).strip()
        ]
        if len(ids) == 1:
            whole.add(ids[0])
        elif ids and len(tokenizer.decode([ids[0]]).strip()) >= _LETTERS:
            begun.add(ids[0])
    return tuple(sorted(whole or begun))


FORMAT, VERSION = "avl-patch-names", 1
_NEEDED: dict[str, tuple[str, ...]] = {
    "own": ("kind", "picture", "depth"),
    "background": ("kind", "picture", "depth"),
}


def save_patch_names(result: xr.Dataset, path: str | PathLike[str]) -> Path:
    """Write what `say_names` gave as one netCDF file.

    Raises:
        InputError: the file cannot be written.
    """
    return write_labelled(result, path, FORMAT, VERSION)


def load_patch_names(path: str | PathLike[str]) -> xr.Dataset:
    """Read what `save_patch_names` wrote.

    Raises:
        InputError: no such file, or not one of these.
    """
    return read_labelled(path, FORMAT, VERSION, "avl patches", _NEEDED)
