"""Published formats in JSON files, VQAv2, GQA and ShareGPT: functions that yield records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from sys import intern
from typing import Any, Literal

from vlm_calibration.data.convert.reading import (
    AnswerTypeChoice,
    Source,
    agreed_answers,
    explained,
    infer_answer_type,
    json_members,
    json_records,
    json_values,
    strip_format_request,
)
from vlm_calibration.files import parse_json
from vlm_calibration.records import MIN_BOX, DataError, RecordError, id_text, short_repr
from vlm_calibration.text.grading import parse_answer
from vlm_calibration.text.matching import match_key

TYPES = {"yes/no": "yes_no", "number": "number", "other": "other"}
"""Answer type of an annotation -> the first part of the category."""


def vqav2(questions: Path, annotations: Path, *, file_name: str = "COCO_{split}_{id:012d}.jpg") -> Source:
    """Convert VQAv2: its questions and annotations about COCO's images.

    The gold answer is the annotators' most frequent; others that at least three of them give become synonyms, as in VQA's metric.
    Ids are those of the questions, categories "ANSWER TYPE/QUESTION TYPE", such as "yes_no/is the".

    Args:
        questions: e.g. v2_OpenEnded_mscoco_train2014_questions.json
        annotations: e.g. v2_mscoco_train2014_annotations.json
        file_name: name of an image; {split} is the file's data_subtype, such as train2014, {id} the image_id
    """
    answers: dict[int, dict[str, Any]] = {}
    for where, value in json_values(annotations, "annotations.item"):
        with explained(where):
            answers[value["question_id"]] = _answer(value)
    split = next(json_values(questions, "data_subtype"))[1] if "{split" in file_name else ""
    image = partial(file_name.format, split=split)
    with explained(f"--file-name {file_name}"):
        image(id=1)
    for where, question in json_values(questions, "questions.item"):
        yield where, partial(_vqav2_query, question, answers, annotations, image)


def _answer(annotation: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a query that follow from an annotation."""
    kind, gold = annotation["answer_type"], annotation["multiple_choice_answer"]
    if kind not in TYPES:
        raise RecordError(f"'answer_type' must be one of {', '.join(TYPES)}, found {kind!r}")
    given = [a["answer"] for a in annotation["answers"] if a["answer"].strip()]
    # A question of the form "Is it red or blue?" counts as yes/no, whatever its answer.
    is_yes_no = kind == "yes/no" and parse_answer(gold, "yes_no") is not None
    return {
        "answer": intern(gold),
        "answer_type": "yes_no" if is_yes_no else "short",
        "category": intern(f"{TYPES[kind]}/{annotation['question_type'].replace('/', ' ')}"),
        "synonyms": list(agreed_answers(given, gold)),
    }


def _vqav2_query(
    question: Mapping[str, Any], answers: Mapping[int, dict[str, Any]], annotations: Path, image: Any
) -> list[dict[str, Any]]:
    if (identifier := question["question_id"]) not in answers:
        raise RecordError(f"question {identifier} has no annotation in {annotations}")
    asked = {"id": identifier, "image": image(id=question["image_id"]), "question": question["question"]}
    return [asked | answers[identifier]]


_ARGUMENT = re.compile(r"(?P<name>[^,()]*)[^()]*\((?P<ids>[-\d,\s]*)\)\s*")
"""The argument of an operation that finds an object: "horse,on the edge of,s (447018)", or "dog (-)" for one that is absent."""

Objects = Sequence[tuple[int, str, list[int]]]  # the id, name and box of each object of an image


def gqa(questions: Path, *, scene_graphs: Path | None = None) -> Source:
    """Convert GQA: its questions and, as regions, the boxes of its scene graphs.

    Categories are "STRUCTURAL TYPE/SEMANTIC TYPE", such as "query/attr". Objects of fewer than 9 pixels are left out.

    Args:
        questions: e.g. train_balanced_questions.json, or the folder train_all_questions
        scene_graphs: e.g. train_sceneGraphs.json; without it key objects are named, but have no regions
    """
    graphs: dict[str, Objects] = {}
    if scene_graphs is not None:
        for image, graph in json_members(scene_graphs):
            with explained(f"{scene_graphs}: {image!r}"):
                graphs[image] = [
                    (int(key), o["name"], [o["x"], o["y"], o["x"] + o["w"], o["y"] + o["h"]])
                    for key, o in graph["objects"].items()
                    if min(o["w"], o["h"]) > 0 and o["w"] * o["h"] >= MIN_BOX
                ]
    files = sorted(questions.glob("*.json")) if questions.is_dir() else [questions]
    if not files:
        raise DataError(f"{questions}: no *.json file in this folder")
    has_graph = scene_graphs is None
    for file in files:
        for key, question in json_members(file):
            has_graph |= isinstance(question, Mapping) and str(question.get("imageId")) in graphs
            yield f"{file}: {key!r}", partial(_gqa_query, key, question, graphs)
    if not has_graph:
        raise DataError(f"{scene_graphs}: none of the images: use the file of the questions' split")


def _gqa_query(key: str, value: Mapping[str, Any], graphs: Mapping[str, Objects]) -> list[dict[str, Any]]:
    answer, image = value.get("answer"), value["imageId"]
    if not isinstance(answer, str):
        raise RecordError(f"'answer' must be a text, found {answer!r}; the test split has none")
    ids, names, absent = _key_objects(value, answer)
    objects = graphs.get(image, ())
    located = list(dict.fromkeys(name for number, name, _ in objects if number in ids))
    phrases = list(dict.fromkeys((*names, *absent)))
    # Another chair is neither evidence about this chair nor a part of the image that the question is not about.
    taken = {match_key(name) for name in (*phrases, *located)}
    shown = [o for o in objects if o[0] in ids or match_key(o[1]) not in taken]
    regions = [{"label": name, "box": box} for _, name, box in shown]
    # The scene graph's own names once it has every key object: "animal" is a cat and a cow.
    is_located = bool(ids) and sum(number in ids for number, *_ in objects) == len(ids)
    structural, semantic = ((value.get("types") or {}).get(kind) for kind in ("structural", "semantic"))
    is_yes_no, full = infer_answer_type(answer) == "yes_no", value.get("fullAnswer")
    # Only to questions whose answer is an object's name are other objects' names plausible answers.
    names_object = is_yes_no or semantic in ("obj", "cat", "rel")
    query = {
        "id": key,
        "image": f"{image}.jpg",
        "question": value["question"],
        "answer": answer,
        "answer_type": "yes_no" if is_yes_no else "short",
        "objects": located if is_located else list(dict.fromkeys((*phrases, *located))),
        # A question about the scene as a whole names no object, so no region shows what it is about.
        "regions": regions if phrases or located else [],
        "category": "/".join(filter(None, (structural, semantic))) or None,
        "synonyms": [full] if full and not is_yes_no else [],
        "absent": absent,
        "wrong_answers": None if names_object else [],
    }
    return [query]


def _key_objects(value: Mapping[str, Any], answer: str) -> tuple[set[int], list[str], list[str]]:
    """The ids and names of the objects that a question and its answer are about, and the names of absent ones."""
    ids, of_program = set[int](), set[int]()
    names, absent = list[str](), list[str]()
    for part, spans in (value.get("annotations") or {}).items():
        for objects in spans.values():
            numbers = _numbers(str(objects))
            ids |= numbers
            if part == "answer" and numbers:
                names.append(answer)
    for operation in value.get("semantic") or ():
        if match := _ARGUMENT.fullmatch(operation.get("argument") or ""):
            numbers = _numbers(match["ids"])
            of_program |= numbers
            if (name := match["name"].strip()) not in ("", "_", "scene"):
                (names if numbers else absent).append(name)
    return ids or of_program, names, list(dict.fromkeys(absent))


def _numbers(text: str) -> set[int]:
    return set(map(int, re.findall(r"\d+", text)))


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
    if (role := ROLES.get(str(name).lower())) is None:
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
