"""Published formats become queries: what each record says, what is wrong with one, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_calibration.cli import main
from vlm_calibration.data.convert.formats import gqa, sharegpt, vqav2
from vlm_calibration.data.convert.hf import hf, rlaif_v
from vlm_calibration.data.convert.reading import Output, Queries
from vlm_calibration.data.convert.writing import QueryWriter
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.records import DataError, Query

from ..command_line import Capture
from .conftest import encode, refused

Record = dict[str, Any]
Convert = Callable[..., list[Query]]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Convert a source to queries.jsonl beside a.png and b.png, and read that."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / name)

    def converted(source: Iterable[tuple[str, Queries]], **options: Any) -> list[Query]:
        out = tmp_path / "queries.jsonl"
        QueryWriter(Output(out, overwrite=True, **options)).write(source)
        return list(JsonlSource(str(out)).queries())

    return converted


def save(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def check_bad(convert: Convert, source: Callable[[], Any], place: str, culprit: str) -> list[Query]:
    """The record is named, with its place; the queries without it are returned."""
    with refused(f"{place}: ", culprit):
        convert(source())
    return convert(source(), skip_bad=True)


# --- Conversations ---------------------------------------------------------------------------------------------------

TEXTS = ("<image>\nIs there a dog?", "Yes", "What colour is it?", "Brown")


def llava(identifier: Any, image: Any, *texts: str) -> Record:
    spoken = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": identifier, "image": image, "conversations": spoken}


def llama_factory(*texts: Any, **others: Any) -> Record:
    spoken = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": spoken, **others}


PART = {"type": "text", "text": "Is there a dog?"}
SPELLINGS: list[tuple[Record, str]] = [
    (llava("x", "a.png", *TEXTS), "x"),
    (llava(17, ["a.png"], *TEXTS), "17"),
    ({**llava("x", None, *TEXTS), "images": "a.png", "system": "Be kind."}, "x"),
    (llama_factory(*TEXTS, images=["a.png"]), "record-0"),
    (llama_factory([{"type": "image"}, PART], *TEXTS[1:], images=["a.png"]), "record-0"),
    (llama_factory([{"type": "image", "image": "a.png"}, PART], *TEXTS[1:]), "record-0"),
    (llama_factory([PART, {"type": "image_url", "image_url": {"url": "a.png"}}], *TEXTS[1:]), "record-0"),
]


@pytest.mark.parametrize(("record", "name"), SPELLINGS)
def test_conversations(convert: Convert, tmp_path: Path, record: Record, name: str) -> None:
    file = save(tmp_path / "c.json", [record])
    first, second = convert(sharegpt(file, turns="all"))
    assert first == Query(f"{name}:0", "a.png", "Is there a dog?", "Yes", "yes_no")
    assert second == Query(f"{name}:1", "a.png", "What colour is it?", "Brown", "short")
    assert convert(sharegpt(file)) == [first]


def test_turns_and_names_of_conversations(convert: Convert, tmp_path: Path) -> None:
    late = llava("x", "a.png", "Hello", "Hello!", "<image>What is it?", "A dog")
    system = llama_factory("What?", "A dog", images=["a.png"])
    system["messages"].insert(0, {"role": "system", "content": "Answer in one word."})
    same = [llava("7", "a.png", "What?", answer) for answer in ("A dog", "A cat", "A cow")]
    queries = convert(sharegpt(save(tmp_path / "c.json", [late, system, *same]), answer_type="open"))
    assert [q.id for q in queries] == ["x:1", "record-1:0", "7:0", "7@3:0", "7@4:0"]
    assert [q.question for q in queries[:2]] == ["What is it?", "What?"]
    assert {q.answer_type for q in queries} == {"open"}


BAD_CONVERSATIONS: dict[str, Any] = {
    "an object": "text",
    "conversations and messages": {"id": "x", "image": "a.png"},
    "'conversations', 'messages'": {**llava("x", "a.png", *TEXTS), "messages": [1]},
    "keys conversations": llava("x", "a.png"),
    "not of this format": {"image": "a.png", "conversations": ["a"]},
    "'tool'": {"image": "a.png", "messages": [{"role": "tool", "content": "a"}]},
    "message 0 must be": llama_factory([{"type": "file"}], "b", images=["a.png"]),
    "message 1 is of role user": {"messages": [{"role": "user", "content": "a"}] * 2, "image": "a.png"},
    "has no answer": llava("x", "a.png", "a", "b", "c"),
    "no question": {"image": "a.png", "messages": [{"role": "system", "content": "a"}]},
    "message 1 is an answer": llava("x", "a.png", "a", "<image>"),
    "no image": llava("x", "", "<image>a", "b"),
    "several images": llava("x", ["a.png", "b.png"], "a", "b"),
    "about several": llava("x", "a.png", "<image><image>a", "b"),
    "video": {**llava("x", None, "<video>a", "b"), "videos": ["a.mp4"]},
    "audio": llama_factory("a", "b", images=["a.png"], audios=["a.mp3"]),
    "'image'": llava("x", 3, "a", "b"),
    "none.png": llava("x", "none.png", "a", "b"),
    "leaves the data root": llava("x", "../a.png", "a", "b"),
    "'id'": llava(" ", "a.png", "a", "b"),
    "'question'": llava("x", "a.png", "<image>\n", "b"),
    "states a confidence": llava("x", "a.png", "a", "A dog. Confidence: 90%"),
}


@pytest.mark.parametrize("culprit", BAD_CONVERSATIONS)
def test_conversations_that_cannot_be_asked(convert: Convert, tmp_path: Path, culprit: str) -> None:
    records = [llava("good", "b.png", "a", "b"), BAD_CONVERSATIONS[culprit]]
    file = save(tmp_path / "c.json", records)
    [query] = check_bad(convert, lambda: sharegpt(file), f"{file}: [1]", culprit)
    assert query.id == "good:0"


def test_files_that_are_not_json(convert: Convert, tmp_path: Path) -> None:
    good = json.dumps(llava("good", "b.png", "a", "b"))
    file = tmp_path / "c.json"
    file.write_text(f"\n{good}\n{{\n")
    assert len(check_bad(convert, lambda: sharegpt(file), f"{file}:3", "not JSON")) == 1
    file.write_text(f"\ufeff[{good}]", encoding="utf-8")
    assert len(convert(sharegpt(file))) == 1
    for content in (f"[{good},", "[]", ""):
        file.write_text(content)
        with pytest.raises(DataError, match=r"c\.json|no record"):
            convert(sharegpt(file), skip_bad=True)
    with pytest.raises(DataError, match="none.json: cannot be read"):
        convert(sharegpt(tmp_path / "none.json"))


# --- VQAv2 -----------------------------------------------------------------------------------------------------------

VQA = [
    (262148000, 262148, "Where is he looking?", "other", "down", ["down"] * 6 + ["at table"] * 3 + ["board"]),
    (262148001, 262148, "Is this indoors?", "yes/no", "no", ["no"] * 9 + ["yes"]),
    (393225000, 393225, "How many dogs are there?", "number", "2", ["2"] * 7 + ["two"] * 3),
    (393225001, 393225, "Is it red or blue?", "yes/no", "red", ["red"] * 10),
]


@pytest.fixture
def vqa(tmp_path: Path) -> tuple[Path, Path]:
    """The files of questions and annotations, and the images in the folder `coco`."""
    (tmp_path / "coco").mkdir()
    questions, annotations = [], []
    for number, image, text, kind, gold, answers in VQA:
        Image.new("RGB", (20, 10), "red").save(tmp_path / f"coco/COCO_val2014_{image:012d}.jpg")
        questions.append({"image_id": image, "question": text, "question_id": number})
        given = [{"answer": answer, "answer_confidence": "yes"} for answer in answers]
        form = text.lower().rsplit(" ", 2)[0]
        label = {"question_type": form, "multiple_choice_answer": gold, "answers": given, "answer_type": kind}
        annotations.append({"image_id": image, "question_id": number, **label})
    head = {"info": {"year": 2017}, "data_subtype": "val2014"}
    asked = save(tmp_path / "questions.json", {**head, "questions": questions})
    return asked, save(tmp_path / "annotations.json", {**head, "annotations": annotations})


def change(path: Path, index: int, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content[path.stem][index].update(changes)
    save(path, content)


def test_vqa(convert: Convert, vqa: tuple[Path, Path], tmp_path: Path) -> None:
    other, yes_no, number, short = convert(vqav2(*vqa), images=tmp_path / "coco")
    image = "coco/COCO_val2014_000000262148.jpg"
    assert other == Query(
        "262148000", image, "Where is he looking?", "down", "short",
        category="other/where is", synonyms=("at table",),
    )  # fmt: skip
    assert yes_no == Query("262148001", image, "Is this indoors?", "no", "yes_no", category="yes_no/is")
    assert (number.answer, number.answer_type, number.synonyms) == ("2", "short", ())
    assert (short.answer, short.answer_type) == ("red", "short")


def test_bad_questions_of_vqa(convert: Convert, vqa: tuple[Path, Path], tmp_path: Path) -> None:
    questions, annotations = vqa
    faults: list[Record] = [{"question_id": 99}, {"image_id": "x"}, {"image_id": 7}]
    for index, changes in enumerate(faults):
        change(questions, index, **changes)
    images = tmp_path / "coco"
    with refused(f"{questions}: questions[0]: question 99 has no annotation in {annotations}"):
        convert(vqav2(*vqa), images=images)
    [query] = convert(vqav2(*vqa), images=images, skip_bad=True)
    assert query.answer == "red"
    with pytest.raises(DataError, match=f"{annotations}: no questions"):
        convert(vqav2(annotations, annotations))
    with pytest.raises(DataError, match="--file-name {no}.jpg: no key 'no'"):
        convert(vqav2(*vqa, file_name="{no}.jpg"))
    for changes, culprit in (({"answer_type": "maybe"}, "'maybe'"), ({"answers": ["a"]}, "format")):
        change(annotations, 1, **changes)
        with pytest.raises(DataError, match=rf"{annotations}: annotations\[1\]: .*{culprit}"):
            convert(vqav2(*vqa), skip_bad=True)
        change(annotations, 1, answer_type="other")


# --- GQA -------------------------------------------------------------------------------------------------------------


def question(image: str, text: str, answer: str, kinds: str, /, *arguments: str, **spans: Record) -> Record:
    structural, semantic = kinds.split("/")
    return {
        "imageId": image,
        "question": text,
        "answer": answer,
        "fullAnswer": f"The answer is {answer}.",
        "types": {"structural": structural, "semantic": semantic, "detailed": "x"},
        "semantic": [{"operation": "select", "dependencies": [], "argument": a} for a in arguments],
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}, **spans},
    }


GQA = {
    "1": question(
        "10", "What is on the table?", "plate", "query/rel", "table (101)", "_,on,s (102)", "name",
        question={"4": "101"}, answer={"0": "102"}, fullAnswer={"1": "102", "5": "101"},
    ),
    "2": question("10", "Is there a dog?", "no", "verify/obj", "dog (-)", "?"),
    "3": question("10", "What colour is the chair?", "brown", "query/attr", "chair (103)", question={"4": "103"}),
    "4": question("11", "Is it sunny?", "no", "verify/global", "scene"),
    "5": question("11", "Are the animals alike?", "yes", "logical/obj", "animal (201, 202)", question={"2": "201,202"}),
}  # fmt: skip
BOXES = {
    "10": {"101": ("table", 0, 4, 10, 6), "102": ("plate", 2, 4, 3, 3), "103": ("chair", 12, 0, 4, 4),
           "104": ("chair", 16, 0, 4, 4), "105": ("speck", 3, 3, 2, 4)},
    "11": {"201": ("cat", 0, 0, 5, 5), "202": ("cow", 8, 0, 5, 5), "203": ("tree", 15, 0, 5, 9)},
}  # fmt: skip
GRAPHS = {
    image: {"objects": {key: dict(zip(("name", *"xywh"), box, strict=True)) for key, box in boxes.items()}}
    for image, boxes in BOXES.items()
}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    for name in ("10", "11"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / f"{name}.jpg")
    return save(tmp_path / "questions.json", GQA)


def test_gqa(convert: Convert, questions: Path, tmp_path: Path) -> None:
    rows = convert(gqa(questions, scene_graphs=save(tmp_path / "graphs.json", GRAPHS)))
    on_table, dog, chair, scene, animals = rows
    assert (on_table.image, on_table.category) == ("10.jpg", "query/rel")
    assert on_table.synonyms == ("The answer is plate.",)
    assert set(on_table.objects) == {"table", "plate"}
    assert [r.label for r in on_table.regions] == ["table", "plate", "chair", "chair"]
    assert [r.box for r in on_table.regions[:2]] == [(0, 4, 10, 10), (2, 4, 5, 7)]
    assert (dog.objects, dog.absent, dog.answer_type) == (("dog",), ("dog",), "yes_no")
    assert [r.label for r in dog.regions] == ["table", "plate", "chair", "chair"]
    assert chair.objects == ("chair",)
    assert [r.label for r in chair.regions] == ["table", "plate", "chair"], "not the other chair"
    assert (scene.objects, scene.regions) == ((), ())
    assert set(animals.objects) == {"cat", "cow"}
    source = JsonlSource(str(tmp_path / "queries.jsonl"))
    assert [source.presence(q) for q in rows] == ["present", "absent", "present", "unlocated", "present"]
    # Names of other objects are wrong answers only where an object is asked for.
    assert [list(source.wrong_answers(q)) for q in rows[:3]] == [["chair"], ["Yes"], []]
    assert [q.wrong_answers for q in rows] == [None, None, (), None, None]


def test_gqa_without_scene_graphs_and_in_several_files(convert: Convert, questions: Path) -> None:
    queries = convert(gqa(questions))
    assert [set(q.objects) for q in queries] == [{"table", "plate"}, {"dog"}, {"chair"}, set(), {"animal"}]
    assert not any(q.regions for q in queries)
    folder = questions.with_name("all")
    folder.mkdir()
    with pytest.raises(DataError, match=f"{folder}: no"):
        convert(gqa(folder))
    for name, keys in (("1.json", "12"), ("0.json", "345")):
        save(folder / name, {key: GQA[key] for key in keys})
    assert [q.id for q in convert(gqa(folder))] == ["3", "4", "5", "1", "2"]


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [({"answer": None}, "'answer'"), ({"imageId": []}, "format"), ({"imageId": "13"}, "13.jpg")],
)
def test_bad_questions_of_gqa(convert: Convert, questions: Path, changes: Record, culprit: str) -> None:
    save(questions, {**GQA, "2": {**GQA["2"], **changes}})
    queries = check_bad(convert, lambda: gqa(questions), f"{questions}: '2'", culprit)
    assert [q.id for q in queries] == ["1", "3", "4", "5"]


def test_scene_graphs_of_another_split_or_format(convert: Convert, questions: Path, tmp_path: Path) -> None:
    bad: dict[str, Any] = {
        "none of the images": {"99": GRAPHS["10"]},
        "'10'": {"10": []},
        "'10': no key 'w'": {"10": {"objects": {"101": {"name": "chair"}}}},
        "an object": [],
    }
    for culprit, graphs in bad.items():
        path = save(tmp_path / "graphs.json", graphs)
        with pytest.raises(DataError, match=f"{path}: .*{culprit}"):
            convert(gqa(questions, scene_graphs=path), skip_bad=True)


# --- The library datasets, and RLAIF-V -------------------------------------------------------------------------------


Rows = Callable[..., str]


def embedded(shade: int) -> Record:
    return {"bytes": encode(Image.new("RGB", (6, 4), (shade, 0, 0))), "path": None}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Write a Parquet file; the library writes to no cache of the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def written(file: str = "rows.parquet", **columns: list[Any]) -> str:
        n = max(map(len, columns.values()))
        answers = ["a dog", "Yes", "It is a very long answer."][:n]
        plain = {"question": [f"What is {i}?" for i in range(n)], "answer": answers}
        table = pa.table({**plain, "image": [embedded(i) for i in range(n)], **columns})
        pq.write_table(table, tmp_path / file)
        return str(tmp_path / file)

    return written


def test_embedded_images_are_written_once(convert: Convert, rows: Rows, tmp_path: Path) -> None:
    path = rows(image=[embedded(1), embedded(2), embedded(1)])
    queries = convert(hf(path))
    assert [q.id for q in queries] == ["row-0", "row-1", "row-2"]
    assert [q.answer_type for q in queries] == ["short", "yes_no", "open"]
    source = JsonlSource(str(tmp_path / "queries.jsonl"))
    assert [source.load(q).image[0, 0].tolist() for q in queries] == [[1, 0, 0], [2, 0, 0], [1, 0, 0]]
    files = [f for f in (tmp_path / "queries_images").rglob("*") if f.is_file()]
    assert len(files) == len({q.image for q in queries}) == 2
    assert convert(hf(path)) == queries, "overwritten"
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(DataError, match="queries_images: exists already: --overwrite replaces it$"):
        QueryWriter(Output(tmp_path / "queries.jsonl", skip_bad=True)).write(hf(path))
    assert not (tmp_path / "queries.jsonl").exists()


def test_columns_of_other_names_and_kinds(convert: Convert, rows: Rows, tmp_path: Path) -> None:
    region = {"label": "dog", "box": [0.0, 0.0, 3.0, 4.0]}
    data: Record = {"q": ["Which?\nAnswer the question using a single word or phrase.", "What?"]}
    data |= {"label": [1, 0], "image": [["a.png"], ["b.png"]], "number": [7, 8], "kind": ["short", "open"]}
    data |= {"found": [[region], []], "group": [3, None], "synonyms": [["dog"], []], "wrong": ["a cat"] * 2}
    labels = datasets.ClassLabel(names=["a cat", "a dog"])
    datasets.Dataset.from_dict(data).cast_column("label", labels).save_to_disk(tmp_path / "saved")
    names = {"question": "q", "answer": "label", "id": "number", "answer_type": "kind", "regions": "found"}
    path = str(tmp_path / "saved")
    first, second = convert(hf(path, columns={**names, "category": "group", "wrong_answers": "wrong"}))
    assert (first.id, first.image, first.question, first.answer) == ("7", "a.png", "Which?", "a dog")
    assert (first.answer_type, first.synonyms, first.category) == ("short", ("dog",), "3")
    assert (first.wrong_answers, second.wrong_answers) == (("a cat",), ())
    assert [(r.label, r.box) for r in first.regions] == [("dog", (0, 0, 3, 4))]
    assert (second.answer, second.answer_type, second.category, second.regions) == ("a cat", "open", None, ())
    for columns, culprit in (
        ({**names, "objects": "things"}, "'things'"),
        ({"anser": "a"}, "'anser'.*answer"),
        ({}, "'question'"),
    ):
        with pytest.raises(DataError, match=f"--columns: no .*{culprit}"):
            convert(hf(path, columns=columns))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([True, False], [("Yes", "yes_no", ()), ("No", "yes_no", ())]),
        ([2.0, 2.5], [("2", "short", ()), ("2.5", "short", ())]),
        ([["dog", "puppy"], ["cat"]], [("dog", "short", ("puppy",)), ("cat", "short", ())]),
        ([["cat"] * 4 + ["dog"] * 5 + ["cow"]] * 2, [("dog", "short", ("cat",))] * 2),
    ],
)
def test_answers_that_are_no_text(convert: Convert, rows: Rows, answers: Any, expected: Any) -> None:
    queries = convert(hf(rows(answer=answers)))
    assert [(q.answer, q.answer_type, q.synonyms) for q in queries] == expected


BAD_ROWS: dict[str, Record] = {
    "'answer'": {"answer": ["a", None]},
    "list of answers": {"answer": [["a"], []]},
    "'text'": {"answer_type": ["short", "text"]},
    "duplicate id 'x'": {"id": ["x", "x"]},
    "'regions[0].box'": {"regions": [[{"label": "a", "box": box}] for box in ([0, 0, 4, 4], [0, 0, 1])]},
    "no image that Pillow reads": {"image": [embedded(1), {"bytes": b"no", "path": None}]},
    "'image'": {"image": [embedded(1), None]},
    "one image, found 2": {"image": [["a.png"], ["a.png", "b.png"]]},
}


@pytest.mark.parametrize("culprit", BAD_ROWS)
def test_bad_rows(convert: Convert, rows: Rows, culprit: str) -> None:
    path = rows(**{"question": ["a", "b"], **BAD_ROWS[culprit]})
    assert len(check_bad(convert, lambda: hf(path), f"{path}: row 1", culprit)) == 1


def test_what_is_no_data_set_is_named(
    rows: Rows, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no")
    for name in ("none", "bad.parquet", "none.parquet"):
        with pytest.raises(DataError, match=str(tmp_path / name)):
            convert(hf(str(tmp_path / name)))

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe Hub")

    part = datasets.Dataset.from_dict({"a": [1]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="--split: .*train, test.*did you mean test.*'tset'"):
        convert(hf(str(tmp_path / "splits"), split="tset"))
    with pytest.raises(DataError, match="--name and --revision are for a data set on the Hub"):
        convert(hf(str(tmp_path / "splits"), name="x"))
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="someone/something: cannot be opened: Couldn't reach.*save_to_disk"):
        convert(hf("someone/something"))


def test_rlaif_v(convert: Convert, rows: Rows, tmp_path: Path) -> None:
    folder = tmp_path / "rlaif"
    folder.mkdir()
    rows("rlaif/a.parquet", chosen=["A dog."] * 2, rejected=["A cat.", None], origin_dataset=["COCO", ""])
    rows("rlaif/b.parquet", chosen=["A dog."], rejected=["A dog."], origin_dataset=["COCO"])
    queries = convert(rlaif_v(str(folder)))
    assert [(q.answer, q.answer_type) for q in queries] == [("A dog.", "open")] * 3
    assert [q.category for q in queries] == ["COCO", None, "COCO"]
    source = JsonlSource(str(tmp_path / "queries.jsonl"))
    assert [list(source.wrong_answers(q)) for q in queries] == [["A cat."], [], []]


def test_the_command(convert: Convert, tmp_path: Path, capsys: Capture) -> None:
    bad = [llava(i, image, "a", "b") for i, image in enumerate((None, None, "none.png"))]
    file = save(tmp_path / "c.json", [*bad, llava("x", "a.png", *TEXTS)])
    out = tmp_path / "queries.jsonl"
    command = ["data", "convert", "sharegpt", str(file), "--turns", "all", "--out", str(out)]
    assert main(command) == 1
    assert f"{file}: [0]: " in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 2 queries about 1 images: 1 yes_no, 1 short" in printed
    assert f"left out 3 bad records:\n  2 such as {file}: [0]: " in printed
    assert f"1 such as {file}: [2]: " in printed
    assert "predict --config regions" in printed
    assert main([*command, "--skip-bad"]) == 1
    assert f"{out}: exists already" in capsys.readouterr().err
    assert main([*command, "--skip-bad", "--overwrite"]) == 0
    assert main([*command[:-1], str(tmp_path / "q.json")]) == 1
    assert [p.name for p in tmp_path.glob(".*")] == [], "no temporary file stays"


def test_images_elsewhere_keep_their_names(convert: Convert, tmp_path: Path, capsys: Capture) -> None:
    file, out = save(tmp_path / "c.json", [llava("x", "a.png", *TEXTS)]), tmp_path / "other/q.jsonl"
    assert main(["data", "convert", "sharegpt", str(file), "--out", str(out), "--images", str(tmp_path)]) == 0
    assert f"--root {tmp_path}" in capsys.readouterr().out
    [query] = JsonlSource(str(out), root=str(tmp_path)).queries()
    assert query.image == "a.png"
