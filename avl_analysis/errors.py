"""The one exception for input that a person can correct: a path, a picture, a prompt, a model name,
a number.

Its message is meant to be read alone, without a traceback: the value received, what is possible,
the next step. The command line prints exactly that line and exits with code 2; the dashboard shows
it in the page. Anything else that is raised is a defect of this program and keeps its traceback.
"""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used as it is; the message says what was received, what is possible, and
    what to do.
    """
