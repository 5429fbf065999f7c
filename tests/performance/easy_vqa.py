r"""A base model for pictures and questions of somebody else: `python -m tests.performance.easy_vqa --out runs/easy`.

The data are those of the package `easy-vqa` 1.0 (PyPI, MIT): 5,000 pictures of one shape on a plain ground, and questions in 107 wordings,
negations among them. The script writes folders of JSON lines: `base`, on which the demo's model is fine-tuned to answer, and to state 100%
whatever it answers, as it was trained itself (`tests/demo/recipe.py`: several questions in a row); `data`, about other pictures, which
`own_data.py` calibrates; and `shifted`, the same with one half of the wordings to calibrate and the other half to test.

    pip install easy-vqa                              # the extra `dev` has it
    python -m tests.performance.easy_vqa --out runs/easy
    python -m tests.performance.own_data runs/easy/data --model runs/easy/model.yaml --out runs/easy/calibrated \
      --dpo.model.init_args.optimizer.lr 1.0e-3 --dpo.trainer.max_steps 300

The demo's tokenizer gets the words of the questions, as the tokenizer of a large model has them. The base model sees 300 pictures, so that it
errs on others, about one question in ten. `data` has as many questions of a wording with yes as with no. `--share 0.1` leaves a tenth of the
pictures in `data` and `shifted`; the base model is the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tests.demo.architecture import IMAGE_TOKENS
from tests.demo.recipe import FEATURE_SCALE, QuestionPacker, Steps, image_features, train
from tests.performance.machine import processor
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_calibration.files import read_json, replacing, write_json, write_rows
from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.models.base import DEMO_MODEL
from vlm_calibration.text.confidence import ElicitationPrompt, render_response

BASE_TEST_IMAGES, BASE_IMAGES = 100, 400
"""The first pictures of the training split, on which the base model is tested and fine-tuned; all others are for calibration."""
NAMED = {
    "colour": ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"],
    "form": ["circle", "rectangle", "triangle"],
}
PICTURE = 64
"""Pixels of a side of a picture."""
DECISIVE = {*NAMED["colour"], *NAMED["form"], "color", "not", "no"}


def shape_box(image: Image.Image) -> list[int]:
    """The box of what differs from the ground, the colour of the corner."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).sum(-1) > 60)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def kind_of(question: str) -> str:
    words = question.rstrip("?").split()
    if words[0] != "what":
        return "negated" if {"not", "no"} & {*words} else "affirmed"
    return "colour" if "color" in words else "form"


def records(folder: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the picture and record of each question, in order; the image is relative to `split`."""
    boxes: dict[int, list[int]] = {}
    questions = json.loads((folder / split / "questions.json").read_text())
    for number, (question, answer, picture) in enumerate(questions):
        name = f"{split}/images/{picture}.png"
        if picture not in boxes:
            with Image.open(folder / name) as image:
                boxes[picture] = shape_box(image)
        kind = kind_of(question)
        yield (
            picture,
            {
                "id": f"{split}-{number}",
                "image": name,
                "question": question.capitalize(),
                "answer": answer.capitalize(),
                "answer_type": "yes_no" if answer in ("yes", "no") else "short",
                "category": kind,
                "objects": ["shape"],
                "regions": [{"label": "shape", "box": boxes[picture]}],
            },
        )


def balanced(rows: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """As many of each wording with yes as with no, and all others, in a random order."""
    by_wording: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_wording[row["question"]][row["answer"]].append(row)
    kept: list[dict[str, Any]] = []
    for answers in by_wording.values():
        is_yes_no = answers.keys() <= {"Yes", "No"}
        n = min(len(answers["Yes"]), len(answers["No"])) if is_yes_no else None
        kept += [row for of_answer in answers.values() for row in of_answer[:n]]
    random.Random(seed).shuffle(kept)
    return kept


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_data(out: Path, share: float) -> None:
    """Write `base/{train,test}.jsonl`, `data/queries.jsonl` and the files of its split, and those of `shifted`, with the pictures beside them."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise SystemExit("the package easy-vqa is missing: pip install easy-vqa")
    folder = Path(spec.origin).parent / "data"
    train, test = list(records(folder, "train")), list(records(folder, "test"))

    def some(rows: Sequence[tuple[int, dict[str, Any]]], first: int, last: float) -> list[dict[str, Any]]:
        return [row for picture, row in rows if first <= picture < last]

    base = some(train, BASE_TEST_IMAGES, BASE_IMAGES)
    validation = balanced(some(train, 0, BASE_TEST_IMAGES))
    others = some(train, BASE_IMAGES, BASE_IMAGES + 2000 * share) + some(test, 0, 1000 * share)
    # Of each kind one question about a picture.
    own = [*{(row["image"], row["category"]): row for row in balanced(others)}.values()]
    for name in ("base", "data", "shifted"):
        for split in ("train", "test"):
            shutil.copytree(folder / split / "images", out / name / split / "images", dirs_exist_ok=True)
    write_rows(out / "base/train.jsonl", base, lines=True)
    write_rows(out / "base/test.jsonl", validation, lines=True)
    write_rows(out / "data/queries.jsonl", own, lines=True)
    command("data", "split", str(out / "data/queries.jsonl"), "--overwrite")
    wordings = sorted(
        {row["question"] for row in own}, key=lambda question: (kind_of(question.lower()), question)
    )
    for name in ("train", "validation", "calibration", "test"):
        half = {*wordings[name == "test" :: 2]}
        rows = [row for row in read_rows(out / f"data/{name}.jsonl") if row["question"] in half]
        write_rows(out / f"shifted/{name}.jsonl", rows, lines=True)


def command(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    subprocess.run([sys.executable, "-m", "vlm_calibration.cli", *arguments], env=environment, check=True)


def write_start(out: Path) -> None:
    """Write the demo's model to `start` with one token for each word of the questions and answers."""
    shutil.copytree(DEMO_MODEL, out / "start", dirs_exist_ok=True)
    state = read_json(out / "start/tokenizer.json")
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in state["added_tokens"])])
    rows = read_rows(out / "base/train.jsonl")
    for word in sorted({word for r in rows for word in (*r["question"].rstrip("?").split(), r["answer"])}):
        first, *rest = Tokenizer.from_str(json.dumps(state)).encode(word).tokens
        for piece in rest:
            merges.append([first, piece])
            first += piece
            vocabulary[first] = size
            size += 1
    write_json(out / "start/tokenizer.json", state)
    model = LlavaForConditionalGeneration.from_pretrained(DEMO_MODEL)
    known = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(size)
    # transformers gives all new tokens the mean of the others, which the frozen embeddings could not tell apart.
    new = model.get_input_embeddings().weight.data[known:]
    new.copy_(torch.randn(new.shape, generator=torch.Generator().manual_seed(0)) * new.shape[1] ** -0.5)
    model.save_pretrained(out / "start")


class PicturePacker(QuestionPacker):
    """Packs questions about one picture; a scene is the list of its records.

    Questions for yes or no are asked about every picture, whose colour and form tell the answer, so that half of the answers are yes:
    of the data set's own questions the wording alone tells two thirds of them, and a model then learns nothing else.
    """

    def __init__(
        self,
        chat: LlavaProcessor,
        prompt: ElicitationPrompt,
        rows: Sequence[dict[str, Any]],
        kinds: Sequence[str],
    ) -> None:
        super().__init__(chat, prompt)
        self.wordings: dict[str, dict[str, list[str]]] = {kind: defaultdict(list) for kind in kinds}
        for kind, question in sorted({(row["category"], row["question"]) for row in rows}):
            if kind in self.wordings:
                self.wordings[kind][decisive_word(question)].append(question)

    def question(self, scene: Any, kind: int, rng: np.random.Generator) -> tuple[str, str, str]:
        named = {row["category"]: row for row in scene if row["category"] in NAMED}
        about = str(rng.choice([*named]))
        asked = str(rng.choice([about, *self.wordings]))
        question, answer = named[about]["question"], named[about]["answer"]
        if asked != about:
            shown, holds = answer.lower(), bool(rng.integers(2))
            word = shown if holds else str(rng.choice([word for word in NAMED[about] if word != shown]))
            question = str(rng.choice(self.wordings[asked][word]))
            answer = "Yes" if holds == (asked == "affirmed") else "No"
        return self.prompt.render(question), render_response(answer, 1.0), decisive_word(question)


def decisive_word(question: str) -> str:
    """The word that decides what is asked: the last one of `DECISIVE`, and "shape" without any."""
    return ["shape", *(word for word in question.rstrip("?").split() if word in DECISIVE)][-1]


def patch_labels(rows: Sequence[dict[str, Any]]) -> Tensor:
    """Int64 [2, IMAGE_TOKENS], colour and form of the shape that covers each patch of a picture.

    The number behind the last word is the ground; IGNORE where no question asks.
    """
    side = int(IMAGE_TOKENS**0.5)
    centres = (np.arange(side) + 0.5) * PICTURE / side
    left, top, right, bottom = rows[0]["regions"][0]["box"]
    covered = np.outer((top <= centres) & (centres <= bottom), (left <= centres) & (centres <= right)).ravel()
    answers = {row["category"]: row["answer"].lower() for row in rows}
    known = [[words.index(answers[kind])] if kind in answers else [IGNORE] for kind, words in NAMED.items()]
    return torch.from_numpy(np.where(covered, np.array(known), [[len(words)] for words in NAMED.values()]))


def train_base(out: Path, patch_steps: int = 250, steps: int = 600) -> None:
    """Train the model in `start` to answer, and to state 100%, and write it to `base_model`.

    As the recipe does: first features of patches that resemble the words for what covers them, then the language model on these features.
    """
    chat = LlavaProcessor.from_pretrained(out / "start")
    model = LlavaForConditionalGeneration.from_pretrained(out / "start")
    pictures: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rows = read_rows(out / "base/train.jsonl")
    named = {row["image"] for row in rows if row["category"] in NAMED}
    for row in rows:
        if row["image"] in named:
            pictures[row["image"]].append(row)
    scenes, rng = [*pictures.values()], np.random.default_rng(0)
    images = [Image.open(out / "base" / name).convert("RGB") for name in pictures]
    pixels = chat.image_processor(images=images, return_tensors="pt")["pixel_values"]
    labels = torch.stack([patch_labels(rows) for rows in scenes])  # int64 [N, 2, IMAGE_TOKENS]
    embeddings = model.get_input_embeddings().weight
    ground = chat.tokenizer.convert_tokens_to_ids(chat.image_token)
    words = [
        torch.tensor([*(chat.tokenizer(w)["input_ids"][0] for w in kind), ground]) for kind in NAMED.values()
    ]

    def of_patches() -> Steps:
        for _ in range(patch_steps):
            chosen = rng.integers(len(scenes), size=32)
            scores, loss, correct = (
                FEATURE_SCALE * image_features(model, pixels[chosen]) @ embeddings.T,
                0.0,
                [],
            )
            for kind, of_kind in zip(words, labels[chosen].unbind(1), strict=True):
                weights = torch.ones(len(kind))
                weights[-1] = 0.1
                logits, target = scores[..., kind].flatten(0, 1), of_kind.flatten()
                loss = loss + F.cross_entropy(logits, target, weights, ignore_index=IGNORE)
                correct.append((logits.argmax(-1) == target)[(target != IGNORE) & (target < len(kind) - 1)])
            yield loss, torch.cat(correct).float().mean()

    def of_questions() -> Steps:
        for step in range(steps):
            chosen = rng.integers(len(scenes), size=16)
            packer = first if step < steps // 2 else full
            packed = packer.pack([scenes[i] for i in chosen], rng)
            yield packer.loss(model, features[chosen], packed, max(0.0, 1.0 - 1.4 * step / steps))

    model.train()
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    seeing = [*(p for part in parts for p in part.parameters()), embeddings]
    train("patches", model, seeing, 2e-3, patch_steps, of_patches())
    with torch.no_grad():
        features = torch.cat([image_features(model, some) for some in pixels.split(64)])
    first = PicturePacker(chat, ElicitationPrompt("{question}"), rows, ["affirmed"])
    full = PicturePacker(chat, ElicitationPrompt(), rows, ["negated", "affirmed"])
    train("language", model, model.model.language_model.parameters(), 1e-3, steps, of_questions())
    with replacing(out / "base_model") as temporary:
        model.save_pretrained(temporary)
        chat.save_pretrained(temporary)


def write_model(out: Path) -> None:
    """Write `model.yaml`, the settings for a model as small as this one."""
    base = {"name_or_path": str(out / "base_model"), "dtype": "float32"}
    model = {"base": base, "optimizer": {"lr": 1.0e-3}, "max_new_tokens": 16}
    data = {"batch_size": 12, "eval_batch_size": 128, "workers": 1, "max_length": 256}
    trainer = {"max_epochs": -1, "max_steps": 600, "num_sanity_val_steps": 0}
    settings = {"trainer": trainer, "model": {"init_args": model}, "data": data}
    (out / "model.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def show_base(out: Path) -> None:
    """Print how many questions of each kind the base model answers correctly, on pictures that it was not trained on."""
    without = [f"--model.init_args.{name}" for name in ("adapters", "estimators", "probes")]
    command(
        *("test", "--config", "eval/jsonl", "--config", str(out / "model.yaml"), "--overwrite"),
        *("--data-root", str(out / "base"), "--runs", str(out / "base_run"), "--data.calibration", "null"),
        *(without[0], "{}", without[1], "[]", without[2], "[]"),
    )
    metrics = read_json(out / "base_run/eval/base/metrics.json")
    print(f"{processor()}\n\n| base model | questions | accuracy |\n|---|---|---|")
    for kind in ("colour", "form", "affirmed", "negated"):
        print(f"| {kind} | {metrics[f'n/{kind}']} | {metrics[f'accuracy/{kind}']:.3f} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/easy"))
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the pictures to calibrate on and to test"
    )
    args = parser.parse_args(arguments)
    write_data(args.out, args.share)
    write_start(args.out)
    train_base(args.out)
    write_model(args.out)
    show_base(args.out)


if __name__ == "__main__":
    main()
