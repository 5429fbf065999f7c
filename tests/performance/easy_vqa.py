r"""A base model for pictures and questions of somebody else: `python -m tests.performance.easy_vqa --out runs/easy`.

The data are those of the package `easy-vqa` 1.0 (PyPI, MIT): 5,000 pictures of one shape on a plain ground, and questions in 107 wordings,
negations among them. The script writes folders of JSON lines: `base`, on which the demo's model is fine-tuned to answer, and to state 100%
whatever it answers, by `vlm-calibration fit` and `export --merge`; `data`, about other pictures, which `own_data.py` calibrates; and `shifted`,
the same with one half of the wordings to calibrate and the other half to test.

    pip install easy-vqa                              # the extra `dev` has it
    python -m tests.performance.easy_vqa --out runs/easy
    python -m tests.performance.own_data runs/easy/data --model runs/easy/model.yaml --out runs/easy/calibrated \
      --dpo.model.init_args.optimizer.lr 1.0e-3 --dpo.trainer.max_steps 300

Questions of a wording are drawn so that as many answers are yes as no: else a base model answers from the wording alone. The demo's tokenizer
gets the words of the questions, as the tokenizer of a large model has them.
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
from tokenizers import Tokenizer
from transformers import LlavaForConditionalGeneration

from vlm_calibration.files import read_json, write_json, write_rows
from vlm_calibration.models.base import DEMO_MODEL

VALIDATION_IMAGES, BASE_IMAGES = 100, 2000
"""The first pictures of the training split, on which the base model is validated and fine-tuned; all others are for calibration."""
STEPS = 800


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
    """Write `base/{train,validation}.jsonl`, `data/queries.jsonl` and the files of its split, and those of `shifted`, with the pictures beside them.

    `share`, in (0, 1], of the pictures is used.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise SystemExit("the package easy-vqa is missing: pip install easy-vqa")
    folder = Path(spec.origin).parent / "data"
    train, test = (
        [r for r in records(folder, split) if r[0] % 1000 < 1000 * share] for split in ("train", "test")
    )
    base = balanced([row for picture, row in train if VALIDATION_IMAGES <= picture < BASE_IMAGES])
    validation = balanced([row for picture, row in train if picture < VALIDATION_IMAGES])
    own = balanced([row for picture, row in train if picture >= BASE_IMAGES] + [row for _, row in test])
    for name in ("base", "data", "shifted"):
        for split in ("train", "test"):
            shutil.copytree(folder / split / "images", out / name / split / "images", dirs_exist_ok=True)
    write_rows(out / "base/train.jsonl", base, lines=True)
    write_rows(out / "base/validation.jsonl", validation, lines=True)
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


def train_base(out: Path, steps: int) -> None:
    """Fine-tune the demo's model to answer and to state 100%, and merge the adapter into `base_model`; `model.yaml` names it."""
    source = "vlm_calibration.data.sources.jsonl.JsonlSource"
    settings = {
        "trainer": {"max_epochs": -1, "max_steps": steps},
        "model": {
            "init_args": {
                "base": {"name_or_path": str(out / "start")},
                "lora": {"r": 64, "alpha": 128, "dropout": 0.0, "parts": ["language", "projector", "tower"]},
                "answer_weight": "constant",
                "confidence_weight": 0.1,
                "optimizer": {"lr": 1.0e-3},
            }
        },
        "data": {
            "train": {"class_path": source, "init_args": {"path": str(out / "base/train.jsonl")}},
            "validation": {"class_path": source, "init_args": {"path": str(out / "base/validation.jsonl")}},
            "noise": {
                "clean_fraction": 1.0,
                "wrong_answer_rate": 0.0,
                "levels": {"class_path": "vlm_calibration.perturbation.levels.LinearLevels"},
            },
            "batch_size": 64,
        },
    }
    path = out / "base.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    runs = str(out / "base_run")
    command(
        "fit",
        *("--config", "sft", "--config", str(path)),
        *("--trainer.default_root_dir", runs, "--overwrite"),
    )
    command("export", runs, "--merge", "--out", str(out / "base_model"), "--overwrite")


def write_model(out: Path) -> None:
    """Write `model.yaml`, the settings for a model as small as this one."""
    base = {"name_or_path": str(out / "base_model"), "dtype": "float32"}
    model = {"base": base, "optimizer": {"lr": 1.0e-3}, "max_new_tokens": 16}
    data = {"batch_size": 12, "eval_batch_size": 128, "workers": 1, "max_length": 256}
    trainer = {"max_epochs": -1, "max_steps": 600, "num_sanity_val_steps": 0}
    settings = {"trainer": trainer, "model": {"init_args": model}, "data": data}
    (out / "model.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/easy"))
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the base model")
    parser.add_argument("--share", type=float, default=1.0, help="share of the pictures to use")
    args = parser.parse_args(arguments)
    write_data(args.out, args.share)
    write_start(args.out)
    train_base(args.out, args.steps)
    write_model(args.out)


if __name__ == "__main__":
    main()
