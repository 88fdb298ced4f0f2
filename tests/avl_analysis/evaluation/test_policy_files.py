"""Policies by name and from files: what is meant, and that nothing else gets through."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

import avl
from avl.policies.registry import policies
from avl_analysis.errors import InputError
from avl_analysis.evaluation.policy_files import (
    load_evidence,
    load_policy,
    named_policy,
    policy_to_json,
    save_policy,
    with_budget,
)


def test_every_policy_can_be_named() -> None:
    assert {type(named_policy(name)) for name in policies()} == set(policies().values())
    assert named_policy("full") == avl.FullPolicy()
    assert named_policy("a-vl") == avl.AdaptivePolicy()


def test_a_name_takes_a_budget_and_settings() -> None:
    assert named_policy("h2o:0.25") == avl.H2OPolicy(budget=0.25)
    assert named_policy("a-vl:0.5") == avl.AdaptivePolicy.for_budget(0.5)
    changed = named_policy("a-vl, core=0.2, text=none, refresh_every=4")
    assert changed == avl.AdaptivePolicy(core=0.2, text=None, refresh_every=4)
    assert named_policy("a-vl-cold,cold=2") == avl.AdaptivePolicy.with_cold_tier(cold=2)
    assert named_policy("a-vl-cold:0.35") == avl.AdaptivePolicy.with_cold_tier(0.35)
    assert named_policy("snapkv:0.5,window=8") == avl.SnapKVPolicy(budget=0.5, window=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h3o", "unknown policy 'h3o': choose from full, a-vl"),
        ("h2o:half", "'half' in 'h2o:half' is not a number"),
        ("h2o:2", "budget"),
        ("a-vl-cold:2", "budget"),
        ("a-vl,cold=3", "cold must be one of 8, 4, 2, 16, 'host'"),
        ("full:0.5", "FullPolicy has no budget"),
        ("a-vl,core", "'core' in 'a-vl,core' is no setting"),
        ("a-vl,size=3", "AdaptivePolicy has no setting 'size'; it has secondary"),
        ("a-vl,core=0.9", "core=0.9 is larger than secondary=0.5"),
        ("a-vl,core=big", "core must be a number"),
        ("gone.json", "there is no policy file gone.json"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        named_policy(text)
    assert message in str(caught.value)


def test_a_saved_policy_loads_as_it_was(tmp_path: Path) -> None:
    examples = [kind() for kind in policies().values()]
    examples += [
        avl.AdaptivePolicy(secondary=0.4, core=None, text=None),
        with_budget(avl.FastVPolicy, 0.3),
    ]
    examples += [
        avl.AdaptivePolicy.with_cold_tier(0.3),
        avl.AdaptivePolicy(secondary=(0.5, 0.4), core=0.3, cold="host", drift=0.9),
    ]
    for policy in examples:
        path = save_policy(policy, tmp_path / "p.json", {"curve": [1, 2]})
        assert load_policy(path) == policy
        assert named_policy(str(path)) == policy
        assert load_evidence(path) == {"curve": [1, 2]}


def test_a_file_names_only_what_differs_from_the_defaults() -> None:
    assert policy_to_json(avl.AdaptivePolicy(core=0.2))["fields"] == {"core": 0.2}
    assert all(field.name for field in fields(avl.AdaptivePolicy))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", "is JSON but not a policy"),
        ({}, "is JSON but not a policy"),
        ({"format": "avl-policy", "version": 2}, "policy format 2"),
        ({"format": "avl-policy", "version": 1}, "names policy None; possible are FullPolicy"),
        ({"format": "avl-policy", "version": 1, "policy": "os.system"}, "names policy 'os.system'"),
        (
            {"format": "avl-policy", "version": 1, "policy": "H2OPolicy", "fields": {"x": 1}},
            "has no setting 'x'",
        ),
        (
            {"format": "avl-policy", "version": 1, "policy": "H2OPolicy", "fields": {"budget": 3}},
            "budget",
        ),
        (
            {"format": "avl-policy", "version": 1, "policy": "H2OPolicy", "fields": []},
            "does not describe a policy",
        ),
    ],
)
def test_a_file_that_is_no_policy_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as caught:
        load_policy(path)
    assert message in str(caught.value)


def test_a_policy_of_somebody_else_cannot_be_written(tmp_path: Path) -> None:
    class Own(avl.FullPolicy):
        pass

    with pytest.raises(InputError, match="Own cannot be written"):
        save_policy(Own(), tmp_path / "p.json")
