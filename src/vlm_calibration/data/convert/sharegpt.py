"""Conversations about an image: LLaVA's and ShareGPT's `conversations` of {from, value}, LLaMA-Factory's `messages` of {role, content}.

The image is named by `image`, by `images` or in a part of a message; `<image>` marks its place in the text. Every question is asked
alone, without the turns before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vlm_calibration.data.convert.reading import Source, json_records
from vlm_calibration.files import parse_json
from vlm_calibration.records import RecordError, id_text, short_repr
from vlm_calibration.text.conventions import AnswerTypeChoice, infer_answer_type, strip_format_request

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "bing"), "assistant"),
    "system": "system",
}
"""Name of a role in a file -> its meaning."""
IMAGE = "<image>"
_PLACEHOLDER = re.compile(r"[ \t]*<image>[ \t]*\n?", re.IGNORECASE)


def sharegpt(
    file: Path, *, turns: Literal["first", "all"] = "first", answer_type: AnswerTypeChoice = "infer"
) -> Source:
    """Convert conversations of LLaVA, ShareGPT or LLaMA-Factory: a JSON array, or one record a line.

    Ids are "RECORD:TURN"; RECORD is the record's `id`, with "@POSITION" behind it if an earlier one has the same, and
    "record-POSITION" without. System prompts, and LLaVA-1.5's request for a single word or phrase, are left out.

    Args:
        file: the file, .json or .jsonl
        turns: "first" asks the first question about the image, "all" every question, for data whose later questions stand alone
        answer_type: of all answers; "infer" tells it from the form of each
    """
    seen: set[str] = set()
    for position, (where, content) in enumerate(json_records(file)):
        yield where, partial(_queries, content, position, seen, turns == "all", answer_type)


def _queries(
    content: Any, position: int, seen: set[str], all_turns: bool, answer_type: AnswerTypeChoice
) -> list[dict[str, Any]]:
    record = parse_json(content) if isinstance(content, bytes) else content
    if not isinstance(record, Mapping):
        raise RecordError(f"expected an object with a conversation, found {short_repr(record)}")
    image, pairs = _conversation(record)
    name = record.get("id", f"record-{position}")
    if not str(name).strip():
        raise RecordError(f"'id' must be a non-empty text or a whole number, found {name!r}")
    name = f"{id_text(name)}@{position}" if str(name) in seen else str(name)
    seen.update((name, str(record.get("id", name))))
    return [
        {
            "id": f"{name}:{turn}",
            "image": image,
            "question": strip_format_request(question),
            "answer": answer,
            "answer_type": infer_answer_type(answer) if answer_type == "infer" else answer_type,
            "category": record.get("category"),
        }
        for turn, question, answer in pairs[: None if all_turns else 1]
    ]


def _conversation(record: Mapping[str, Any]) -> tuple[Any, list[tuple[int, str, str]]]:
    """The image, and number, question and answer of each turn that sees it."""
    named = [key for key in ("conversations", "messages") if record.get(key) is not None]
    if len(named) != 1 or not record[named[0]]:
        raise RecordError(f"expected messages at one of the keys conversations and messages, found {named}")
    messages = [_message(message, index) for index, message in enumerate(record[named[0]])]
    if messages[0][0] == "system":
        messages = messages[1:]
    for index, (role, text, _) in enumerate(messages):
        if role != ("user", "assistant")[index % 2]:
            raise RecordError(f"questions and answers must alternate, but message {index} is of role {role}")
        if role == "assistant" and IMAGE in text.lower():
            raise RecordError(f"message {index} is an answer with the placeholder {IMAGE}")
    if len(messages) % 2 or not messages:
        raise RecordError("the last question has no answer" if messages else "no question")
    images: list[Any] = []
    for value in (record.get("image"), record.get("images")):
        images += value if isinstance(value, list) else [value] if value else []
    images = images or [name for *_, names in messages for name in names if name is not None]
    marked = [i // 2 for i, (_, text, _) in enumerate(messages) for _ in range(text.lower().count(IMAGE))]
    others = [k for k in ("video", "videos", "audio", "audios") if record.get(k)]
    if len(images) != 1 or len(marked) > 1 or others:
        number = " and ".join(others) or ("several images" if images else "no image")
        raise RecordError(f"a conversation about {number}; only those about one image can be asked")
    texts = [_PLACEHOLDER.sub("", text).strip() for _, text, _ in messages]
    turns = list(zip(range(len(texts)), texts[::2], texts[1::2], strict=False))
    return images[0], turns[marked[0] if marked else 0 :]


def _message(message: Mapping[str, Any], index: int) -> tuple[str, str, list[Any]]:
    """Role and text of a message, with a placeholder for each image, and the images that its parts name."""
    name, content = message.get("from", message.get("role")), message.get("value", message.get("content"))
    role = ROLES.get(str(name).lower())
    if role is None:
        raise RecordError(f"message {index}: the role must be one of {', '.join(ROLES)}, found {name!r}")
    texts: list[str] = []
    images: list[Any] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or [None]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part["text"], str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            named = part.get("image") or part.get("image_url") or part.get("path")
            images.append(named.get("url") if isinstance(named, Mapping) else named)
            texts.append(f"{IMAGE}\n")
        else:
            raise RecordError(f"message {index} must be texts and images, found {short_repr(content)}")
    return role, "".join(texts), images
