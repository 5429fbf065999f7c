"""Conversations about an image as published for fine-tuning, checked and split into questions with their answers.

Two spellings are read: LLaVA's and ShareGPT's (`conversations` of `{from: human | gpt, value}`) and the one of OpenAI and LLaMA-Factory
(`messages` of `{role: user | assistant, content}`, where `content` is a text or a list of parts). The image is named by `image`
(LLaVA), by `images` (LLaMA-Factory) or in a part of a message, and its place in the text is marked by `<image>`, which is removed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vlm_calibration.records import RecordError, short_repr

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "bing"), "assistant"),
    "system": "system",
}
"""Name of a role in a file -> its meaning."""
SPELLINGS = (("from", "value"), ("role", "content"))
"""The keys of a message: who speaks, and what."""
IMAGE = "<image>"
_PLACEHOLDER = re.compile(r"[ \t]*<image>[ \t]*\n?", re.IGNORECASE)
_OTHER_MEDIA = ("video", "audio")


class OtherMediaError(RecordError):
    """A conversation that is not about exactly one image.

    Attributes:
        kind: what it is about: "no image", "several images", "a video", "an audio".
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"a conversation about {kind}{detail}; only those about one image can be asked")
        self.kind = kind


class Turn(NamedTuple):
    """A question and its answer.

    Attributes:
        number: number of the turn in the conversation, from 0.
        question: without placeholders; possibly empty.
        answer: possibly empty.
    """

    number: int
    question: str
    answer: str


class Conversation(NamedTuple):
    """A conversation about one image.

    Attributes:
        image: its path.
        turns: the turns from the image on; a turn before it does not see it.
        system: whether there is a system prompt.
    """

    image: str
    turns: tuple[Turn, ...]
    system: bool


class _Message(NamedTuple):
    role: str
    text: str
    images: list[str | None]


def parse_conversation(record: Any) -> Conversation:
    """Read a decoded record of either spelling.

    Raises:
        OtherMediaError: it is not about exactly one image.
        RecordError: it is no conversation: a key is missing, a role unknown, or questions and answers do not alternate.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"expected an object with a conversation, found {short_repr(record)}")
    messages = [_message(message, index) for index, message in enumerate(_messages(record))]
    for kind in _OTHER_MEDIA:
        if any(record.get(key) for key in (kind, f"{kind}s")) or any(f"<{kind}>" in m.text for m in messages):
            raise OtherMediaError(f"a{'n' if kind[0] == 'a' else ''} {kind}")
    system = bool(record.get("system"))
    if messages and messages[0].role == "system":
        system, messages = True, messages[1:]
    _check_order(messages)
    image, first = _image(record, messages)
    turns = tuple(
        Turn(number, _PLACEHOLDER.sub("", question.text).strip(), answer.text.strip())
        for number, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True))
    )
    return Conversation(image, turns[first:], system)


def _messages(record: Mapping[str, Any]) -> list[Any]:
    named = [key for key in ("conversations", "messages") if record.get(key) is not None]
    if len(named) != 1:
        raise RecordError(
            f"expected one of the keys conversations and messages, found {', '.join(sorted(map(str, record))) or 'none'}"
        )
    messages = record[named[0]]
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"'{named[0]}' must be a list of messages, found {short_repr(messages)}")
    return messages


def _message(message: Any, index: int) -> _Message:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise RecordError(f"{where} must be an object, found {short_repr(message)}")
    for speaker, content in SPELLINGS:
        if speaker in message and content in message:
            role = ROLES.get(str(message[speaker]).lower())
            if role is None:
                raise RecordError(
                    f"{where}: {speaker!r} must be one of {', '.join(ROLES)}, found {short_repr(message[speaker])}"
                )
            return _Message(role, *_content(message[content], where))
    raise RecordError(
        f"{where} must have the keys from and value, or role and content, found {short_repr(message)}"
    )


def _content(content: Any, where: str) -> tuple[str, list[str | None]]:
    """The text of a message with a placeholder for each image, and the images that its parts name."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RecordError(f"{where} must be a text or a list of parts, found {short_repr(content)}")
    texts: list[str] = []
    images: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            named = part.get("image") or part.get("image_url") or part.get("path")
            images.append(named.get("url") if isinstance(named, Mapping) else named)
            texts.append(f"{IMAGE}\n")
        elif kind in _OTHER_MEDIA:
            texts.append(f"<{kind}>")
        else:
            raise RecordError(f"{where}: a part must be a text or an image, found {short_repr(part)}")
    return "".join(texts), images


def _check_order(messages: list[_Message]) -> None:
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise RecordError(
                f"questions and answers must alternate, but message {index} without the system prompt is of role {message.role}"
            )
        if expected == "assistant" and IMAGE in message.text.lower():
            raise RecordError(f"message {index} is an answer with the placeholder {IMAGE}")
    if len(messages) % 2 or not messages:
        raise RecordError(
            "the last question has no answer" if messages else "no question besides the system prompt"
        )


def _image(record: Mapping[str, Any], messages: list[_Message]) -> tuple[str, int]:
    """The image of a conversation, and the turn that shows it."""
    named = [name for key in ("image", "images") for name in _names(record, key)]
    if not named:
        named = [name for message in messages for name in message.images if name is not None]
    marked = [i // 2 for i, message in enumerate(messages) for _ in range(message.text.lower().count(IMAGE))]
    if not named:
        raise OtherMediaError(
            "no image", f" (it has the placeholder {IMAGE}, but names none)" if marked else ""
        )
    if len(named) > 1 or len(marked) > 1:
        raise OtherMediaError("several images", f" ({len(named)} named, {len(marked)} times {IMAGE})")
    if not isinstance(named[0], str) or not named[0].strip():
        raise RecordError(f"the image must be a path, found {short_repr(named[0])}")
    return named[0], marked[0] if marked else 0


def _names(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]
