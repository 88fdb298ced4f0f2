"""From images and words to the text a model was trained on: where each image stands, who says what.

Works on a processor alone (its chat template and its placeholders) and on the *number* of
images and videos; it reads neither these nor the model. Chat templates may silently leave out what
they were not written for, most often a system prompt, so the rendered text is searched for what was
put in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any

from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.models.videos import Source


class Mark(Enum):
    """What stands for a picture or a video in a prompt; the value is its name in chat templates."""

    IMAGE = "image"
    VIDEO = "video"


Piece = str | Mark
"""A piece of a question: text, or where a picture or video belongs."""

Marks = tuple[Mark, ...]
"""What stands for one picture or video: a mark, or one for each of its frames."""

PICTURE: Marks = (Mark.IMAGE,)


@dataclass(frozen=True)
class Conversation:
    """One row of a batch: the question to answer now and what came before it.

    Attributes:
        prompt: the question, with or without placeholders for its pictures and videos.
        shown: what stands for every picture and video of the whole conversation, in order.
        system: system prompt or None.
        history: earlier (question, answer) pairs, oldest first.
    """

    prompt: str
    shown: tuple[Marks, ...]
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()


def render(processor: Any, conversation: Conversation) -> str:
    r"""The text for the processor: its chat template applied, or the plain form where it has none.

    The plain form is one line per picture or video (the placeholder), question and answer:
    `<image>\nprompt`.

    Raises:
        InputError: empty prompt, placeholders that do not match the pictures and videos, templates
            that refuse or drop something.
    """
    if not conversation.prompt.strip():
        raise InputError("the prompt is empty: ask something, for example 'Describe the picture.'")
    marks = {mark: written for mark in Mark if (written := placeholder(processor, mark))}
    questions = [*(question for question, _ in conversation.history), conversation.prompt]
    answers = [answer for _, answer in conversation.history]
    turns = _place(questions, conversation.shown, marks)
    if not getattr(processor, "chat_template", None):
        return _plain(turns, answers, conversation.system, marks)
    text = _templated(processor, turns, answers, conversation.system)
    # Of the question its last piece; a mark there is no text and cannot be searched for.
    for what, value in (("system prompt", conversation.system), ("prompt", turns[-1][-1])):
        if isinstance(value, str) and value.strip() not in text:
            raise InputError(
                f"the model's chat template drops the {what}; put it into the first question"
                " instead"
            )
    videos = sum(one.count(Mark.VIDEO) for one in conversation.shown)
    if videos and (found := text.count(marks[Mark.VIDEO])) != videos:
        raise InputError(
            f"the model's chat template writes {found} of {videos} video(s): repair it, or pass the"
            " frames as pictures"
        )
    return text


def placeholder(processor: Any, mark: Mark = Mark.IMAGE) -> str | None:
    """The text that stands for an image or a video in a prompt (`<image>` for LLaVA).

    None where the family has none.
    """
    token = getattr(processor, f"{mark.value}_token", None)
    return None if token is None else str(token)


def takes_videos(processor: Any) -> bool:
    """Whether a processor has a video part; to others a video is shown frame by frame."""
    return (
        getattr(processor, "video_processor", None) is not None
        and placeholder(processor, Mark.VIDEO) is not None
    )


def picture_rows(
    images: Source | Sequence[Any] | None, prompt: str | Sequence[str]
) -> list[list[Source]]:
    """One list of pictures and videos per prompt, from the shorter forms people write.

    Raises:
        InputError: no picture where none was not asked for, or lists of different length.
    """
    if images is None:
        raise InputError(
            "a prompt without an image: pass a picture, or images=[] to ask without one on purpose"
        )
    if isinstance(prompt, str):
        return [_listed(images)]
    if not prompt:
        raise InputError("an empty list of prompts: pass at least one")
    if not isinstance(images, (list, tuple)) or len(images) != len(prompt):
        got = len(images) if isinstance(images, (list, tuple)) else "a single one"
        raise InputError(
            f"{len(prompt)} prompts need a list of {len(prompt)} pictures (or lists of them); got"
            f" {got}"
        )
    for index, row in enumerate(images):
        if row is None:
            raise InputError(
                f"prompt {index} is without an image; pass [] in its place to ask without one on"
                " purpose"
            )
    return [_listed(row) for row in images]


def _listed(images: Any) -> list[Source]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _place(
    questions: list[str], shown: tuple[Marks, ...], marks: Mapping[Mark, str]
) -> Sequence[Sequence[Piece]]:
    """Each question as pieces.

    Pictures and videos stand where the placeholders are, or before the first question.
    """
    first, *rest = questions
    if not marks:
        return [[*chain(*shown), first], *[[question] for question in rest]]
    # Pictures and videos in one pattern, because their order in the prompt must be that of the
    # list.
    either = re.compile("|".join(re.escape(text) for text in marks.values()))
    written = [text for question in questions for text in either.findall(question)]
    if not written:
        return [[*chain(*shown), first], *[[question] for question in rest]]
    # One placeholder for each picture or video, also for a video that is shown as many pictures: a
    # person writes it once.
    expected = [marks.get(one[0], "") for one in shown if one]
    if written != expected:
        raise InputError(
            f"the prompt names {len(written)} place(s) for a picture ({' '.join(written[:8])}) but"
            f" {len(expected)} were given ({' '.join(expected[:8]) or 'none'}): make them equal,"
            " or leave the placeholder out and the pictures come first"
        )
    left = iter(shown)
    return [_split(question, either, left) for question in questions]


def _split(question: str, either: re.Pattern[str], left: Iterator[Marks]) -> list[Piece]:
    """A question as pieces; `left` is what stands for the pictures that are still to come."""
    pieces: list[Piece] = []
    # Between n placeholders and around them are n + 1 texts: each but the first follows a picture.
    for index, text in enumerate(either.split(question)):
        pieces += next(left) if index else ()
        pieces += [text.strip()] if text.strip() else []
    return pieces


def _templated(
    processor: Any, turns: Sequence[Sequence[Piece]], answers: list[str], system: str | None
) -> str:
    messages = [_message("system", [system])] if system else []
    for index, turn in enumerate(turns):
        messages.append(_message("user", turn))
        # The last question has no answer yet; the slice is then empty.
        messages += [_message("assistant", [answer]) for answer in answers[index : index + 1]]
    with blamed_on_input("the model's chat template does not allow this conversation"):
        return str(
            processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )


def _message(role: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    content = [
        {"type": piece.value} if isinstance(piece, Mark) else {"type": "text", "text": piece}
        for piece in pieces
    ]
    return {"role": role, "content": content}


def _plain(
    turns: Sequence[Sequence[Piece]],
    answers: list[str],
    system: str | None,
    marks: Mapping[Mark, str],
) -> str:
    lines = [system]
    for index, turn in enumerate(turns):
        lines += [marks.get(piece, "") if isinstance(piece, Mark) else piece for piece in turn]
        lines += answers[index : index + 1]
    # No placeholder: the processor adds the picture's tokens itself.
    return "\n".join(line for line in lines if line)
