"""The model card of an adapter or of a merged model: what was trained, and how to use it without this package.

`card_text` is a pure function of a `Card`. The card's fields are saved beside it as `calibration.json`, from which an export
writes its own card, and which programs can read.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm_calibration.models.base import FACTS
from vlm_calibration.records import DataError
from vlm_calibration.reporting.tables import COLUMNS, column

TEXT = "README.md"
DIGEST = "readme_sha256"
EXAMPLE = "Is there a dog in the image?"
"""The question in the examples of cards."""


@dataclass(frozen=True)
class Card:
    """The facts about an adapter; only the base model must be known.

    Attributes:
        base: name on the Hub or folder of the base model.
        revision: commit or branch of the base model.
        location: where the weights are: a folder, or a name on the Hub.
        merged: whether the weights are those of the whole model, with the adapter merged in.
        trust_remote_code: whether the base model needs it.
        dtype: of the base model in training, as in `BaseModel`.
        quantization: of the base model in training, as in `BaseModel`.
        training: name -> description of the training: stage, adapter, data, noise.
        levels: answer type -> kind of perturbation, strength and the confidence in [0, 1] that was taught for it, on average.
        results: "before" and "after" training -> metrics of the validation queries, None if undefined.
        template: the prompt, with `{question}` in it.
        conversation: the prompt with `EXAMPLE`, as the chat template formats it.
        has_chat_template: whether the processor has a chat template; PaliGemma's processor formats the prompt itself.
        max_new_tokens: length limit of an answer.
        max_pixels: limit of an image's pixels in training, as in `data.max_pixels`; the saved processor has it too.
    """

    base: str
    revision: str | None = None
    location: str = "."
    merged: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    quantization: str = "none"
    training: dict[str, str] = field(default_factory=dict)
    levels: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    template: str | None = None
    conversation: str | None = None
    has_chat_template: bool = True
    max_new_tokens: int = 64
    max_pixels: int | None = None


def save_card(folder: Path, card: Card) -> None:
    """Write `README.md` and `calibration.json`."""
    text = card_text(card)
    (folder / TEXT).write_text(text, encoding="utf-8")
    facts = json.dumps({**asdict(card), DIGEST: _digest(text)}, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / FACTS).write_text(facts + "\n", encoding="utf-8")


def load_card(folder: Path) -> Card | None:
    """Read the card that `save_card` wrote; None if there is none.

    Raises:
        DataError: the file is not what `save_card` writes.
    """
    return None if (facts := _read_facts(folder)) is None else facts[0]


def is_edited(folder: Path) -> bool:
    """Whether `README.md` differs from what `save_card` wrote; raises as `load_card` does."""
    text = folder / TEXT
    if not text.is_file():
        return False
    facts = _read_facts(folder)
    return facts is None or _digest(text.read_text(encoding="utf-8")) != facts[1]


def _read_facts(folder: Path) -> tuple[Card, str] | None:
    """The card in `calibration.json`, and the digest of its text."""
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        facts = dict(json.loads(path.read_text(encoding="utf-8")))
        digest = facts.pop(DIGEST, "")
        levels, steps = facts.pop("levels", {}), facts.pop("steps", None)
        read = {
            answer_type: [_read_level(row, steps) for row in rows] for answer_type, rows in levels.items()
        }
        return Card(levels=read, **facts), digest
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the facts of a model card: {error}") from error


def _read_level(row: list[Any], steps: int | None) -> tuple[str, float, float]:
    """One of `Card.levels`; cards of older adapters have pairs of a noise step, of `steps` in all, and a confidence."""
    if steps is not None:
        step, confidence = row
        return ("noise" if step else "", step / steps, confidence)
    kind, strength, confidence = row
    return kind, strength, confidence


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def card_text(card: Card) -> str:
    """Render the card as Markdown, with the Hub's metadata in front."""
    sections = [
        _head(card),
        _usage(card),
        _prompt(card) if card.template else "",
        _answer_format(card) if card.template else "",
        _levels(card) if card.levels else "",
        _results(card) if card.results else "",
        _training(card) if card.training else "",
    ]
    return f"---\n{_metadata(card)}---\n\n" + "\n\n".join(s for s in sections if s) + "\n"


def _metadata(card: Card) -> str:
    data: dict[str, Any] = {
        "base_model": card.base,
        "base_model_relation": "finetune" if card.merged else "adapter",
        "base_model_revision": card.revision,
        "library_name": "transformers" if card.merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": [
            *("vlm-calibration", "calibration", "verbalized-confidence", "arxiv:2504.14848"),
            *([] if card.merged else ["lora"]),
        ],
    }
    defined = {name: value for name, value in data.items() if value is not None}
    return yaml.safe_dump(defined, sort_keys=False, allow_unicode=True)


def _head(card: Card) -> str:
    what = "with a LoRA adapter merged into it," if card.merged else "with a LoRA adapter,"
    revision = f" (revision {_code(card.revision)})" if card.revision else ""
    lines = [
        f"# {card.base.rstrip('/').rsplit('/', 1)[-1]}, calibrated",
        "",
        f"{_code(card.base)}{revision} {what} fine-tuned so that the confidence it states is the probability that its "
        "answer about an image is right (semantic perturbation, "
        "[arXiv 2504.14848](https://arxiv.org/abs/2504.14848)).",
    ]
    if card.quantization != "none":
        note = f"The base model was quantised ({card.quantization}) in training"
        what = "merged into" if card.merged else "loaded below on"
        lines += [
            "",
            f"{note}; here the adapter is {what} the base in full precision, whose answers may differ slightly.",
        ]
    return "\n".join(lines)


def _usage(card: Card) -> str:
    needs = "transformers" if card.merged else "transformers and peft"
    what = "model" if card.merged else "adapter"
    return "\n\n".join(
        [
            "## How to ask it",
            f"With {needs} alone; `path` is the folder of this {what} or its name on the Hub.",
            _fenced(snippet(card), "python"),
        ]
    )


def snippet(card: Card) -> str:
    """A program that loads the model, asks it about `image.png`, and prints the answer and its stated confidence."""
    remote = ["trust_remote_code=True"] if card.trust_remote_code else []
    base = [repr(card.base), *([f"revision={card.revision!r}"] if card.revision else [])]
    arguments = ", ".join([*(["path"] if card.merged else base), *remote, 'dtype="auto"'])
    prompt = f"{card.template!r}.format(question=question)" if card.template else "question"
    lines = [
        *([] if card.merged else ["from peft import PeftModel"]),
        "from PIL import Image",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f"path = {card.location!r}",
        f"model = AutoModelForImageTextToText.from_pretrained({arguments})",
        *([] if card.merged else ["model = PeftModel.from_pretrained(model, path).eval()"]),
        f"processor = AutoProcessor.from_pretrained({', '.join(['path', *remote])})",
        "",
        f'image, question = Image.open("image.png").convert("RGB"), {EXAMPLE!r}',
        f"prompt = {prompt}",
        *_input_lines(card),
        "inputs = inputs.to(model.device, model.dtype)",
        f"output = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens={card.max_new_tokens})",
        'reply = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
        "",
        'answer, *stated = reply.rsplit("Confidence:", 1)',
        'confidence = float(stated[0].split("%")[0]) / 100 if stated else None',
        "print(answer.strip(), confidence)",
    ]
    return "\n".join(lines)


def _input_lines(card: Card) -> list[str]:
    """The lines that build `inputs` from `image` and `prompt`."""
    if not card.has_chat_template:
        return ['inputs = processor(text=processor.image_token + prompt, images=image, return_tensors="pt")']
    return [
        'content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]',
        'chat = [{"role": "user", "content": content}]',
        'form = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}',
        "inputs = processor.apply_chat_template(chat, add_generation_prompt=True, **form)",
    ]


def _prompt(card: Card) -> str:
    parts = [
        "## The prompt",
        "Use exactly this prompt, with the question in place of `{question}`; the model was trained with no other.",
        _fenced(card.template or ""),
    ]
    if card.conversation:
        parts += [f"The model reads {EXAMPLE!r} as", _fenced(card.conversation)]
    return "\n\n".join(parts)


def _answer_format(card: Card) -> str:
    return "\n\n".join(
        [
            "## How to read the answer",
            "The model replies as in `Yes. Confidence: 80%`. The confidence is the number behind `Confidence:`, in percent; "
            "the text before it is the answer. A reply without that word states no confidence: treat it as missing, and do "
            "not replace it by a number.",
        ]
    )


def _levels(card: Card) -> str:
    by_kind: dict[str, dict[float, dict[str, float]]] = {}
    for answer_type, levels in card.levels.items():
        for kind, strength, confidence in levels:
            by_kind.setdefault(kind, {}).setdefault(strength, {})[answer_type] = confidence
    untouched = by_kind.pop("", {})
    width = max((len(strengths) for strengths in by_kind.values()), default=0) + len(untouched)
    rows = []
    for kind, strengths in by_kind.items():
        columns = {**untouched, **strengths}
        empty = [""] * (width - len(columns))
        rows.append([kind.replace("_", " "), "strength", *(f"{s:g}" for s in columns), *empty])
        rows += [
            ["", answer_type, *(_percent(c.get(answer_type)) for c in columns.values()), *empty]
            for answer_type in card.levels
        ]
    return "\n\n".join(
        [
            "## What it was taught",
            *([_code(settings)] if (settings := _level_settings(card)) else []),
            "The confidence that the model should state when the key object is perturbed, on average over images: for each kind of "
            "perturbation its strengths and, by type of answer, the confidence at each. Strength 0 is the untouched image; at "
            "strength 1 nothing of the object is left.",
            _table(["perturbation", "", *[""] * width], rows),
        ]
    )


def _percent(confidence: float | None) -> str:
    return "-" if confidence is None else format(confidence, ".0%")


def _level_settings(card: Card) -> str:
    return ", ".join(card.training[name] for name in ("levels", "schedule") if name in card.training)


def _results(card: Card) -> str:
    n = next(iter(card.results.values())).get("n")
    rows = [
        [f"{name} training", *(_cell(values.get(metric), column(metric)[1]) for metric in COLUMNS)]
        for name, values in card.results.items()
    ]
    return "\n\n".join(
        [
            "## Results",
            f"On {'the' if n is None else f'{n:g}'} validation queries, perturbed as in training. Calibration (ECE to "
            "overconfidence) is over the answers whose confidence could be parsed, accuracy over all.",
            _table(["", *(column(name)[0] for name in COLUMNS)], rows),
        ]
    )


def _training(card: Card) -> str:
    lines = [f"{name}: {value}" for name, value in card.training.items()]
    return "\n\n".join(["## Training", _fenced("\n".join(lines))])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    """Inline code, also for text with backticks."""
    ticks = "`" * (_longest_ticks(text) + 1)
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(text: str, language: str = "text") -> str:
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
