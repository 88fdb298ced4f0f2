"""From images and words to the text a model was trained on: where each image stands, who says what.

Works on a processor alone (its chat template and its image placeholder) and on the *number* of
images; it reads neither the images nor the model. Chat templates may silently leave out what they
were not written for, most often a system prompt, so the rendered text is searched for what was put
in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.models.images import ImageSource

Piece = str | None
"""A piece of a question: text, or None where a picture belongs."""


@dataclass(frozen=True)
class Conversation:
    """One row of a batch: the question to answer now and what came before it.

    Attributes:
        prompt: the question, with or without placeholders for its pictures.
        pictures: number of pictures in the whole conversation.
        system: system prompt or None.
        history: earlier (question, answer) pairs, oldest first.
    """

    prompt: str
    pictures: int
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()


def render(processor: Any, conversation: Conversation) -> str:
    r"""The text for the processor: its chat template applied, or the plain form where it has none.

    The plain form is one line per picture (the placeholder), question and answer:
    `<image>\nprompt`.

    Raises:
        InputError: empty prompt, placeholders that do not match the pictures, templates that refuse
            or drop something.
    """
    if not conversation.prompt.strip():
        raise InputError("the prompt is empty: ask something, for example 'Describe the picture.'")
    mark = placeholder(processor)
    questions = [*(question for question, _ in conversation.history), conversation.prompt]
    answers = [answer for _, answer in conversation.history]
    turns = _place(questions, conversation.pictures, mark)
    if not getattr(processor, "chat_template", None):
        return _plain(turns, answers, conversation.system, mark)
    text = _templated(processor, turns, answers, conversation.system)
    for what, value in (("system prompt", conversation.system), ("prompt", turns[-1][-1])):
        if value and value.strip() not in text:
            raise InputError(
                f"the model's chat template drops the {what}; put it into the first question"
                " instead"
            )
    return text


def placeholder(processor: Any) -> str | None:
    """The text that stands for an image in a prompt (`<image>` for LLaVA).

    None where the family has none.
    """
    token = getattr(processor, "image_token", None)
    return None if token is None else str(token)


def picture_rows(
    images: ImageSource | Sequence[Any] | None, prompt: str | Sequence[str]
) -> list[list[ImageSource]]:
    """One list of pictures per prompt, from the shorter forms people write.

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


def _listed(images: Any) -> list[ImageSource]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _place(questions: list[str], pictures: int, mark: str | None) -> Sequence[Sequence[Piece]]:
    """Each question as pieces.

    Pictures stand where the placeholders are, or before the first question.
    """
    written = sum(question.count(mark) for question in questions) if mark else 0
    if not written or mark is None:
        first, *rest = questions
        return [[*[None] * pictures, first], *[[question] for question in rest]]
    if written != pictures:
        raise InputError(
            f"the prompt names {written} place(s) for a picture ({mark}) but {pictures} were given:"
            " make them equal, or leave the placeholder out and the pictures come first"
        )
    return [_split(question, mark) for question in questions]


def _split(question: str, mark: str) -> list[Piece]:
    pieces: list[Piece] = []
    for index, text in enumerate(question.split(mark)):
        pieces += [None] if index else []
        pieces += [text.strip()] if text.strip() else []
    return pieces


def _templated(
    processor: Any, turns: Sequence[Sequence[Piece]], answers: list[str], system: str | None
) -> str:
    messages = [_message("system", [system])] if system else []
    for index, turn in enumerate(turns):
        messages.append(_message("user", turn))
        messages += [_message("assistant", [answer]) for answer in answers[index : index + 1]]
    with blamed_on_input("the model's chat template does not allow this conversation"):
        return str(
            processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )


def _message(role: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    content = [
        {"type": "image"} if piece is None else {"type": "text", "text": piece} for piece in pieces
    ]
    return {"role": role, "content": content}


def _plain(
    turns: Sequence[Sequence[Piece]], answers: list[str], system: str | None, mark: str | None
) -> str:
    lines = [system]
    for index, turn in enumerate(turns):
        lines += [mark if piece is None else piece for piece in turn]
        lines += answers[index : index + 1]
    return "\n".join(
        line for line in lines if line
    )  # no placeholder: the processor adds the picture's tokens itself
