"""`avl app` and what it starts the server with."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from avl_analysis.cli.main import main
from avl_app import cli
from avl_app.settings import VARIABLE, Settings, settings
from tests.app.server import server
from tests.offline import Offline

CONFIG = tomllib.loads(
    (Path(cli.__file__).parent / ".streamlit" / "config.toml").read_text(encoding="utf-8")
)


def test_the_server_listens_on_this_machine_only_and_shows_no_tracebacks() -> None:
    assert CONFIG["server"]["address"] == "localhost"
    assert CONFIG["server"]["enableXsrfProtection"]
    assert CONFIG["client"]["showErrorDetails"] == "none"
    assert not CONFIG["browser"]["gatherUsageStats"]


def test_no_file_larger_than_a_recording_may_be_is_taken() -> None:
    assert CONFIG["server"]["maxUploadSize"] << 20 == Settings().recording_bytes


def test_the_command_hands_its_options_to_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        "streamlit.web.cli.main", lambda arguments, **options: started.append(arguments)
    )
    monkeypatch.setattr(cli, "_import_ahead", lambda: None)
    monkeypatch.setenv(VARIABLE, "")
    cli.app(
        model=["scenes", "./other"],
        port=9000,
        hub=False,
        webcam=False,
        folders=False,
        browser=False,
    )
    assert settings() == Settings(("scenes", "./other"), folders=False)
    script, *flags = started[0][1:]
    assert Path(script).name == "main.py"
    assert "--server.port=9000" in flags
    assert "--server.headless=true" in flags
    assert "--server.address=localhost" in flags


def test_the_server_starts_without_connecting_to_anything(tmp_path: Path) -> None:
    offline = Offline(tmp_path / "offline")
    with (
        server(tmp_path / "log.txt", environment=offline.environment) as address,
        urllib.request.urlopen(address, timeout=60) as page,
    ):
        assert b"streamlit" in page.read().lower()
    assert offline.tried() == []


def test_the_first_page_waits_for_no_library_that_it_does_not_use() -> None:
    script = (
        "import gc, sys; from avl_app import cli; cli._import_ahead();"
        " assert gc.isenabled(); assert gc.get_freeze_count() > 100_000;"
        " print('avl_app.views.ask' in sys.modules,"
        " {'scipy.stats', 'nltk', 'matplotlib', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split("\n")[0] == "True set()", done.stderr


def test_the_command_is_there_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["app", "--help"])
    assert left.value.code == 0
    assert "only this machine" in " ".join(capsys.readouterr().out.split())


def test_a_port_that_is_none_is_one_line_and_exit_code_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["app", "--port", "99999"])
    assert left.value.code == 2
    assert "65535" in capsys.readouterr().err
