"""Files that a visitor sends, kept for as long as the visitor wants them.

Streamlit forgets what was uploaded as soon as the widget is not on the page. What was read from a
file is therefore kept in the session until its visitor takes it away or sends another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import streamlit as st

from avl_analysis.errors import InputError
from avl_app.page import plain, problem

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Sent(Generic[Result]):
    """What was read from the files of one uploader.

    Attributes:
        name: name of the file, or how many there are.
        value: what was made of it.
        ids: Streamlit's identifiers of the files.
    """

    name: str
    value: Result
    ids: tuple[str, ...]


def sent_files(
    label: str,
    types: Sequence[str],
    read: Callable[[Mapping[str, bytes]], Result],
    *,
    key: str,
    most_megabytes: int,
    several: bool = False,
) -> Sent[Result] | None:
    """Draw an uploader; what was read from its files, also after the view was left.

    Args:
        label: what is asked for.
        types: endings of file names that are offered.
        read: makes something of the contents by file name; raises InputError for what it cannot.
        key: key of the widget in the session.
        most_megabytes: largest file that is taken.
        several: whether several files are taken together.

    Returns:
        None while nothing was sent, or, with the reason said, where it could not be read.
    """
    held = f"{key}_held"

    def forget_removed() -> None:
        # An uploader is empty after its view was left and after its file was taken away. Only the
        # second calls this, so only then is the content forgotten.
        if not st.session_state.get(key):
            st.session_state.pop(held, None)

    given = st.file_uploader(
        label,
        list(types),
        key=key,
        accept_multiple_files=several,
        max_upload_size=most_megabytes,
        on_change=forget_removed,
    )
    # a list, one file, or None, by what the widget accepts
    files = given if isinstance(given, list) else [given] if given is not None else []
    kept: Sent[Result] | None = st.session_state.get(held)
    if not files:
        if kept is not None:
            _still_used(kept, held)
        return kept
    ids = tuple(file.file_id for file in files)
    # Streamlit gives every upload another id, so a file is read once and not in every run.
    if kept is not None and kept.ids == ids:
        return kept
    # First, so that the file before is not used while this one cannot be read.
    st.session_state.pop(held, None)
    contents = {file.name: file.getvalue() for file in files}
    try:
        # Contents are kept by name, and a second file of one name has replaced the first.
        if len(contents) < len(files):
            raise InputError(
                "two of the files have the same name, so one of them would be taken for the other:"
                " give them different names"
            )
        value = read(contents)
    except InputError as error:
        problem(error)
        return None
    name = files[0].name if len(files) == 1 else f"{len(files)} files"
    made = st.session_state[held] = Sent(name, value, ids)
    return made


def _still_used(kept: Sent[Result], held: str) -> None:
    """Say which file is in use although the uploader is empty, and let it be taken away."""
    left, right = st.columns([3, 1], vertical_alignment="center")
    left.caption(f":material/draft: {plain(kept.name)}, sent before")
    right.button(
        "Remove",
        key=f"{held}_remove",
        type="tertiary",
        on_click=lambda: st.session_state.pop(held, None),
    )
