"""`avl app`: start the dashboard on this machine.

Registered with the command line through the entry point group "avl.commands", since `avl_analysis`
may not import the packages above it. While the server starts, the heavy libraries are imported
beside it, so that the first page finds them there.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Annotated

import typer

from avl_analysis.errors import InputError
from avl_app.settings import VARIABLE, Settings

PORT = 8501


def app(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="Model to offer: scenes, a folder or a hub id; may be repeated."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port on this machine.")
    ] = PORT,
    hub: Annotated[bool, typer.Option("--hub", help="Allow hub ids to be fetched.")] = False,
    webcam: Annotated[
        bool, typer.Option("--webcam", help="Offer the webcam for pictures.")
    ] = False,
    folders: Annotated[
        bool, typer.Option(help="Let visitors name further model folders on this machine.")
    ] = True,
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Explore heads, switch A-VL on and off, and build reports, in the browser.

    The server is open to only this machine.
    \f
    Args:
        model: names of models that are offered, the first one shown first; None for the embedded
            one.
        port: on which the server listens, 1 to 65535.
        hub: whether hub ids may be fetched.
        webcam: whether pictures can be taken with the webcam.
        folders: whether a page may name further model folders of this machine.
        browser: whether a browser window is opened.

    Raises:
        InputError: streamlit is not installed.
    """  # noqa: D301 -- typer's help ends at the form feed
    try:
        from streamlit.web import cli as streamlit_cli
    except ImportError as error:
        raise InputError(
            "the dashboard needs streamlit: install the package with its extra, pip install"
            " 'avl-analysis[app]'"
        ) from error
    os.environ[VARIABLE] = Settings(
        tuple(model or ("scenes",)), folders=folders, hub=hub, webcam=webcam
    ).as_json()
    # A daemon, so that unfinished imports do not keep a server alive that was stopped.
    threading.Thread(target=_import_ahead, daemon=True, name="import ahead").start()
    script = str(Path(__file__).with_name("main.py"))
    flags = [
        f"--server.port={port}",
        f"--server.headless={'false' if browser else 'true'}",
        # as a flag, since environment variables override the configuration file
        "--server.address=localhost",
    ]
    # Otherwise click would end the process itself; this way errors reach the command line of avl.
    streamlit_cli.main(["run", script, *flags], standalone_mode=False)


def _import_ahead() -> None:
    """Import what the first page needs.

    Thousands of modules make millions of objects that stay, and Python's collector of cycles would
    look through all of them again and again; it rests meanwhile and leaves them out afterwards,
    which saves a fifth of the processor time of the imports.
    """
    import gc
    from importlib import import_module

    gc.disable()
    try:
        for name in ("avl_analysis.live", "avl_analysis.figures.draw_plotly", "avl_app.views.ask"):
            import_module(name)
        gc.freeze()
    finally:
        gc.enable()


def main() -> None:
    """The command alone, where the package is not installed.

    `python -c "from avl_app.cli import main; main()"` runs it.
    """
    typer.run(app)
