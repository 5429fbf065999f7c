"""Ranking measures the levels of open answers with a rejected alternative; what is generated is graded by one rule in all stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import LEVELS, DataNeeds, PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.demo.scenes import CLASSES
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.base import grade_answers
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, LinearLevels, Perturbation
from vlm_calibration.records import DataError, LoadedImage, Query
from vlm_calibration.stages.level_fit import LevelFitModule, rank_answers
from vlm_calibration.text.confidence import render_answer
from vlm_calibration.text.grading import Grading

from .conftest import Data, LoadModel, MakeTrainer

RANKING = Grading(rank_levels=True)


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


def test_the_likelier_answer_per_token_wins(load_model: LoadModel, data: Data, samples: list[Sample]) -> None:
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
    load_model: LoadModel, data: Data, samples: list[Sample]
) -> None:
    model, chat = load_model().eval(), data().chat
    collate, names = PromptCollator(chat, RANKING, ranks=True), ("cat", "dog", "Two red cats.")
    for gold in names:
        others = [name for name in names if name != gold]
        alone = [rank_answers(model, collate([_open(samples[0], gold, other)]))[0] for other in others]
        assert rank_answers(model, collate([_open(samples[0], gold, *others)])) == [all(alone)]
    for chosen, ranks in ((samples, False), (samples[1:2], True)):
        batch = PromptCollator(chat, RANKING, ranks=ranks)(chosen)
        assert batch.ranked == ()
        assert rank_answers(model, batch) == [None] * len(chosen), "other stages and queries rank nothing"


@pytest.mark.parametrize(("rule", "correct"), [("exact", False), ("contains", True)])
def test_one_setting_grades_validation_and_evaluation(data: Data, rule: Any, correct: bool) -> None:
    source = DemoSource("test", scenes=1)
    module = data(validation=source, test={"": EvalSplit(source)}, grading=Grading(short=rule))
    module.setup("fit")
    module.setup("test")
    [validated], [tested] = module.val_dataloader(), module.test_dataloader()
    for batch in (validated.prompts, tested):
        queries = tuple(replace(q, answer="dog", answer_type="short") for q in batch.queries)
        texts = ["A big brown dog lies there. Confidence: 80%"] * 3
        assert [p.correct for p in grade_answers(batch._replace(queries=queries), texts)] == [correct] * 3


class OpenSource(DemoSource):
    """The demo's corner questions as open ones with a wrong answer, which only scene 1 lacks."""

    def queries(self) -> list[Query]:
        return [replace(q, answer_type="open") for q in super().queries() if q.answer_type == "short"]

    def load(self, query: Query) -> LoadedImage:
        return super().load(replace(query, answer_type="short"))

    def wrong_answers(self, query: Query) -> list[str]:
        answers = DemoSource.wrong_answers(self, replace(query, answer_type="short"))
        return [] if query.image.endswith("000001") else list(answers)[:1]


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


def test_ranking_measures_levels_without_generation(
    demo_folder: str, trainer: MakeTrainer, tmp_path: Path
) -> None:
    passes: list[int] = []
    path = tmp_path / "levels.json"
    module = LevelFitModule(BaseModel(demo_folder, dtype="float32"), str(path))
    module.configure_model()
    unwrap_peft(module.model).get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    queries = PerturbedQueryDataModule(
        demo_folder,
        levels=OpenSource("calibration", scenes=24, first=500),
        grading=RANKING,
        noise=NoisePolicy(levels=LinearLevels(n_levels=3), distractor_probability=0.0),
        eval_batch_size=24,
        workers=0,
    )
    trainer().test(module, datamodule=queries, verbose=False)
    assert len(passes) == 3, "one for each batch of 24 of three levels"
    table = AnchoredLevels(path)
    assert table.table.provenance["grading"] == {"open": "ranking"}
    assert table.accuracy(CLEAN, "open") >= 0.9
    assert 0.2 <= table.accuracy(Perturbation("noise", 1.0), "open") <= 0.7, "two answers to choose between"
