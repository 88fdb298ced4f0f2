"""What the person who started the server allows, handed to the pages through the environment.

Streamlit starts scripts itself, so arguments cannot be passed to them; environment variables can,
from `avl app`, from `streamlit run` and from tests alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from avl_analysis.errors import InputError

VARIABLE = "AVL_APP"
"""Environment variable that holds the settings as JSON; unset means the defaults."""


@dataclass(frozen=True)
class Settings:
    """Limits of one server.

    Attributes:
        models: models one can choose from, the first one is shown first: "scenes", folders or hub
            ids.
        folders: whether a page may name a further folder on the server's disk.
        hub: whether hub ids may be fetched.
        webcam: whether the webcam is offered.
        upload_bytes: largest picture file accepted.
        recording_bytes: largest recording or comparison file accepted.
        picture_pixels: largest picture accepted, width x height, checked before it is decoded.
        longest: most tokens an answer may have.
        loaded: how many models are kept in memory; the least recently used one is given away first.
        results: how many answers, observations and recordings are remembered for all visitors
            together.
    """

    models: tuple[str, ...] = ("scenes",)
    folders: bool = True
    hub: bool = False
    webcam: bool = False
    upload_bytes: int = 10 * 2**20
    recording_bytes: int = 200 * 2**20
    picture_pixels: int = 24_000_000
    longest: int = 256
    loaded: int = 2
    results: int = 48

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError(
                "the dashboard needs at least one model, for example: avl app --model scenes"
            )

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this server.

    Raises:
        InputError: the variable is not what `Settings.as_json` writes.
    """
    text = environment.get(VARIABLE)
    if not text:
        return Settings()
    try:
        values = json.loads(text)
        # JSON has no tuples, so the models come back as a list.
        return Settings(**{**values, "models": tuple(values.get("models", ("scenes",)))})
    # ValueError: no JSON. AttributeError: JSON, but no object. TypeError: a setting unknown here.
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{VARIABLE} holds {text[:80]!r}, which are not settings of the dashboard: {error}"
        ) from error
