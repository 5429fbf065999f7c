"""What hidden states say of the correctness of answers, beside what the model states: a bound of what stage 2 can teach on the demo.

Run with `python -m tests.performance.ceiling --adapter runs/sft/adapter`; without `--adapter` the base model answers. Small networks
predict from the hidden states of a layer at a position whether the model's own answer is correct. They are fitted on answers to
calibration scenes that nothing else asks about, and scored on development scenes. A token that states the confidence attends to what
is below the last layer; the last layer's output, of which the likelihood is made, no later token attends to.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tests.performance.machine import processor

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.presets import DEMO
from vlm_calibration.stages.evaluation import EvaluationModule

NOISE = NoisePolicy(kinds={"noise": 1.0, "blur": 1.0, "occlusion": 1.0})
FIRST = 30_000
"""The first of the calibration scenes that the networks are fitted on."""
POSITIONS = ("end of the prompt", "end of the answer", "mean of the image")
CONFIDENCES = ("stated", "expected", "likelihood")


class Answers(NamedTuple):
    """N answers.

    Attributes:
        states: float32 [N, 3, L + 1, D], hidden states at `POSITIONS`, of the embeddings and of L layers.
        correct: bool [N].
        confidences: float64 [N, 3], `CONFIDENCES`.
    """

    states: np.ndarray
    correct: np.ndarray
    confidences: np.ndarray


class Recorder(Estimator):
    """Keeps hidden states and confidences of the answers that state one."""

    name = "recorded"

    def __init__(self) -> None:
        self.rows: list[tuple[np.ndarray, bool, list[float]]] = []

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        others = [e.estimate(answered).confidence for e in (ExpectedConfidence(), AnswerLikelihood())]
        for row, prediction in enumerate(answered.predictions):
            confidences = [prediction.confidence, *(column[row] for column in others)]
            if None not in confidences:
                self.rows.append((hidden_states(answered, row), prediction.correct, confidences))
        return Estimate([None] * len(answered.predictions), [1] * len(answered.predictions))


def hidden_states(answered: AnsweredBatch, row: int) -> np.ndarray:
    """Float32 [3, L + 1, D] of one answer, behind its prompt and without a confidence."""
    prompts, answer = answered.prompts, answered.scored_answers.answers[row]
    start = int(prompts.lengths[row]) - answer.cut
    tokens = answer.tokens[0][: answer.offset + answer.candidates[0].answer_length]
    ids = torch.cat([prompts.inputs["input_ids"][row, :start], torch.tensor(tokens)])[None]
    states = answered.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompts.inputs["pixel_values"][row : row + 1],
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    layers = torch.stack(states)[:, 0]
    image = layers[:, ids[0] == answered.chat.processor.image_token_id].mean(1)
    return torch.stack([layers[:, start - 1], layers[:, -1], image]).numpy()


def answer(adapter: str | None, source: DemoSource) -> Answers:
    """The answers of the demo's model, or of an adapter of it, to perturbed images."""
    recorder = Recorder()
    module = EvaluationModule(
        BaseModel(f"{DEMO}/model", dtype="float32"),
        adapters={"adapter": adapter} if adapter else None,
        with_base=adapter is None,
        max_new_tokens=16,
        estimators=[recorder],
    )
    data = PerturbedQueryDataModule(
        processor=f"{DEMO}/model",
        test={"all": EvalSplit(source, noise="drawn")},
        noise=NOISE,
        eval_batch_size=128,
        workers=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.test(module, data, verbose=False)
    states, correct, confidences = zip(*recorder.rows, strict=True)
    return Answers(np.stack(states), np.array(correct), np.array(confidences))


def score(
    fitted: np.ndarray, given: np.ndarray, fit: Answers, scored: Answers, seed: int
) -> tuple[float, float]:
    """AUROC and Brier score of a network of 64 units on N x F features, chosen by early stopping."""
    network = MLPClassifier(
        (64,), alpha=1e-2, early_stopping=True, n_iter_no_change=20, max_iter=300, random_state=seed
    )
    model = make_pipeline(StandardScaler(), network).fit(fitted, fit.correct)
    p = model.predict_proba(given)[:, 1]
    return float(roc_auc_score(scored.correct, p)), float(brier_score_loss(scored.correct, p))


def logit(confidences: np.ndarray) -> np.ndarray:
    p = confidences.clip(1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", help="folder of an adapter; default: the base model")
    parser.add_argument(
        "--fitted", type=int, default=3000, help="scenes that networks are fitted on, three answers each"
    )
    parser.add_argument("--scored", type=int, default=1000, help="development scenes")
    parser.add_argument("--seeds", type=int, default=3, help="networks for each row")
    args = parser.parse_args()
    fit = answer(args.adapter, DemoSource("calibration", args.fitted, FIRST, hard=0.3))
    scored = answer(args.adapter, DemoSource("development", args.scored, hard=0.3))
    print(f"{len(fit.correct)} answers to fit on, {len(scored.correct)} to score; {processor()}\n")
    print("| what is read | AUROC | Brier |\n|---|---|---|")
    for column, name in enumerate(CONFIDENCES):
        p = scored.confidences[:, column]
        auroc, brier = roc_auc_score(scored.correct, p), brier_score_loss(scored.correct, p)
        print(f"| {name} | {auroc:.3f} | {brier:.3f} |")
    teacher = LogisticRegression(C=1e6).fit(logit(fit.confidences[:, 1:]), fit.correct)
    p = teacher.predict_proba(logit(scored.confidences[:, 1:]))[:, 1]
    print(
        f"| logistic of likelihood and expected | {roc_auc_score(scored.correct, p):.3f} | {brier_score_loss(scored.correct, p):.3f} |"
    )
    layers = fit.states.shape[2]
    last = layers - 1
    features = {
        f"layer {layer}, {position}": (slice(k, k + 1), slice(layer, layer + 1))
        for layer, (k, position) in product(range(layers), enumerate(POSITIONS))
    }
    everywhere = slice(0, len(POSITIONS))
    features["all positions, below the last layer: what later tokens attend to"] = everywhere, slice(0, last)
    features["all positions, all layers"] = everywhere, slice(0, layers)
    for name, (positions, of_layers) in features.items():
        train, given = (a.states[:, positions, of_layers].reshape(len(a.states), -1) for a in (fit, scored))
        aurocs, briers = zip(
            *(score(train, given, fit, scored, seed) for seed in range(args.seeds)), strict=True
        )
        print(f"| {name} | {np.mean(aurocs):.3f} | {np.mean(briers):.3f} |", flush=True)


if __name__ == "__main__":
    main()
