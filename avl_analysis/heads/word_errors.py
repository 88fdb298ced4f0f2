"""Whether attention says which words of an answer are wrong: questions asked until some are.

A model must be wrong now and then for this to be measured. The embedded model hardly ever is on the
scenes it was trained for, so pictures get noise of a stated strength; what stands where in them
stays known to the pixel. The answers are recorded, their words judged (`corpus.words`), and kept
with what was attended to while each was produced (`word_attention`).

Noise is one way to be wrong among many. What holds for words misread in noise need not hold for
objects that a model makes up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np
import xarray as xr

from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError
from avl_analysis.heads.word_attention import VARIABLES, word_table
from avl_analysis.models.images import open_image
from avl_analysis.models.loading import VLM
from avl_analysis.models.videos import Video
from avl_analysis.recordings.netcdf import read_labelled, write_labelled

NOISE = 0.15
"""Standard deviation of the noise unless told otherwise, as a share of the range of a pixel. The
embedded model then writes about a quarter of the words that can be wrong wrongly.
"""
NEEDED = ("modality_mass", "entropy")
FORMAT, VERSION = "avl-errors", 1


def noisy(samples: Sequence[Sample], noise: float, seed: int = 0) -> list[Sample]:
    """The questions with normal noise on every pixel and colour of their pictures.

    Args:
        samples: questions; what they say of their pictures stays true.
        noise: standard deviation as a share of the range of a pixel; 0 leaves them as they are.
        seed: of the noise, which also depends on the question's place in the list.

    Raises:
        InputError: negative noise, or a picture that cannot be read.
    """
    if not 0 <= noise < np.inf:
        raise InputError(f"noise {noise}: choose 0 or more, for example {NOISE}")
    if noise == 0:
        return list(samples)
    changed = []
    for index, sample in enumerate(samples):
        # One generator per question: its noise does not depend on the size of the pictures before
        # it.
        rng = np.random.default_rng([seed, index])
        stills = [image for image in sample.images if not isinstance(image, Video)]
        if len(stills) < len(sample.images):
            raise InputError(f"noise is put on images only, and {sample.id} shows a video: noise 0")
        pictures = [np.asarray(open_image(image), dtype=np.float64) for image in stills]
        # Pixels are 0 to 255, `noise` is a share of that range.
        pictures = [one + rng.normal(0, 255 * noise, one.shape) for one in pictures]
        images = tuple(np.clip(one, 0, 255).round().astype(np.uint8) for one in pictures)
        changed.append(replace(sample, images=images))
    return changed


def word_errors(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    noise: float = NOISE,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    on_token: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Every judged word of the answers to questions about noisy pictures.

    Args:
        vlm: a loaded model.
        samples: questions with known answers.
        noise: see `noisy`; 0 for pictures as they are.
        seed: of the noise.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions per pass.
        on_token: called with (samples done before this batch, new tokens of this batch so far).

    Returns:
        As `word_table`, with the recording's attributes and `noise`, `questions`, `longest`.

    Raises:
        InputError: questions without known answers, or as `record_samples`.
    """
    if not samples or any(not sample.answers for sample in samples):
        raise InputError(
            f"{len(samples)} questions: at least one is needed, each with its right answer"
        )
    recording = record_samples(
        vlm,
        noisy(samples, noise, seed),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        statistics=list(NEEDED),
        on_token=on_token,
    )
    attrs = {
        **recording.attrs,
        "noise": noise,
        "questions": len(samples),
        "max_new_tokens": max_new_tokens,
    }
    return word_table(recording).assign_attrs(attrs)


def save_word_errors(table: xr.Dataset, path: str | PathLike[str]) -> Path:
    """Write what `word_errors` gave as one netCDF file.

    Raises:
        InputError: the file cannot be written.
    """
    return write_labelled(table, path, FORMAT, VERSION)


def load_word_errors(path: str | PathLike[str]) -> xr.Dataset:
    """Read what `save_word_errors` wrote.

    Raises:
        InputError: no such file, or not one of these.
    """
    return read_labelled(path, FORMAT, VERSION, "avl errors", VARIABLES)
