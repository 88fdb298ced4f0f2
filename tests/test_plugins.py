"""What a distribution of somebody else adds through entry points, and what a broken one may not
break."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import avl
from avl.families import UnsupportedModelError, describe
from avl.plugins import PluginWarning, plugins
from avl.policies import registry
from avl_analysis.capture.recorder import record
from avl_analysis.evaluation.policy_files import load_policy, named_policy, save_policy
from avl_analysis.statistics import ALL, available
from tests import tiny
from tests.avl.generating import generate

ENTRY_POINTS = """
[avl.policies]
first = somebody:FirstKeys
broken = somebody:Missing
no_policy = somebody:NUMBER
taken = somebody:Taken

[avl.statistics]
first_image = somebody:FIRST_IMAGE
broken = not_there:ANYTHING

[avl.families]
llava = somebody:describe_llava
qwen3_vl = not_there:anything

[avl.commands]
greet = somebody_cli:greet
broken = somebody_cli:missing
"""

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar
import avl
from avl.families import Family
from avl_analysis.statistics import RowStatistic
from avl_analysis.statistics.modality_mass import FirstTokenMass

NUMBER = 3
DESCRIBED = []


@dataclass(frozen=True, kw_only=True)
class FirstKeys(avl.BudgetPolicy):
    """The first keys of a prompt."""

    name: ClassVar[str] = "first"
    label: ClassVar[str] = "first keys"
    color_slot: ClassVar[int] = 5

    def importance(self, prompt):
        return -prompt.positions.float()


@dataclass(frozen=True, kw_only=True)
class Taken(FirstKeys):
    name: ClassVar[str] = "h2o"


@dataclass(frozen=True)
class FirstImage(FirstTokenMass):
    name: ClassVar[str] = "first_image"


FIRST_IMAGE = FirstImage()


def describe_llava(model):
    DESCRIBED.append(model)
    text = model.config.text_config
    return Family(
        name="somebody's llava",
        decoder=model.get_decoder(),
        image_token_ids=(model.config.image_token_id,),
        layers=text.num_hidden_layers,
        query_heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        config=model.config,
    )
'''

COMMANDS = '''
def greet(name: str = "you") -> None:
    """Greet somebody."""
    print(f"hello {name}")
'''


@pytest.fixture
def somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an installed distribution of somebody else, at the front of the path."""
    folder = tmp_path / "site"
    info = folder / "somebody-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "somebody.py").write_text(MODULE)
    (folder / "somebody_cli.py").write_text(COMMANDS)
    monkeypatch.syspath_prepend(folder)
    plugins.cache_clear()
    registry.policies.cache_clear()
    yield folder
    monkeypatch.undo()
    sys.modules.pop("somebody", None)
    plugins.cache_clear()
    registry.policies.cache_clear()


def test_a_policy_of_another_distribution_is_named_run_drawn_and_saved_like_ours(
    somebody: Path, tmp_path: Path
) -> None:
    with pytest.warns(PluginWarning) as warned:
        policy = named_policy("first:0.5")
    said = " / ".join(str(warning.message) for warning in warned)
    assert "'broken' of somebody in group 'avl.policies' is left out: AttributeError" in said
    assert "'no_policy' in group 'avl.policies' is left out: it names 3" in said
    assert "a policy is called 'h2o' already" in said
    assert len(warned) == 3
    assert registry.policies()["h2o"] is avl.H2OPolicy
    assert registry.label_of("first") == "first keys"
    assert registry.color_slots()["first keys"] == 5
    model = tiny.llava()
    with avl.adaptive(model, policy) as session:
        generate(model, tiny.inputs(model, [9]), 1)
    held = (session.selection.state(0)[0, 0] > avl.State.MINOR).nonzero()[:, 0].tolist()
    assert held == [*range(13), 27]  # the newest key is always held
    assert load_policy(save_policy(policy, tmp_path / "p.json")) == policy


def test_a_statistic_of_another_distribution_is_recorded_by_name_and_by_default(
    somebody: Path,
) -> None:
    with pytest.warns(PluginWarning, match=r"'broken' .* ModuleNotFoundError") as warned:
        assert [s.name for s in available()] == [*(s.name for s in ALL), "first_image"]
    assert len(warned) == 1
    model = tiny.llava()
    with record(model, statistics=["first_image", "first_token_mass"]) as recording:
        generate(model, tiny.inputs(model, [9]), 2)
    assert recording["first_image"].equals(recording["first_token_mass"])


def test_a_model_type_is_described_by_the_distribution_that_names_it(somebody: Path) -> None:
    model = tiny.llava()
    assert describe(model).name == "somebody's llava"
    with avl.adaptive(model, avl.FullPolicy()):
        tokens, _ = generate(model, tiny.inputs(model, [9]))
    plugins.cache_clear()
    (somebody / "somebody-1.0.dist-info" / "entry_points.txt").write_text("")
    assert describe(model).name == "llava"
    assert torch.equal(tokens, generate(model, tiny.inputs(model, [9]))[0])


def test_a_description_that_is_no_family_is_refused(somebody: Path) -> None:
    import somebody as module

    module.describe_llava = lambda model: None
    with pytest.raises(UnsupportedModelError, match="must return an avl"):
        describe(tiny.llava())


def test_a_broken_plug_in_is_one_line_and_commands_work(somebody: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(somebody), *sys.path])
        return subprocess.run(
            [sys.executable, "-m", "avl_analysis.cli.main", *words],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    helped = run("--help")
    assert "greet" in helped.stdout
    assert helped.stderr.count("\n") == 1
    assert "avl: warning: entry point 'broken' of somebody" in helped.stderr
    assert run("greet", "--name", "me").stdout == "hello me\n"
    assert run("stats", "--help").stderr == ""  # a command of ours loads no plug-in
