"""Processes that cannot connect to anything, and say so if they try.

A module `sitecustomize` that Python imports first replaces every way to open a connection, in the
process and in all Python processes it starts. What is local to the machine's kernel (sockets of the
family AF_UNIX, pairs of sockets) and waiting for others to connect stay possible.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

_REFUSE = """
    import os
    import socket

    own_connect, own_connect_ex = socket.socket.connect, socket.socket.connect_ex
    own_sendto = socket.socket.sendto

    def refuse(*what, **options):
        with open({noted!r}, "a") as file:
            file.write(repr(what) + "\\n")
        raise OSError("no network in this test")

    def guarded(own):
        def call(self, *arguments, **options):
            if self.family == socket.AF_UNIX:
                return own(self, *arguments, **options)
            refuse(own.__name__, *arguments)
        return call

    class Guarded(socket.socket):
        connect = guarded(own_connect)
        connect_ex = guarded(own_connect_ex)
        sendto = guarded(own_sendto)

    socket.socket = Guarded
    socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
"""


class Offline:
    """An environment for processes without a network.

    Attributes:
        environment: variables for `subprocess`; nothing in them asks libraries to stay offline.
    """

    def __init__(self, folder: Path) -> None:
        """Write what is needed into `folder`, which is made."""
        folder.mkdir()
        self._noted = folder / "noted.txt"
        (folder / "sitecustomize.py").write_text(
            textwrap.dedent(_REFUSE.format(noted=str(self._noted)))
        )
        root = Path(__file__).parents[1]
        paths = [str(folder), *(str(root / part) for part in ("", "app", "reports"))]
        paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        } | {
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HOME": str(folder / "cache"),  # empty
            # with this, huggingface_hub asks the hub which agent that is, given half a chance
            "AI_AGENT": "test",
        }

    def tried(self) -> list[str]:
        """The connections that were tried, in order."""
        return self._noted.read_text().splitlines() if self._noted.exists() else []
