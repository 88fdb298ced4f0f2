"""Which model something was measured on, and whether two measurements belong to the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avl_analysis.errors import InputError

_TOLD = ("model_class", "model_type", "layers", "query_heads", "kv_heads")


@dataclass(frozen=True)
class Origin:
    """What a measurement says about its model; empty where it says nothing.

    Attributes:
        what: the measurement, in words for messages, for example "the comparison".
        model: name, folder or hub id.
        revision: hub commit or digest of the weights.
        facts: further attributes by name, such as the number of layers.
    """

    what: str
    model: str = ""
    revision: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_attrs(cls, what: str, attrs: Mapping[str, Any]) -> Origin:
        """The origin told by the attributes of a recording or comparison."""
        facts = {name: str(attrs[name]) for name in _TOLD if attrs.get(name)}
        name, revision = str(attrs.get("model") or ""), str(attrs.get("model_revision") or "")
        # A model that was built and not loaded is recorded under the name of its class.
        return cls(what, "" if name == facts.get("model_class") else name, revision, facts)


def check_same_model(first: Origin, second: Origin) -> None:
    """Refuse two measurements of different models.

    Equal revisions are the same model whatever it is called; where one revision is unknown, the
    names must be equal. What is unknown on one side is not held against the other.

    Raises:
        InputError: different revisions, names, or kinds of model; names both values.
    """
    pairs = [
        (name, first.facts[name], second.facts[name])
        for name in first.facts.keys() & second.facts.keys()
    ]
    if first.revision and second.revision:
        pairs.append(("revision", first.revision, second.revision))
    elif first.model and second.model:
        pairs.append(("name", _whole(first.model), _whole(second.model)))
    # Sorted, because sets have no fixed order: the message names the same difference every time.
    for name, one, other in sorted(pairs):
        if one != other:
            raise InputError(
                f"{first.what} and {second.what} are of different models ({name.replace('_', ' ')}"
                f" {one} and {other}): measure both on the same one"
            )


def _whole(model: str) -> str:
    """The name, with a folder written in one way."""
    # A hub id is not a path; asking the system about one may fail, for example if it is too long.
    try:
        return str(Path(model).resolve()) if Path(model).is_dir() else model
    except (OSError, ValueError):
        return model
