"""The arithmetic of the benchmarks' scripts, reimplemented from their descriptions and independent of the package.

The input is decoded JSON, as in the scripts. A division by zero fails, as in the scripts.
"""

from __future__ import annotations

from typing import Any


def pope(labels: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, float]:
    """`evaluate.py` of POPE; answer i belongs to label i.

    Raises:
        ZeroDivisionError: as the script does.
    """
    said, truth = [], []
    for answer, label in zip(answers, labels, strict=True):
        text = answer["answer"]
        if "." in text:
            text = text[: text.index(".")]
        tokens = "".join(c for c in text if c != ",").split(" ")
        said.append(0 if any(token in tokens for token in ("No", "not", "no")) else 1)
        truth.append(0 if label["label"] == "no" else 1)
    pairs = list(zip(said, truth, strict=True))
    tp, fp, tn, fn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 0), (0, 1)))
    precision = tp / (tp + fp)
    recall = tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": sum(said) / len(said),
    }


def amber(annotations: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, float]:
    """`inference.py` of AMBER, discriminative task: annotation i has the id i + 1."""
    short = {
        "discriminative-attribute-state": "state",
        "discriminative-attribute-number": "number",
        "discriminative-attribute-action": "action",
        "discriminative-hallucination": "existence",
    }
    names = ("all", "state", "number", "action", "existence", "relation")
    score = {name: {"right": 0, "no": 0, "ans_no": 0} for name in names}
    count = {name: {"right": 0.001, "no": 0.001, "ans_no": 0.001} for name in names}
    for answer in answers:
        record = annotations[answer["id"] - 1]
        response, truth = answer["response"], record["truth"]
        for name in ("all", short.get(record["type"], "relation")):
            count[name]["right"] += 1
            if truth != "yes":
                count[name]["no"] += 1
            if response == "No":
                count[name]["ans_no"] += 1
            if (truth, response) == ("yes", "Yes"):
                score[name]["right"] += 1
            if (truth, response) == ("no", "No"):
                for what in score[name]:
                    score[name][what] += 1
    blocks = {"": ("all",), **{n: (n,) for n in names[1:]}, "attribute": ("state", "number", "action")}
    scores = {}
    for block, parts in blocks.items():
        values = []
        for what in ("right", "ans_no", "no"):
            below = count[parts[0]][what]
            for part in parts[1:]:
                below = below + count[part][what]
            values.append(round(sum(score[part][what] for part in parts) / below * 100, 1))
        accuracy, precision, recall = values
        extra = 0.001 if block == "existence" else 0.0001
        p, r = precision / 100, recall / 100
        f1 = round(2 * p * r / (p + r + extra) * 100, 1)
        named = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}
        scores |= {f"{block}/{key}" if block else key: value for key, value in named.items()}
    return scores
