"""What importing a package loads; the static side of the same rules is the import contract in
pyproject.toml.
"""

import subprocess
import sys

import pytest

DRAWING = {"matplotlib", "plotly", "streamlit"}
FILES = {"xarray", "h5netcdf", "pandas"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("avl.plugins", DRAWING | FILES | {"avl_analysis", "typer", "torch", "transformers"}),
        ("avl.session", DRAWING | FILES | {"avl_analysis", "typer"}),
        (
            "avl_analysis.cli.main",
            DRAWING | FILES | {"torch", "transformers", "avl_reports", "avl_app"},
        ),
        ("avl_analysis.figures", DRAWING | {"torch", "transformers"}),
        ("avl_analysis.scenes", DRAWING | {"torch", "transformers"}),
        ("avl_reports.command", DRAWING | {"torch", "transformers"}),
        ("avl_app.cli", DRAWING | {"torch", "transformers"}),
    ],
)
def test_importing_a_package_loads_nothing_it_does_not_need(
    module: str, unwanted: set[str]
) -> None:
    code = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert unwanted & set(done.stdout.split()) == set()
