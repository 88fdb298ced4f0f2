"""Policies by name and as small JSON files, so that a choice made once can be used everywhere.

    h2o                         the policy's own settings
    a-vl:0.5                    scaled to half of the full cache's bytes
    a-vl-cold, a-vl-cold:0.35   a preset: A-VL with all image keys kept in few bits
    a-vl,core=0.2,text=none     fields changed
    my.json                     what `save_policy` (or calibration) wrote

A file names the class and the fields that differ from its defaults, and may carry the evidence they
were chosen by. Only the policies that avl.policies.registry lists can be named: a file never runs
code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from avl import Policy
from avl.policies.registry import PRESETS, policies
from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.files import user_path, write_text

FORMAT, VERSION = "avl-policy", 1


def named_policy(text: str) -> Policy:
    """The policy meant by a name with settings, or by the path of a JSON file; see the module.

    Raises:
        InputError: an unknown name, no such file, settings the policy does not have or does not
            accept.
    """
    if text.endswith(".json"):
        return load_policy(text)
    head, *settings = [part.strip() for part in text.split(",")]
    name, _, budget = head.partition(":")
    if name not in policies() and name not in PRESETS:
        names = ", ".join([*policies(), *PRESETS])
        raise InputError(f"unknown policy {name!r}: choose from {names}, or name a .json file")
    values = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign:
            raise InputError(
                f"{setting!r} in {text!r} is no setting: write name=value, for example core=0.3"
            )
        # Later settings of the same name win.
        values[key.strip()] = _value(value.strip())
    share = _number(budget, text) if budget else None
    return changed(
        _preset(name, share) if name in PRESETS else _plain(policies()[name], share), values
    )


def _preset(name: str, budget: float | None) -> Policy:
    try:
        return PRESETS[name].make(budget)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def _plain(kind: type[Policy], budget: float | None) -> Policy:
    return kind() if budget is None else with_budget(kind, budget)


def with_budget(kind: type[Policy], budget: float) -> Policy:
    """The policy of this class that holds at most `budget` of the full cache's keys.

    Raises:
        InputError: a class without a budget, or a number it does not accept.
    """
    try:
        return kind.for_budget(budget)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def changed(policy: Policy, values: Mapping[str, Any]) -> Policy:
    """The policy with some fields replaced.

    Raises:
        InputError: a field it does not have, or a value it does not accept.
    """
    known = [field.name for field in fields(policy)]
    for name in values:
        if name not in known:
            raise InputError(
                f"{type(policy).__name__} has no setting {name!r}; it has"
                f" {', '.join(known) or 'none'}"
            )
    try:
        # The policy's own checks come first: their messages say what the setting means.
        made = replace(policy, **values)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    kinds = get_type_hints(type(policy))
    for name, value in values.items():  # what the policy itself did not refuse
        if not _fits(value, kinds[name]):
            kind = _said(kinds[name])
            raise InputError(f"{name} of {type(policy).__name__} must be a {kind}; got {value!r}")
    return made


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type, as far as that can be told.

    NaN and infinity are no numbers here.
    """
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(kind)[0]) for v in value)
    # bool is an int to Python, and no number here: exact types, not isinstance.
    if kind is float:
        return type(value) in (int, float) and abs(value) < 2**31
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    return not isinstance(kind, type) or type(value) is kind


def _said(kind: Any) -> str:
    """A type in words."""
    names = {float: "number", int: "whole number", bool: "true or false", str: "text"}
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_said(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {_said(get_args(kind)[0])}s"
    return "none" if kind is type(None) else names.get(kind, str(kind))


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """Class and fields of a policy that differ from its defaults.

    Raises:
        InputError: a policy that cannot be named.
    """
    if type(policy) not in policies().values():
        raise InputError(
            f"{type(policy).__name__} cannot be written to a file; these can:"
            f" {', '.join(policies())}"
        )
    plain = {field.name: getattr(policy, field.name) for field in fields(policy)}
    default = type(policy)()
    # Defaults are left out, so that a file says what was chosen and follows a default that is
    # changed.
    different = {name: value for name, value in plain.items() if value != getattr(default, name)}
    return {"policy": type(policy).__name__, "fields": different}


def policy_from_json(content: Any, source: str = "this content") -> Policy:
    """The policy that `policy_to_json` described.

    Raises:
        InputError: anything else; `source` is named in the message.
    """
    classes = {kind.__name__: kind for kind in policies().values()}
    if not isinstance(content, dict) or not isinstance(content.get("fields", {}), dict):
        raise InputError(
            f"{source} does not describe a policy: an object with 'policy' and 'fields' is needed"
        )
    # A list or object cannot be looked up among the names, so the type is checked first.
    if not isinstance(content.get("policy"), str) or content["policy"] not in classes:
        raise InputError(
            f"{source} names policy {content.get('policy')!r}; possible are {', '.join(classes)}"
        )
    given = {
        # JSON has no tuples; shares per layer are tuples in the policies.
        name: tuple(value) if isinstance(value, list) else value
        for name, value in content.get("fields", {}).items()
    }
    try:
        return changed(classes[content["policy"]](), given)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def save_policy(
    policy: Policy, path: str | PathLike[str], evidence: Mapping[str, Any] | None = None
) -> Path:
    """Write a policy, and what it was chosen by, as JSON.

    Raises:
        InputError: a policy that cannot be named, or a file that cannot be written.
    """
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **policy_to_json(policy)}
    if evidence is not None:
        content["evidence"] = dict(evidence)
    return write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def load_policy(path: str | PathLike[str]) -> Policy:
    """Read a policy that `save_policy` wrote.

    Raises:
        InputError: no such file, not JSON, not a policy, of another version of the format, or
            settings out of range.
    """
    return policy_from_json(_read(path), str(path))


def load_evidence(path: str | PathLike[str]) -> dict[str, Any] | None:
    """What the policy in a file was chosen by; None if the file does not say.

    Raises as `load_policy`.
    """
    evidence = _read(path).get("evidence")
    with blamed_on_input(f"the evidence in {path} is no object"):
        return None if evidence is None else dict(evidence)


def load_options(path: str | PathLike[str]) -> dict[str, dict[str, Any]]:
    """Options beside the budget that a search chose: name of a policy or preset -> fields.

    Raises:
        InputError: no such file, not one that `python -m avl_analysis.evaluation.search` wrote, or
            options of a policy that is not known.
    """
    source = user_path(path)
    if not source.is_file():
        raise InputError(
            f"there is no file of options {source}; make one with python -m"
            f" avl_analysis.evaluation.search --out {source}"
        )
    with blamed_on_input(f"{source} holds no options that a search chose"):
        chosen = json.loads(source.read_text(encoding="utf-8"))["chosen"]
        found = {str(name): dict(values) for name, values in chosen.items()}
    for name in found:
        if name not in policies() and name not in PRESETS:
            raise InputError(f"{source} has options of {name!r}, which is no policy known here")
    return found


def _read(path: str | PathLike[str]) -> dict[str, Any]:
    source = user_path(path)
    if not source.is_file():
        raise InputError(
            f"there is no policy file {source}; make one with avl calibrate --out {source}"
        )
    with blamed_on_input(f"{source} is not a JSON file"):
        content = json.loads(source.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f'{source} is JSON but not a policy (no "format": "{FORMAT}" in it)')
    if content.get("version") != VERSION:
        raise InputError(
            f"{source} has policy format {content.get('version')}, this program reads {VERSION}"
        )
    return content


def _value(text: str) -> Any:
    """A setting as Python means it: none, true, false, a number, otherwise the text."""
    plain = {"none": None, "true": True, "false": False}
    if text.lower() in plain:
        return plain[text.lower()]
    # Whole numbers first: `float` would take them too, and some settings must be whole.
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"{text!r} in {where!r} is not a number: write the budget like a-vl:0.5"
        ) from error
