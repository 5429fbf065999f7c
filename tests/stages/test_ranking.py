"""Grading is one setting for all stages; open answers with a rejected alternative can be ranked by likelihood."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.data.sources.rlaif_v import RlaifVSource
from vlm_calibration.demo.scenes import CLASSES
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, Perturbation
from vlm_calibration.records import DataError, LoadedImage, Query
from vlm_calibration.stages.answering import answer_batch, rank_answers
from vlm_calibration.stages.level_fit import LevelFitModule
from vlm_calibration.text.confidence import render_answer
from vlm_calibration.text.grading import Grading

from ..command_line import Ended

Data = Callable[..., PerturbedQueryDataModule]
RANKING = Grading(open="ranking")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = ("ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split", "image_path")
SCENES = 30


def _open(sample: Sample, answer: str, *wrong: str) -> Sample:
    query = replace(sample.query, answer_type="open", answer=answer)
    return sample._replace(query=query, wrong=wrong)


@pytest.fixture
def samples(data: Data) -> list[Sample]:
    """An open query with one wrong answer, a yes/no query, and an open query with two wrong answers."""
    queries = data()
    queries.setup("fit")
    plain = [queries._sets["train"][0, i] for i in range(3)]
    return [
        _open(plain[0], "A dog, I think", "cat"),
        plain[1],
        _open(plain[2], "cat", "dog", "Two red cats."),
    ]


def test_the_likelier_answer_per_token_wins(
    load_model: Callable[..., Any], data: Data, samples: list[Sample]
) -> None:
    """Compared with one forward per answer: the mean log-likelihood of its tokens."""
    model, chat = load_model().eval(), data().chat

    def log_p(sample: Sample, answer: str) -> torch.Tensor:
        prompt = chat.render(sample.query.question)
        inputs = chat.inputs([prompt + render_answer(answer)], [sample.image], "right")
        start = chat.inputs([prompt], [sample.image], "right")["input_ids"].shape[1]
        with torch.no_grad():
            values = torch.log_softmax(model(**inputs).logits[0, start - 1 : -1].float(), -1)
        return values.gather(-1, inputs["input_ids"][0, start:, None])

    # Pairs in which mean and sum disagree, to show which of them decides.
    pairs = []
    for name in CLASSES[:20]:
        short, long = log_p(samples[0], name), log_p(samples[0], "A dog, I think")
        if (short.mean() > long.mean()) != (short.sum() > long.sum()):
            pairs.append((name, bool(short.mean() > long.mean())))
    assert pairs
    for name, likelier in pairs[:3]:
        chosen = [
            _open(samples[0], name, "A dog, I think"),
            samples[1],
            _open(samples[0], "A dog, I think", name),
        ]
        batch = PromptCollator(chat, RANKING)(chosen)
        assert rank_answers(model, batch) == [likelier, None, not likelier]
        answers = answer_batch(model, batch, chat.processor.tokenizer, 3)
        assert [answers[i].correct for i in (0, 2)] == [likelier, not likelier]


def test_every_wrong_answer_must_be_less_likely(
    load_model: Callable[..., Any], data: Data, samples: list[Sample]
) -> None:
    model, collate = load_model().eval(), PromptCollator(data().chat, RANKING)
    names = ("cat", "dog", "Two red cats.")
    for gold in names:
        others = [name for name in names if name != gold]
        alone = [rank_answers(model, collate([_open(samples[0], gold, other)]))[0] for other in others]
        assert rank_answers(model, collate([_open(samples[0], gold, *others)])) == [all(alone)]


def test_other_rules_rank_nothing(load_model: Callable[..., Any], data: Data, samples: list[Sample]) -> None:
    for chosen, grading in ((samples, Grading()), (samples[1:2], RANKING)):
        batch = PromptCollator(data().chat, grading)(chosen)
        assert batch.ranked == ()
        assert rank_answers(load_model(), batch) == [None] * len(chosen)


@pytest.mark.parametrize(
    ("grading", "correct"),
    [
        (Grading(), False),
        (Grading(short="contains"), True),
        (Grading(short="token_f1"), False),
        (Grading(short="token_f1", min_f1=0.3), True),
        (Grading(open="contains"), False),
    ],
)
def test_one_setting_grades_validation_and_evaluation(
    data: Data, monkeypatch: pytest.MonkeyPatch, grading: Grading, correct: bool
) -> None:
    def generate(model: Any, inputs: Any, *_: Any) -> list[str]:
        return ["A big brown dog lies there. Confidence: 80%"] * len(inputs["input_ids"])

    monkeypatch.setattr("vlm_calibration.stages.answering.generate_texts", generate)
    source = DemoSource("test", scenes=1)
    queries = data(validation=source, test={"": EvalSplit(source)}, grading=grading)
    queries.setup("fit")
    queries.setup("test")
    [validated], [tested] = queries.val_dataloader(), queries.test_dataloader()
    for batch in (validated.prompts, tested):
        dogs = batch._replace(
            queries=tuple(replace(q, answer="dog", answer_type="short") for q in batch.queries)
        )
        assert [p.correct for p in answer_batch(None, dogs, None, 1)] == [correct] * 3


class OpenSource(DemoSource):
    """The demo's corner questions as open ones; the second has no wrong answer."""

    def queries(self) -> list[Query]:
        return [replace(q, answer_type="open") for q in super().queries() if q.answer_type == "short"]

    def load(self, query: Query) -> LoadedImage:
        return super().load(replace(query, answer_type="short"))

    def wrong_answers(self, query: Query) -> list[str]:
        return [] if query.image.endswith("1") else ["cat"]


def test_a_query_without_a_wrong_answer_to_rank_is_refused_before_any_is_answered(data: Data) -> None:
    parts = {"one": EvalSplit(OpenSource("test", scenes=1)), "two": EvalSplit(OpenSource("test", scenes=2))}
    data(test={"one": parts["one"]}, grading=RANKING).setup("test")
    data(test=parts).setup("test")
    with pytest.raises(
        DataError, match=r"record 'test-000001-corner': `data\.grading\.open: ranking` compares"
    ):
        data(test=parts, grading=RANKING).setup("test")
    with pytest.raises(DataError, match="record 'calibration-000001-corner'"):
        data(validation=OpenSource("calibration", scenes=2), grading=RANKING).setup("fit")


def _label(name: str) -> str:
    # The demo's model words its answers differently, so none matches exactly.
    return f"{name} {name}."


@pytest.fixture(scope="module")
def rlaif_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's images under RLAIF-V's columns, and regions extracted for them."""
    folder = tmp_path_factory.mktemp("rlaif")
    source = DemoSource("calibration", scenes=SCENES, first=500)
    rows, queries = [], []
    corners = [q for q in source.queries() if q.answer_type == "short"]
    for i, query in enumerate(corners):
        loaded, file = source.load(query), BytesIO()
        Image.fromarray(loaded.image).save(file, "PNG")
        rejected = next(iter(source.wrong_answers(query)))
        rows.append(
            {
                "ds_name": "RLAIF-V",
                "image": {"bytes": file.getvalue(), "path": f"{i}.png"},
                "question": query.question,
                "chosen": _label(query.answer),
                "rejected": _label(rejected),
                "origin_dataset": "demo",
                "origin_split": "{}",
                "idx": i,
                "image_path": f"{i}.png",
            }
        )
        (mask,) = loaded.evidence
        ys, xs = mask.nonzero()
        box = [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
        region = {"label": query.answer, "box": box, "mask": None, "score": 0.9}
        queries.append(
            {
                "id": f"rlaif-v-{i}",
                "image": str(i),
                "question": query.question,
                "answer": _label(query.answer),
                "answer_type": "open",
                "objects": [query.answer],
                "regions": [region],
                "category": "demo",
            }
        )
    (folder / "files").mkdir()
    schema = pa.schema([*((n, pa.string()) for n in TEXTS), ("image", IMAGE), ("idx", pa.int64())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "files/a.parquet", row_group_size=8)
    names = [q.image for q in RlaifVSource(str(folder / "files")).queries()]
    queries = [{**query, "image": name} for query, name in zip(queries, names, strict=True)]
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    return folder


def test_a_file_of_regions_keeps_the_rejected_answers_of_its_data_set(rlaif_v: Path) -> None:
    """Also before any image is loaded."""
    images = RlaifVSource(str(rlaif_v / "files"))
    source = ParquetSource(str(rlaif_v / "queries.parquet"), images=images)
    rejected = [source.wrong_answers(q) for q in source.queries()]
    assert len(rejected) == SCENES
    table = pq.read_table(rlaif_v / "files").column("rejected").to_pylist()
    assert rejected == [[text] for text in table]


def _source(folder: Path, begin: float, end: float) -> dict[str, Any]:
    images = {
        "class_path": "vlm_calibration.data.sources.rlaif_v.RlaifVSource",
        "init_args": {"path": str(folder / "files"), "unpacked": str(folder / "unpacked")},
    }
    return {
        "class_path": "vlm_calibration.data.sources.parquet.ParquetSource",
        "init_args": {
            "path": str(folder / "queries.parquet"),
            "images": images,
            "begin": begin,
            "end": end,
        },
    }


def _configured(root: Path, folder: Path, name: str, *configs: str, **sections: dict[str, Any]) -> list[str]:
    """Arguments: shipped configurations, then a user's overlay."""
    overlay = {
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [],
            "default_root_dir": str(folder / name),
            **sections.get("trainer", {}),
        },
        "model": {
            "init_args": {
                "base": {"name_or_path": str(root / "src/vlm_calibration/demo/model"), "dtype": "float32"},
                "max_new_tokens": 16,
                **({"likelihoods": None} if "levels" in configs else {}),
                **sections.get("model", {}),
            }
        },
        "data": {"workers": 0, "eval_batch_size": 64, **sections.get("data", {})},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    files = [*(str(root / "configs" / f"{config}.yaml") for config in configs), str(path)]
    return [argument for file in files for argument in ("--config", file)]


def _callbacks(*names: str) -> list[dict[str, str]]:
    return [{"class_path": f"vlm_calibration.callbacks.{name}"} for name in names]


def test_rlaif_v_from_levels_to_evaluation(
    run: Callable[..., Ended], root: Path, rlaif_v: Path, tmp_path: Path
) -> None:
    levels = str(tmp_path / "levels.json")
    held_out = _source(rlaif_v, 0.0, 0.8)
    measuring = ("levels", "data/rlaif_v")

    # By exact match no answer is correct, and no table is written.
    exact = {"levels": held_out, "grading": {"open": "exact"}}
    command = _configured(root, tmp_path, "exact", *measuring, model={"out": levels}, data=exact)
    ended = run("levels", "fit", *command)
    assert (
        f"{levels} is not written: open answers teach no confidence: the base model is correct on 0 of 24"
        in ended.error()
    )
    assert not Path(levels).exists()

    command = _configured(
        root, tmp_path, "levels", *measuring, model={"out": levels}, data={"levels": held_out}
    )
    ended = run("levels", "fit", *command)
    assert ended.status == 0, ended.err
    table = AnchoredLevels(levels)
    assert table.table.provenance["grading"] == {"open": "ranking"}
    assert table.accuracy(CLEAN, "open") >= 0.9
    assert 0.2 <= table.accuracy(Perturbation("noise", 1), "open") <= 0.7, "two answers to choose between"

    trained = {
        "train": _source(rlaif_v, 0.0, 0.8),
        "validation": _source(rlaif_v, 0.8, 1.0),
        "batch_size": 8,
        "noise": {
            "levels": {
                "class_path": "vlm_calibration.perturbation.levels.AnchoredLevels",
                "init_args": {"path": levels, "grid": 1, "groups": 3},
            }
        },
    }
    writers = _callbacks("adapter.AdapterWriter", "predictions.PredictionWriter")
    trainer = {"callbacks": writers}
    presets = ("data/rlaif_v", "experiment/anchored")
    ended = run("fit", *_configured(root, tmp_path, "sft", "sft", *presets, data=trained, trainer=trainer))
    assert ended.status == 0, ended.err
    card = json.loads((tmp_path / "sft/adapter/calibration.json").read_text())
    taught = {(kind, strength): confidence for kind, strength, confidence in card["levels"]["open"]}
    grouped = AnchoredLevels(levels, grid=1, groups=3)
    assert taught == {p: grouped.confidence(Perturbation(*p), "open") for p in taught}
    assert {kind for kind, _ in taught} == {"", "noise"}
    assert taught[CLEAN] >= 0.8, "the mean of its group"
    assert 0.2 <= taught["noise", 1] <= 0.7

    stage_2 = {"adapter": str(tmp_path / "sft/adapter")}
    command = _configured(
        *(root, tmp_path, "dpo", "dpo", *presets, "experiment/anchored_dpo"),
        data=trained,
        trainer={**trainer, "num_sanity_val_steps": 0},
        model=stage_2,
    )
    ended = run("fit", *command)
    assert ended.status == 0, ended.err
    for stage in ("sft", "dpo"):
        answered = [
            json.loads(line) for line in (tmp_path / stage / "predictions.jsonl").open(encoding="utf-8")
        ]
        assert len(answered) == 6
        assert any(answer["correct"] for answer in answered), "ranked in validation as well"

    evaluated = {"adapters": {"dpo": str(tmp_path / "dpo/adapter")}, "oracle_levels": levels}
    parts = {"test": (0.0, 0.8), "calibration": (0.8, 1.0)}
    graded = {name: {"own": {"source": _source(rlaif_v, *part)}} for name, part in parts.items()}
    settings: dict[str, Any] = {"trainer": {"callbacks": writers[1:]}, "model": evaluated, "data": graded}
    command = _configured(root, tmp_path, "eval", "eval/jsonl", "data/rlaif_v", **settings)
    ended = run("test", *command)
    assert ended.status == 0, ended.err
    for system in ("base", "dpo", "oracle"):
        metrics = json.loads((tmp_path / "eval" / system / "metrics.json").read_text())
        assert metrics["n"] == 24
        calibrated = (tmp_path / "eval" / system / "calibration.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["correct"] for line in calibrated) >= 4, "ranked as well"
        assert metrics["accuracy"] >= 0.85, "ranked on clean images"
    ended = run("test", *command, "--data.grading.open", "exact")
    assert "data.grading (open) was 'ranking' and is 'exact'" in ended.error()


def test_ranking_measures_levels_without_generation(
    data: Data,
    trainer: Callable[..., L.Trainer],
    model_folder: str,
    tmp_path: Path,
) -> None:
    passes = Counter[int]()
    batch = 0

    class Watch(L.Callback):
        def on_test_batch_start(self, *arguments: Any) -> None:
            nonlocal batch
            batch = arguments[3]

    module = LevelFitModule(BaseModel(model_folder, dtype="float32"), str(tmp_path / "l.json"))
    module.configure_model()
    unwrap_peft(module.model).get_decoder().register_forward_pre_hook(lambda *_: passes.update([batch]))
    queries = data(levels=OpenSource("test", scenes=1), grading=RANKING, noise=NoisePolicy())
    with pytest.raises(DataError, match="open answers teach no confidence"):
        trainer(Watch()).test(module, datamodule=queries, verbose=False)
    assert (passes[1], passes[2]) == (1, 1), "one for each batch of four of eleven levels"
    assert passes[0] > 2, (
        "the untouched image is among the first, and the likelihood of its answer is measured"
    )
