"""What `import avl_analysis` offers is what it says, whatever was imported before."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import avl_analysis


@pytest.mark.parametrize("name", avl_analysis.__all__)
def test_every_public_name_is_found(name: str) -> None:
    assert callable(getattr(avl_analysis, name))


def test_no_module_hides_a_public_name() -> None:
    modules = {
        path.stem
        for path in Path(avl_analysis.__file__).parent.iterdir()
        if not path.name.startswith("_")
    }
    assert not modules & set(avl_analysis.__all__)
    assert import_module("avl_analysis.evaluation.compare").compare is avl_analysis.compare


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import avl_analysis, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
