"""The one exception for input that a person can correct.

A path, a picture, a prompt, a model name, a number.

Its message is meant to be read alone, without a traceback: the value received, what is possible,
the next step. The command line prints exactly that line and exits with code 2; the dashboard shows
it in the page. Anything else that is raised is a defect of this program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input that cannot be used as it is.

    The message says what was received, what is possible, and what to do.
    """


@contextmanager
def blamed_on_input(doing: str, remedy: str = "") -> Iterator[None]:
    """Whatever a library raises about input that came from outside, as an InputError.

    For calls that hand somebody else's file to a library and do nothing else: what transformers
    makes of a config.json with wrong types can be any exception, and none of them is a defect of
    this program. The exception is kept as the cause.

    Args:
        doing: what could not be done, for example "cannot read the config of x".
        remedy: what to do, appended to the message.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a library may raise anything about a damaged file
        name = type(error).__name__
        text = one_line(error)
        reason = name if text == name else f"{name}: {text}"
        raise InputError(f"{doing} ({reason}){remedy}") from error


def one_line(error: BaseException, limit: int = 320) -> str:
    """An error's message on one line, or the error's type where it has none.

    Libraries break their messages into lines in the middle of sentences, so all lines are taken. A
    message longer than `limit` characters ends after its last whole sentence within the limit, or,
    where its first sentence is longer, after the last whole word, with an ellipsis.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= limit:
        return text.rstrip(".")
    start = text[: limit + 1]
    sentence = max(start.rfind(end) for end in (". ", "! ", "? "))
    if sentence > 0:
        return start[:sentence]
    return start[: max(start.rfind(" "), limit - 40)] + " ..."
