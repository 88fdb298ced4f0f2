"""A page as it is after a link was opened, without a browser, and what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from streamlit.testing.v1 import AppTest

SCRIPT = str(Path(__file__).parents[2] / "app" / "avl_app" / "main.py")
ONE_WORD = {"task": "colour"}
"""A question with a short answer, so that tests are quick."""


def page(**address: str) -> AppTest:
    """The page after opening a link."""
    test = AppTest.from_file(SCRIPT, default_timeout=600)
    for name, value in address.items():
        test.query_params[name] = value
    return test.run()


def address(test: AppTest, name: str) -> str:
    value = test.query_params[name]
    return value if isinstance(value, str) else value[0]


def texts(test: AppTest) -> str:
    return "\n".join(element.value for element in test.markdown)


def sources(test: AppTest) -> list[str]:
    return list(test.segmented_control(key="source").options)


def errors(test: AppTest) -> list[str]:
    assert not test.exception, test.exception
    return [element.value for element in test.error]


def letters(text: str) -> str:
    """A text without spaces, signs for them, escapes, and what sets words off."""
    text = re.sub(r"~~.*?~~", "", text)  # what an answer leaves out
    bare = re.sub(r":orange-background\[\*\*(.*?)\*\*\]", r"\1", text)
    return "".join(bare.replace("␣", "").replace("\u2060", "").replace("\\", "").split())
