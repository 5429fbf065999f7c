"""Conversations: published files give the same queries in both spellings, and what cannot be asked is named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_calibration.data.sources.conversation import ConversationSource
from vlm_calibration.data.sources.turns import Conversation, parse_conversation
from vlm_calibration.records import DataError, RecordError

Record = dict[str, Any]


def llava(identifier: Any, image: Any, *texts: str) -> Record:
    """A record in LLaVA's spelling; questions and answers in turn."""
    spoken = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": identifier, "image": image, "conversations": spoken}


def llama_factory(image: str, *texts: str) -> Record:
    """A record in LLaMA-Factory's spelling, which has no id."""
    spoken = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": spoken, "images": [image]}


TEXTS = ("<image>\nIs there a dog?", "Yes", "What colour is it?", "Brown")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write records to an array or to JSON lines, and a.png and b.png beside them."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (6, 4), "red").save(tmp_path / name)

    def written(*records: Any, lines: bool = False) -> Path:
        path = tmp_path / ("c.jsonl" if lines else "c.json")
        text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=2)
        path.write_text(text, encoding="utf-8")
        return path

    return written


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    ("record", "name"),
    [
        (llava("x", "a.png", *TEXTS), "x"),
        (llava(17, ["a.png"], *TEXTS), "17"),
        (llama_factory("a.png", *TEXTS), "record-0"),
        ({**llava("x", None, *TEXTS), "images": "a.png"}, "x"),
        (llama_factory("a.png", TEXTS[0].removeprefix("<image>"), *TEXTS[1:]), "record-0"),
    ],
)
def test_published_spellings_give_the_same_queries(
    write: Callable[..., Path], record: Record, name: str, lines: bool
) -> None:
    source = ConversationSource(str(write(record, lines=lines)), turns="all")
    first, second = source.queries()
    assert (first.id, first.question, first.answer, first.answer_type) == (
        f"{name}:0",
        "Is there a dog?",
        "Yes",
        "yes_no",
    )
    assert (second.id, second.question, second.answer_type) == (f"{name}:1", "What colour is it?", "short")
    assert source.load(second).image.shape == (4, 6, 3)
    assert list(pickle.loads(pickle.dumps(source)).queries()) == [first, second]


def test_messages_of_parts(write: Callable[..., Path]) -> None:
    """OpenAI's parts, with the image beside them or in a part, as Qwen's examples have it."""
    text = {"type": "text", "text": "What is it?"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A dog"}]}
    records = (
        {"messages": [{"role": "user", "content": [{"type": "image"}, text]}, answer], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, text]}, answer]},
        {
            "messages": [
                {"role": "user", "content": [text, {"type": "image_url", "image_url": {"url": "a.png"}}]},
                answer,
            ]
        },
    )
    queries = ConversationSource(str(write(*records))).queries()
    assert {(q.question, q.answer, q.image) for q in queries} == {("What is it?", "A dog", "a.png")}


def test_only_the_first_turn_is_asked_unless_all_are(write: Callable[..., Path]) -> None:
    path = str(write(llava("x", "a.png", *TEXTS)))
    assert [q.id for q in ConversationSource(path).queries()] == ["x:0"]
    assert [q.id for q in ConversationSource(path, turns="all").queries()] == ["x:0", "x:1"]


def test_turns_before_the_image_are_not_about_it(write: Callable[..., Path]) -> None:
    path = write(llava("x", "a.png", "Hello", "Hello!", "<image>What is it?", "A dog"))
    assert [(q.id, q.question) for q in ConversationSource(str(path)).queries()] == [("x:1", "What is it?")]


def test_records_with_the_same_id_get_their_position(write: Callable[..., Path]) -> None:
    """LLaVA's mixes name records by their image, so ids repeat."""
    path = write(*(llava("7", "a.png", "What?", answer) for answer in ("A dog", "A cat", "A cow")))
    assert [q.id for q in ConversationSource(str(path)).queries()] == ["7:0", "7@1:0", "7@2:0"]
    clash = write(*(llava(name, "a.png", "What?", "A dog") for name in ("7@1", "7", "7", "7")))
    assert [q.id for q in ConversationSource(str(clash)).queries()] == ["7@1:0", "7:0", "7@2:0", "7@3:0"]
    with pytest.raises(DataError, match="c.json:.*'7@2'"):
        ConversationSource(
            str(write(*(llava(name, "a.png", "What?", "A dog") for name in ("7@2", "7", "7"))))
        ).queries()


def test_answer_types_by_setting(write: Callable[..., Path]) -> None:
    path = str(write(llava("x", "a.png", "What?", "A dog")))
    assert ConversationSource(path, answer_type="open").queries()[0].answer_type == "open"
    with pytest.raises(DataError, match="c.json:2.*turn 0"):
        ConversationSource(path, answer_type="yes_no").queries()


BAD: dict[str, tuple[Any, str]] = {
    "no object": ("text", "an object"),
    "no conversation": ({"id": "x", "image": "a.png"}, "conversations and messages"),
    "two conversations": (
        {**llava("x", "a.png", *TEXTS), "messages": [1]},
        "conversations and messages",
    ),
    "an empty conversation": (llava("x", "a.png"), "list of messages"),
    "a message of text": ({"image": "a.png", "conversations": ["a"]}, "message 0"),
    "an unknown role": ({"image": "a.png", "messages": [{"role": "tool", "content": "a"}]}, "'tool'"),
    "a message without text": ({"image": "a.png", "messages": [{"role": "user", "content": 3}]}, "message 0"),
    "an unknown part": (
        {"image": "a.png", "messages": [{"role": "user", "content": [{"type": "file"}]}]},
        "message 0",
    ),
    "two questions in a row": (
        {"image": "a.png", "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]},
        "message 1",
    ),
    "an answer first": ({"image": "a.png", "messages": [{"role": "assistant", "content": "a"}]}, "message 0"),
    "no answer": (llava("x", "a.png", "a", "b", "c"), "has no answer"),
    "only a system prompt": (
        {"image": "a.png", "messages": [{"role": "system", "content": "a"}]},
        "no question",
    ),
    "an image in an answer": (llava("x", "a.png", "a", "<image>"), "message 1"),
    "no image": (llava("x", None, "a", "b"), "no image"),
    "an image that is only marked": (llava("x", "", "<image>a", "b"), "names none"),
    "several images": (llava("x", ["a.png", "b.png"], "a", "b"), "several images"),
    "one image in several places": (llava("x", "a.png", "<image><image>a", "b"), "several images"),
    "a video": ({**llava("x", None, "<video>a", "b"), "videos": ["a.mp4"]}, "a video"),
    "an audio": ({**llama_factory("a.png", "a", "b"), "audios": ["a.mp3"]}, "an audio"),
    "a path that is a number": (llava("x", 3, "a", "b"), "must be a path"),
    "a missing image": (llava("x", "none.png", "a", "b"), "none.png"),
    "an image outside the root": (llava("x", "../a.png", "a", "b"), "leaves the data root"),
    "an id of nothing": (llava(" ", "a.png", "a", "b"), "'id'"),
    "an empty question": (llava("x", "a.png", "<image>\n", "b"), "'question'"),
    "an answer without a word": (llava("x", "a.png", "a", "?!"), "record 'x'"),
    "a stated confidence": (llava("x", "a.png", "a", "A dog. Confidence: 90%"), "states a confidence"),
    "a category that is no text": ({**llava("x", "a.png", "a", "b"), "category": 3}, "'category'"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("lines", [False, True])
def test_what_cannot_be_asked_is_named_or_left_out(
    write: Callable[..., Path], name: str, lines: bool
) -> None:
    record, says = BAD[name]
    good = llava("good", "b.png", "a", "b")
    path = write(good, record, lines=lines)
    with pytest.raises(DataError) as caught:
        ConversationSource(str(path)).queries()
    assert str(caught.value).startswith(f"{path}:")
    assert says in str(caught.value)
    source = ConversationSource(str(path), on_bad_record="skip")
    with pytest.warns(UserWarning, match="left out 1 of 2 records"):
        assert [q.id for q in source.queries()] == ["good:0"]
    assert len(source.bad.messages) == 1


def test_records_that_are_not_about_one_image_are_counted_by_kind(write: Callable[..., Path]) -> None:
    path = write(
        *(BAD[name][0] for name in ("no image", "no image", "several images", "a video")),
        llava(1, "a.png", "a", "b"),
    )
    source = ConversationSource(str(path), on_bad_record="skip")
    with pytest.warns(UserWarning, match="2 about no image, 1 about several images, 1 about a video"):
        source.queries()


def test_system_prompts_are_reported(write: Callable[..., Path]) -> None:
    record = llama_factory("a.png", "What?", "A dog")
    record["messages"].insert(0, {"role": "system", "content": "Answer in one word."})
    source = ConversationSource(str(write(record, {**llava("x", "a.png", "a", "b"), "system": "Be kind."})))
    with pytest.warns(UserWarning, match="2 conversations have a system prompt"):
        assert [q.question for q in source.queries()] == ["What?", "a"]


def test_shares_of_one_file_have_no_image_in_common(write: Callable[..., Path], tmp_path: Path) -> None:
    records = []
    for i in range(60):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i % 30}.png")
        records.append(llava(i, f"{i % 30}.png", "a", "b", "c", "d"))
    path = str(write(*records))
    parts = [
        {q.id: q.image for q in ConversationSource(path, turns="all", begin=begin, end=end).queries()}
        for begin, end in ((0.0, 0.5), (0.5, 0.8), (0.8, 1.0))
    ]
    assert sum(map(len, parts)) == 120
    images = [set(part.values()) for part in parts]
    assert not images[0] & images[1] | images[0] & images[2] | images[1] & images[2]
    assert len(set.union(*images)) == 30
    with pytest.raises(DataError, match="c.json.*120"):
        ConversationSource(path, turns="all", begin=0.5, end=0.5 + 1e-9).queries()


@pytest.mark.parametrize(("begin", "end"), [(0.5, 0.5), (-0.1, 1), (0, 1.1), (1, 0)])
def test_a_share_that_is_none_is_refused(begin: float, end: float) -> None:
    with pytest.raises(DataError, match="begin and end"):
        ConversationSource("c.json", begin=begin, end=end)


def test_a_file_that_changes_is_noticed(write: Callable[..., Path]) -> None:
    source = ConversationSource(str(write(llava("x", "a.png", "a", "b"))))
    queries = source.queries()
    write({"x": 1})
    with pytest.raises(DataError, match="c.json: changed while in use"):
        queries[0]


WORDS = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "<" not in text
)


@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.integers(0, 3), st.booleans(), st.booleans()
)
def test_any_conversation_is_read_as_it_was_written(
    pairs: list[tuple[str, str]], marked: int, behind: bool, system: bool
) -> None:
    """Whatever the spelling and the place of the image."""
    marked %= len(pairs)
    questions = [
        (f"{q}\n<image>" if behind else f"<image>\n{q}") if i == marked else q
        for i, (q, _) in enumerate(pairs)
    ]
    texts = [text for q, (_, answer) in zip(questions, pairs, strict=True) for text in (q, answer)]
    records = [llava("x", "a.png", *texts), llama_factory("a.png", *texts)]
    if system:
        records[0]["conversations"].insert(0, {"from": "system", "value": "s"})
        records[1]["messages"].insert(0, {"role": "system", "content": "s"})
    first, second = map(parse_conversation, records)
    assert first == second
    assert first.system == system
    expected = [(i, q.strip(), a.strip()) for i, (q, a) in enumerate(pairs)][marked:]
    assert [tuple(turn) for turn in first.turns] == expected


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["human", "gpt", "user", "assistant", "<image>", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "conversations",
                    "messages",
                    "from",
                    "value",
                    "role",
                    "content",
                    "image",
                    "images",
                    "type",
                    "text",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100)
@given(JSON)
def test_any_record_is_read_or_refused_in_one_line(record: Any) -> None:
    try:
        conversation = parse_conversation(record)
    except RecordError as error:
        message = str(error)
    else:
        assert isinstance(conversation, Conversation)
        message = conversation.image
    assert message
    assert "\n" not in message
