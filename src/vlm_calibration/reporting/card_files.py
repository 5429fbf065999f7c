"""The files of a model card: its text `README.md`, and its fields `calibration.json`.

An export writes its own card from the fields, and programs can read them. A text that someone has edited is not replaced.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from vlm_calibration.files import first_line, write_text
from vlm_calibration.models.base import FACTS
from vlm_calibration.records import DataError
from vlm_calibration.reporting.card import (
    BEGIN,
    END,
    Card,
    card_metadata,
    card_text,
    has_results,
    results_of_tests,
)
from vlm_calibration.reporting.evaluation import Evaluation

TEXT = "README.md"
DIGEST = "readme_sha256"


def save_card(folder: Path, card: Card) -> None:
    """Write `README.md` and `calibration.json`."""
    text = card_text(card)
    write_text(folder / TEXT, text)
    _write_facts(folder, card, _digest(text))


def _write_facts(folder: Path, card: Card, digest: str) -> None:
    facts = json.dumps({**asdict(card), DIGEST: digest}, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / FACTS, facts + "\n")


def renew_card(folder: Path, card: Card, license: dict[str, Any]) -> None:
    """Write a card, or if someone has edited its `README.md` put results, guarantee and licence into that (`update_card`)."""
    if is_edited(folder):
        update_card(folder, card, license)
    else:
        save_card(folder, card)


def state_guarantee(folder: Path, guarantee: str) -> None:
    """State in an adapter's card what the thresholds beside it promise; without a card of ours nothing is written.

    Raises:
        DataError: the card cannot be read or written.
    """
    card = load_card(folder)
    if card is not None:
        renew_card(folder, replace(card, guarantee=guarantee), {})


def update_card(folder: Path, card: Card, license: dict[str, Any]) -> None:
    """Put a card's results, guarantee and a licence into a `README.md` that someone has edited; all other text stays.

    Results and guarantee replace what stands between the lines `BEGIN` and `END`; without these lines they are appended.

    Args:
        folder: has the `README.md`, and the `calibration.json` of `save_card` if there was one.
        card: its results and guarantee are those of the adapter in the folder.
        license: metadata of the licence to state instead; empty for what the text states.

    Raises:
        DataError: the metadata at the head of the text cannot be read.
    """
    path, facts = folder / TEXT, _read_facts(folder)
    states_results = has_results(card) or (facts is not None and has_results(facts[0]))
    if not states_results and not license:
        return
    try:
        edited = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: the metadata cannot be read: {first_line(error)}") from error
    for name, value in license.items():
        edited.data[name] = value
    if states_results:
        metadata = card_metadata(card)
        edited.data["model_name"], edited.data["eval_results"] = metadata.model_name, metadata.eval_results
        edited.text = _with_results(edited.text, results_of_tests(card) if has_results(card) else "")
    write_text(path, str(edited))
    if facts is not None:
        # The digest stays that of the text before it was edited.
        _write_facts(folder, card, facts[1])


def _with_results(text: str, results: str) -> str:
    """The text with `results` in place of those that it has, or at its end."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{results}{after}"
    return f"{text.rstrip()}\n\n{results}\n" if results else text


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
        evaluations = [Evaluation(**evaluation) for evaluation in facts.pop("evaluations", [])]
        return Card(levels=read, evaluations=evaluations, **facts), digest
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
