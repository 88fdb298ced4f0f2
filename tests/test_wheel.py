"""The built wheel works beside a user's own modules of common names."""

import base64
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PACKAGES = {"avl", "avl_analysis", "avl_app", "avl_reports"}

pytestmark = pytest.mark.slow  # builds a wheel and starts several interpreters


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel, as an installer lays it out."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", *build, str(folder), str(ROOT)], check=True)
    wheel = next(folder.glob("avl_analysis-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_installs_no_package_called_app_or_reports(site: Path) -> None:
    installed = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert installed == PACKAGES


@pytest.mark.parametrize("arguments", [["--help"], ["app", "--help"], ["report", "--help"]])
def test_commands_work_beside_a_users_own_app_and_reports(
    site: Path, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app.py").write_text("raise RuntimeError('the user\\'s app.py was imported')\n")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "__init__.py").write_text(
        "raise RuntimeError('the user\\'s reports')\n"
    )
    code = (
        "import sys, avl_analysis, avl_app, avl_reports; from avl_analysis.cli.main import main\n"
        f"assert avl_app.__file__.startswith({str(site)!r}), avl_app.__file__\n"
        f"main({arguments!r})"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{site}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_recording_is_made_from_the_wheel(site: Path, tmp_path: Path) -> None:
    code = (
        "from avl_analysis.cli.main import main\n"
        "main(['record', '--scenes', '1', '--max-new-tokens', '2', '--out', 'run.nc'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.nc").is_file()


def test_the_python_of_the_readme_shows_a_picture_in_a_notebook(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="notebooks need the extra [test]")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Image.new("RGB", (96, 64), "red").save(tmp_path / "picture.png")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    where = "import avl_analysis; print(avl_analysis.__file__)"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in (*cells, where)]
    )
    nbclient.NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert str(site) in notebook.cells[-1].outputs[0].text
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.outputs]
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    assert len(pictures) == 1
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert sum("image/svg" in data.get("text/html", "") for data in shown) == 1
