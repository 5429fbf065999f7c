r"""A base model for pictures and questions of somebody else: `python -m tests.performance.easy_vqa --out runs/easy`.

The data are those of the package `easy-vqa` 1.0 (PyPI, MIT): 5,000 pictures of one shape on a plain ground, and questions in 107 wordings,
negations among them. The script writes folders of JSON lines: `base`, on which the demo's model is fine-tuned to answer, and to state 100%
whatever it answers, as it was trained itself (`tests/demo/recipe.py`: several questions in a row); `data`, about other pictures, which
`own_data.py` calibrates; and `shifted`, the same with one half of the wordings to calibrate and the other half to test.

    pip install easy-vqa                              # the extra `dev` has it
    python -m tests.performance.easy_vqa --out runs/easy
    python -m tests.performance.own_data runs/easy/data --model runs/easy/model.yaml --out runs/easy/calibrated \
      --dpo.model.init_args.optimizer.lr 1.0e-3 --dpo.trainer.max_steps 300

The demo's tokenizer gets the words of the questions, as the tokenizer of a large model has them. Questions of a wording are drawn so that as
many answers are yes as no. The base model does not learn these from the image: after 51,000 questions it answers half of them correctly, as
their wording alone allows, which the last table shows, and `levels fit` refuses to teach such answers a confidence. So `data` and `shifted` hold
the other questions, about colour and form.
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

BASE_TEST_IMAGES, BASE_IMAGES = 100, 2000
"""The first pictures of the training split, on which the base model is tested and fine-tuned; all others are for calibration."""
STEPS = 400
NAMED = {
    "colour": ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"],
    "form": ["circle", "rectangle", "triangle"],
}
PICTURE = 64
"""Pixels of a side of a picture."""
DECISIVE = {*NAMED["colour"], *NAMED["form"], "color", "not", "no"}
"""Words of which the last one in a question decides what is asked; "shape" in one without any."""


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


def write_data(out: Path) -> None:
    """Write `base/{train,test}.jsonl`, `data/queries.jsonl` and the files of its split, and those of `shifted`, with the pictures beside them."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise SystemExit("the package easy-vqa is missing: pip install easy-vqa")
    folder = Path(spec.origin).parent / "data"
    train, test = list(records(folder, "train")), list(records(folder, "test"))
    base = balanced([row for picture, row in train if BASE_TEST_IMAGES <= picture < BASE_IMAGES])
    validation = balanced([row for picture, row in train if picture < BASE_TEST_IMAGES])
    own = [row for picture, row in train if picture >= BASE_IMAGES] + [row for _, row in test]
    own = [row for row in own if row["answer_type"] == "short"]
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
    """Packs questions about one picture; a scene is the list of its records."""

    def question(self, scene: Any, kind: int, rng: np.random.Generator) -> tuple[str, str, str]:
        row = scene[int(rng.integers(len(scene)))]
        *_, decisive = ("shape", *(w for w in row["question"].rstrip("?").split() if w in DECISIVE))
        return self.prompt.render(row["question"]), render_response(row["answer"], 1.0), decisive


def patch_labels(rows: Sequence[dict[str, Any]]) -> Tensor:
    """Int64 [2, IMAGE_TOKENS], the colour and the form that cover each patch of a picture; IGNORE outside, and where no question asks."""
    side = int(IMAGE_TOKENS**0.5)
    centres = (np.arange(side) + 0.5) * PICTURE / side
    left, top, right, bottom = rows[0]["regions"][0]["box"]
    covered = np.outer((top <= centres) & (centres <= bottom), (left <= centres) & (centres <= right)).ravel()
    answers = {row["category"]: row["answer"].lower() for row in rows}
    known = [[words.index(answers[kind])] if kind in answers else [IGNORE] for kind, words in NAMED.items()]
    return torch.from_numpy(np.where(covered, np.array(known), IGNORE))


def train_base(out: Path, steps: int) -> None:
    """Train all parts of the model in `start` to answer, and to state 100%, and write it to `base_model`."""
    chat = LlavaProcessor.from_pretrained(out / "start")
    model = LlavaForConditionalGeneration.from_pretrained(out / "start")
    pictures: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(out / "base/train.jsonl"):
        pictures[row["image"]].append(row)
    images = [Image.open(out / "base" / name).convert("RGB") for name in pictures]
    pixels = chat.image_processor(images=images, return_tensors="pt")["pixel_values"]
    packer, rng = PicturePacker(chat, ElicitationPrompt()), np.random.default_rng(0)
    scenes = [*pictures.values()]
    embeddings = model.get_input_embeddings().weight
    words = [torch.tensor([chat.tokenizer(w)["input_ids"][0] for w in kind]) for kind in NAMED.values()]
    labels = torch.stack([patch_labels(rows) for rows in scenes])  # int64 [N, 2, IMAGE_TOKENS]

    def results() -> Steps:
        for step in range(steps):
            chosen = rng.integers(len(scenes), size=16)
            packed = packer.pack([scenes[i] for i in chosen], rng)
            features = image_features(model, pixels[chosen])
            loss, accuracy = packer.loss(model, features, packed, max(0.0, 1.0 - 1.4 * step / steps))
            # As in stage 1 of the recipe: without it the model does not learn forms in these steps.
            scores = FEATURE_SCALE * features @ embeddings.T
            for kind, of_kind in zip(words, labels[chosen].unbind(1), strict=True):
                scored = scores[..., kind].flatten(0, 1)
                loss = loss + F.cross_entropy(scored, of_kind.flatten(), ignore_index=IGNORE)
            yield loss, accuracy

    model.train()
    train("base", model, model.parameters(), 1e-3, steps, results())
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
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the base model")
    args = parser.parse_args(arguments)
    write_data(args.out)
    write_start(args.out)
    train_base(args.out, args.steps)
    write_model(args.out)
    show_base(args.out)


if __name__ == "__main__":
    main()
