"""Ranking measures the levels of open answers with a rejected alternative; what is generated is graded by one rule in all stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from vlm_calibration.data.module import LEVELS, DataNeeds, PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.demo.scenes import CLASSES
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, Perturbation
from vlm_calibration.records import DataError, LoadedImage, Query
from vlm_calibration.stages.answering import answer_batch
from vlm_calibration.stages.level_fit import LevelFitModule, rank_answers
from vlm_calibration.text.confidence import render_answer
from vlm_calibration.text.grading import Grading, grade

from ..command_line import Ended

Data = Callable[..., PerturbedQueryDataModule]
RANKING = Grading(rank_levels=True)
GRADING = {"open": "token_f1", "rank_levels": True}
SCENES = 30


def _open(sample: Sample, answer: str, *wrong: str) -> Sample:
    query = replace(sample.query, answer_type="open", answer=answer)
    return sample._replace(query=query, wrong=wrong)


@pytest.fixture
def samples(data: Data) -> list[Sample]:
    """An open query with one wrong answer, a yes/no query, and an open query with two wrong answers."""
    queries = data()
    queries.setup("fit")
    plain = [queries.sets["train"][0, i] for i in range(3)]
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
        batch = PromptCollator(chat, RANKING, ranks=True)(chosen)
        assert rank_answers(model, batch) == [likelier, None, not likelier]


def test_every_wrong_answer_must_be_less_likely(
    load_model: Callable[..., Any], data: Data, samples: list[Sample]
) -> None:
    model, collate = load_model().eval(), PromptCollator(data().chat, RANKING, ranks=True)
    names = ("cat", "dog", "Two red cats.")
    for gold in names:
        others = [name for name in names if name != gold]
        alone = [rank_answers(model, collate([_open(samples[0], gold, other)]))[0] for other in others]
        assert rank_answers(model, collate([_open(samples[0], gold, *others)])) == [all(alone)]


def test_other_queries_and_stages_rank_nothing(
    load_model: Callable[..., Any], data: Data, samples: list[Sample]
) -> None:
    for chosen, ranks in ((samples, False), (samples[1:2], True)):
        batch = PromptCollator(data().chat, RANKING, ranks=ranks)(chosen)
        assert batch.ranked == ()
        assert rank_answers(load_model(), batch) == [None] * len(chosen)


@pytest.mark.parametrize(
    ("grading", "kind", "correct"),
    [
        (Grading(), "short", False),
        (Grading(short="contains"), "short", True),
        (Grading(short="token_f1"), "short", False),
        (Grading(short="token_f1", min_f1=0.3), "short", True),
        (Grading(open="contains"), "short", False),
        (Grading(open="contains"), "open", True),
        (RANKING, "open", False),
    ],
)
def test_one_setting_grades_validation_and_evaluation(
    data: Data, monkeypatch: pytest.MonkeyPatch, grading: Grading, kind: Any, correct: bool
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
            queries=tuple(replace(q, answer="dog", answer_type=kind) for q in batch.queries)
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
    def set_up(scenes: int, grading: Grading) -> None:
        queries = data(levels=OpenSource("test", scenes=scenes), grading=grading)
        queries.trainer = SimpleNamespace(  # type: ignore[assignment]
            lightning_module=SimpleNamespace(data_needs=DataNeeds((LEVELS,), ()))
        )
        queries.setup("test")

    set_up(1, RANKING)
    set_up(2, Grading())
    with pytest.raises(DataError, match=r"record '.*000001-corner': `data\.grading\.rank_levels` compares"):
        set_up(2, RANKING)
    source = OpenSource("test", scenes=2)
    queries = data(test={"": EvalSplit(source)}, grading=RANKING)
    queries.setup("test")
    [batch] = queries.test_dataloader()
    assert batch.ranked == (), "an evaluation ranks nothing"


def _label(name: str) -> str:
    # The demo's model words its answers differently, so none matches exactly.
    return f"{name} {name}."


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's images, and open queries about them with regions and a rejected answer, as of RLAIF-V."""
    folder = tmp_path_factory.mktemp("pairs")
    source = DemoSource("calibration", scenes=SCENES, first=500)
    queries = []
    corners = [q for q in source.queries() if q.answer_type == "short"]
    for i, query in enumerate(corners):
        loaded = source.load(query)
        Image.fromarray(loaded.image).save(folder / f"{i}.png")
        (mask,) = loaded.evidence
        ys, xs = mask.nonzero()
        box = [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
        queries.append(
            {
                "id": f"row-{i}",
                "image": f"{i}.png",
                "question": query.question,
                "answer": _label(query.answer),
                "answer_type": "open",
                "objects": [query.answer],
                "regions": [{"label": query.answer, "box": box, "mask": None, "score": 0.9}],
                "category": "demo",
                "wrong_answers": [_label(next(iter(source.wrong_answers(query))))],
            }
        )
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    return folder


def _source(folder: Path, begin: float, end: float) -> dict[str, Any]:
    """A file with the queries between two shares of all."""
    queries, path = pq.read_table(folder / "queries.parquet"), folder / f"queries-{begin}-{end}.parquet"
    first, last = round(begin * len(queries)), round(end * len(queries))
    pq.write_table(queries.slice(first, last - first), path)
    return {
        "class_path": "vlm_calibration.data.sources.parquet.ParquetSource",
        "init_args": {"path": str(path)},
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
                **sections.get("model", {}),
            }
        },
        "data": {"workers": 0, "eval_batch_size": 64, "grading": GRADING, **sections.get("data", {})},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    files = [*(str(root / "configs" / f"{config}.yaml") for config in configs), str(path)]
    return [argument for file in files for argument in ("--config", file)]


def _is_graded(answered: dict[str, Any]) -> bool:
    """Whether an answer counts as correct by the rule of `GRADING`."""
    grading = Grading(open="token_f1")
    return grade(answered["text"], answered["answer"], "open", grading=grading).correct is answered["correct"]


def _callbacks(*names: str) -> list[dict[str, str]]:
    return [{"class_path": f"vlm_calibration.callbacks.{name}"} for name in names]


@pytest.mark.nightly
def test_pairs_of_answers_from_levels_to_evaluation(
    run: Callable[..., Ended], root: Path, pairs: Path, tmp_path: Path
) -> None:
    levels = str(tmp_path / "levels.json")
    held_out = _source(pairs, 0.0, 0.8)
    measuring = ("levels", "data/jsonl")

    # By exact match no answer is correct, and no table is written.
    exact = {"levels": held_out, "grading": {"open": "exact", "rank_levels": False}}
    command = _configured(
        root, tmp_path, "exact", *measuring, model={"out": levels, "likelihoods": None}, data=exact
    )
    ended = run("levels", "fit", *command)
    assert (
        f"{levels} is not written: open answers teach no confidence: the base model is correct on 0 of 24"
        in ended.error()
    )
    assert not Path(levels).exists()

    command = _configured(
        *(root, tmp_path, "levels", *measuring),
        model={"out": levels, "likelihoods": None},
        data={"levels": held_out},
    )
    ended = run("levels", "fit", *command)
    assert ended.status == 0, ended.err
    table = AnchoredLevels(levels)
    assert table.table.provenance["grading"] == {"open": "ranking"}
    assert table.accuracy(CLEAN, "open") >= 0.9
    assert 0.2 <= table.accuracy(Perturbation("noise", 1.0), "open") <= 0.7, "two answers to choose between"

    trained = {
        "train": _source(pairs, 0.0, 0.8),
        "validation": _source(pairs, 0.8, 1.0),
        "batch_size": 8,
        "noise": {
            "levels": {
                "class_path": "vlm_calibration.perturbation.levels.AnchoredLevels",
                "init_args": {"path": levels, "likelihoods": None, "grid": 1, "groups": 3},
            }
        },
    }
    writers = _callbacks("adapter.AdapterWriter", "predictions.PredictionWriter")
    trainer = {"callbacks": writers}
    presets = ("data/jsonl", "experiment/anchored")
    ended = run("fit", *_configured(root, tmp_path, "sft", "sft", *presets, data=trained, trainer=trainer))
    assert ended.status == 0, ended.err
    card = json.loads((tmp_path / "sft/adapter/calibration.json").read_text())
    taught = {(kind, strength): confidence for kind, strength, confidence in card["levels"]["open"]}
    assert taught["", 0] >= 0.9
    assert 0.2 <= taught["noise", 1] <= 0.7
    assert card["training"]["levels"].endswith("open answers by ranking")
    assert "not how often its answer is correct by data.grading (token_f1 >= 0.5)" in ended.err

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
        assert all(map(_is_graded, answered)), "what is generated is graded in validation"

    evaluated = {"adapters": {"dpo": str(tmp_path / "dpo/adapter")}}
    parts = {"test": (0.0, 0.8), "calibration": (0.8, 1.0)}
    graded = {name: {"own": {"source": _source(pairs, *part)}} for name, part in parts.items()}
    settings: dict[str, Any] = {"trainer": {"callbacks": writers[1:]}, "model": evaluated, "data": graded}
    command = _configured(root, tmp_path, "eval", "eval/jsonl", "data/jsonl", **settings)
    ended = run("test", *command)
    assert ended.status == 0, ended.err
    for system in ("base", "dpo"):
        for name, count in (("predictions", 24), ("calibration", 6)):
            lines = (tmp_path / "eval" / system / f"{name}.jsonl").read_text().splitlines()
            assert len(lines) == count
            assert all(_is_graded(json.loads(line)) for line in lines)


def test_ranking_measures_levels_without_generation(
    data: Data,
    trainer: Callable[..., L.Trainer],
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []
    module = LevelFitModule(BaseModel(model_folder, dtype="float32"), str(tmp_path / "l.json"))
    module.configure_model()
    unwrap_peft(module.model).get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    queries = data(levels=OpenSource("test", scenes=1), grading=RANKING, noise=NoisePolicy())
    with pytest.raises(DataError, match="open answers teach no confidence"):
        trainer().test(module, datamodule=queries, verbose=False)
    assert len(passes) == 3, "one for each batch of four of eleven steps"
