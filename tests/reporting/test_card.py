"""The model card: valid metadata, Markdown that survives any text in it, and a program that asks every family of models as we do.

The results of an evaluation in it are read only for the adapter that was evaluated, and are valid for the Hub.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData, model_index_to_eval_results
from PIL import Image

from vlm_calibration.commands.report import report
from vlm_calibration.data.collate import ChatFormat, PromptCollator
from vlm_calibration.data.noise import Sample
from vlm_calibration.models.generation import generate
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.perturbation.levels import CLEAN
from vlm_calibration.records import DataError, Query
from vlm_calibration.reporting.card import (
    EXAMPLE,
    Card,
    Evaluation,
    card_text,
    load_card,
    results_text,
    save_card,
    state_guarantee,
)
from vlm_calibration.reporting.report.summary import read_evaluation
from vlm_calibration.reporting.runs import RunRecord
from vlm_calibration.reporting.tables import COLUMNS, heading
from vlm_calibration.text.confidence import DEFAULT_TEMPLATE, ElicitationPrompt

from ..models.families import FOUR
from ..models.processors import cached_family
from .test_report import answers, configure, write

FULL = Card(
    base="org/Model-7B", base_on_hub=True, revision="0123456789abcdef", location="runs/sft/adapter",
    training={"stage": "SFT", "levels": "LinearLevels()", "schedule": "CosineSchedule(steps=1000)"},
    levels={
        "yes_no": [("", 0.0, 0.95), ("noise", 0.5, 0.7), ("noise", 1.0, 0.5), ("motion_blur", 0.5, 0.6)],
        "short": [("", 0.0, 0.9), ("noise", 0.5, 0.45), ("noise", 1.0, 0.0)],
    },
    results={
        "before": {"n": 40.0, **dict.fromkeys(COLUMNS, 0.5)},
        "after": {"n": 40.0, **dict.fromkeys(COLUMNS, 0.25), "auroc": None},
    },
    template=DEFAULT_TEMPLATE, conversation="<|user|><image>A question?<|end|>", max_new_tokens=16,
)  # fmt: skip


def _metadata(card: Card) -> dict[str, Any]:
    _, front, _ = card_text(card).split("---\n", 2)
    return yaml.safe_load(front)


def _program(card: Card) -> str:
    match = re.search(r"^(`{3,})python\n(.*?)\n\1$", card_text(card), re.DOTALL | re.MULTILINE)
    assert match is not None
    return match[2]


def _table(text: str, heading: str) -> list[list[str]]:
    lines = [
        line for line in text.split(heading, 1)[1].split("\n## ", 1)[0].splitlines() if line.startswith("|")
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_the_metadata_is_what_the_hub_reads() -> None:
    data = _metadata(FULL)
    assert data.pop("tags") == [
        *("vlm-calibration", "calibration", "verbalized-confidence", "arxiv:2504.14848", "lora")
    ]
    assert data == {
        "base_model": "org/Model-7B",
        "base_model_relation": "adapter",
        "base_model_revision": "0123456789abcdef",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
    }
    merged = _metadata(replace(FULL, merged=True, revision=None))
    assert (merged["library_name"], merged["base_model_relation"]) == ("transformers", "finetune")
    assert "lora" not in merged["tags"]
    assert "base_model_revision" not in merged
    for name in ("a: b #c", "'quoted'", "yes", "0.1", "wörld/mödel", "a\nb"):
        read = _metadata(Card(name, base_on_hub=True, revision=name))
        assert (read["base_model"], read["base_model_revision"]) == (name, name)
        assert len(read) == 6, "a strange name stays one value"


def test_levels_and_results_are_tables() -> None:
    text = card_text(FULL)
    assert _table(text, "## What it was taught") == [
        ["perturbation", "strength", "yes_no", "short"],
        ["", "0", "95%", "90%"],
        ["noise", "0.5", "70%", "45%"],
        ["noise", "1", "50%", "0%"],
        ["motion blur", "0.5", "60%", "-"],
    ]
    rows = _table(text, "## Validation")
    assert rows[0] == ["", *(heading(name) for name in COLUMNS)]
    assert [row[:4] for row in rows[1:]] == [
        ["before training", "0.500", "0.500", "0.500"],
        ["after training", "0.250", "0.250", "0.250"],
    ]
    assert rows[2][1 + list(COLUMNS).index("auroc")] == "-", "undefined"
    assert "On the 40 validation queries" in text


@pytest.mark.parametrize("merged", [False, True])
def test_the_program_compiles(merged: bool) -> None:
    card = replace(FULL, merged=merged)
    program = _program(card)
    imports = {node.module for node in ast.walk(ast.parse(program)) if isinstance(node, ast.ImportFrom)}
    assert imports == {"PIL", "transformers"} | (set() if merged else {"peft"})
    assert ("'org/Model-7B', revision='0123456789abcdef'" in program) is not merged
    assert "runs/sft/adapter" in program
    assert "max_new_tokens=16" in program
    assert '"repetition_penalty": 1.0' in program
    assert "trust_remote_code" not in program
    assert _program(replace(card, trust_remote_code=True)).count("trust_remote_code=True") == 2


@pytest.mark.parametrize(
    "template",
    [DEFAULT_TEMPLATE, 'It\'s "{question}"\\n\n{{really}}?', "```\n{question}\n```", "`{question}`"],
)
def test_the_prompt_is_exact_in_program_and_text(template: str) -> None:
    card = replace(FULL, template=template)
    tree = ast.parse(_program(card))
    prompt = next(
        n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "prompt"
    )
    question = 'Is {this} "it\'s"?'
    asked = eval(ast.unparse(prompt), {"question": question})
    assert asked == ElicitationPrompt(template).render(question)
    fence = "````" if "```" in template else "```"
    assert f"\n{fence}text\n{template}\n{fence}\n" in card_text(card)
    assert f"\n{fence}text\n{FULL.conversation}\n{fence}\n" in card_text(card)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FOUR, "paligemma2"])
def test_the_program_asks_as_we_do(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the model the same tokens and pixels, and gets the same reply."""
    processor, prompt = cached_family(family).processor, ElicitationPrompt()
    folder = cached_family(family).save(tmp_path / "model")
    settings = tmp_path / "model/generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "repetition_penalty": 1.9}))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    has_template = getattr(processor, "chat_template", None) is not None
    assert has_template == (family != "paligemma2")
    asking: dict[str, Any] = {"template": prompt.template, "has_chat_template": has_template}
    card = Card("org/base", location=folder, merged=True, max_new_tokens=6, **asking)
    scope: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(_program(card), scope)
    sample = Sample(Query("q", "x", EXAMPLE, "Yes", "yes_no"), pixels, 1.0, CLEAN, 0)
    batch = PromptCollator(ChatFormat(processor, prompt))([sample])
    for name, tensor in batch.inputs.items():
        assert (scope["inputs"][name] == tensor).all(), name
    model = load_base(BaseModel(folder))
    assert generate(model, batch.inputs, processor.tokenizer, 6).texts == [scope["reply"].strip()]


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({"merged": True}, "vllm serve 'my model'"),
        ({"parts": ["language"]}, "vllm serve org/base --enable-lora --lora-modules calibrated='my model'"),
        (
            {"parts": ["language", "projector"]},
            "vlm-calibration export 'my model' --merge --out merged\nvllm serve merged",
        ),
        ({"parts": []}, "vlm-calibration export 'my model' --merge --out merged\nvllm serve merged"),
    ],
)
def test_how_to_serve_it_depends_on_what_the_adapter_changes(changes: dict[str, Any], command: str) -> None:
    card = replace(Card("org/base", location="my model"), **changes)
    assert f"```bash\n{command}\n```" in card_text(card)
    assert "`repetition_penalty: 1`" in card_text(card)
    assert "serve" not in card_text(replace(card, has_chat_template=False))


def test_of_what_is_not_known_nothing_is_said() -> None:
    card = replace(FULL, quantization="nf4")
    assert "quantised (nf4) in training" in card_text(card)
    assert "merged into the base in full precision" in card_text(replace(card, merged=True))
    assert "quantised" not in card_text(FULL)
    text = card_text(Card("org/Model-7B", location="x"))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Model-7B, calibrated",
        "## How to ask it",
        "## How to serve it",
    ]
    assert "None" not in text.replace("else None", "")
    assert EXAMPLE in text


def test_a_card_comes_back_from_its_facts(tmp_path: Path) -> None:
    assert load_card(tmp_path) is None
    save_card(tmp_path, FULL)
    assert load_card(tmp_path) == FULL
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == card_text(FULL)
    facts = json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8"))
    assert facts["template"] == DEFAULT_TEMPLATE
    assert facts["levels"]["short"][1] == ["noise", 0.5, 0.45]


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"bases": 1}', "{}", '"text"'),
        *('{"base": "x", "levels": [1]}', '{"base": "x", "levels": {"a": [[0, 1.0]]}}'),
    ],
)
def test_facts_that_are_none_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(DataError, match=r"calibration.json") as caught:
        load_card(tmp_path)
    assert "\n" not in str(caught.value)


PROMISE = "At most 5% of the answers given are wrong, with 95% certainty."


def test_thresholds_beside_the_adapter_are_in_its_card(tmp_path: Path) -> None:
    save_card(tmp_path, FULL)
    for promise in (PROMISE, "Another."):
        assert promise not in (tmp_path / "README.md").read_text()
        state_guarantee(tmp_path, promise)
        text = (tmp_path / "README.md").read_text()
        assert f"## When to answer\n\n{promise} Send all other questions to a person." in text
        assert load_card(tmp_path) == replace(FULL, guarantee=promise)
    assert PROMISE not in text


@pytest.mark.parametrize("ours", [True, False])
def test_an_edited_readme_is_left_alone_and_the_guarantee_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ours: bool
) -> None:
    if ours:
        save_card(tmp_path, FULL)
    path = tmp_path / "README.md"
    path.write_text("Mine.\n")
    for promise in (PROMISE, "Another."):
        state_guarantee(tmp_path, promise)
        assert (f"{promise} Send all other" in capsys.readouterr().err) == ours
    assert path.read_text() == "Mine.\n"
    assert load_card(tmp_path) == (replace(FULL, guarantee="Another.") if ours else None)


# --- the results of an evaluation


SFT, DPO = "0" * 32, "1" * 32
DEMO = "vlm_calibration.demo.source.DemoSource"
BASE = {"n": 8, **dict.fromkeys(COLUMNS, 0.5)}
TUNED = {"n": 8, "accuracy": 0.75, "ece": 0.0625, "brier": 0.125, "auroc": None, "mean_confidence": 0.5}
FOUND = Evaluation(
    adapter=DPO, system="dpo", dataset="demo", split="development", revision="2" * 32,
    parts=["clean", "hard (key object perturbed)"], results={"base": BASE, "sft": {**BASE, "ece": 0.25}, "dpo": TUNED},
)  # fmt: skip


def write_run(
    folder: Path,
    record: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    trainer: Any = None,
    left_out: int = 0,
    with_oracle: bool = False,
) -> Path:
    """A run directory as `test` leaves it; the system "sft" has left out some questions."""
    source = {"class_path": DEMO, "init_args": {"split": "development"}}
    test = {"clean": {"source": source, "noise": "none"}, "hard": {"source": source, "noise": "drawn"}}
    settings = {"adapters": {"sft": "a", "dpo": "b"}, "oracle_levels": "levels.json" if with_oracle else None}
    model = {"class_path": "x.EvaluationModule", "init_args": settings}
    digests = {"model.init_args.adapters.sft": SFT, "model.init_args.adapters.dpo": DPO}
    digests |= {"data.test.clean": "a", "data.test.hard": "b", "data.calibration.clean": "c"}
    for system in ("base", "sft", "dpo", *(["oracle"] if with_oracle else []), "left_by_an_earlier_one"):
        given = answers(0, n=60 - (left_out if system == "sft" else 0), honest=system == "dpo")
        if given:
            write(folder / system, given)
    written = {"command": "test", "stage": "EvaluationModule", "finished": True, **(record or {})}
    RunRecord(**written, inputs=digests | (inputs or {})).write(folder)
    configure(folder, model, trainer=trainer or {"limit_test_batches": None}, data={"test": test})
    return folder


def test_the_rows_are_the_base_model_and_the_adapters_of_one_evaluation_as_in_the_report(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "eval", with_oracle=True)
    found = read_evaluation(folder, DPO)
    assert (found.system, found.dataset, found.split) == ("dpo", "demo", "development")
    assert found.parts == ["clean", "hard (key object perturbed)"]
    assert list(found.results) == ["base", "sft", "dpo"]
    assert read_evaluation(folder, SFT).system == "sft"
    report([str(folder)], replicates=2, images=False)
    rows = [r for r in csv.DictReader((folder / "report.csv").open()) if r["estimator"] == "verbalized"]
    reported = {r["system"]: {name: r[name] for name in ("n", *COLUMNS)} for r in rows if r["kind"] == "all"}
    del reported["oracle"]
    assert {s: {k: str(v) for k, v in row.items()} for s, row in found.results.items()} == reported
    assert found.results["base"]["auroc"] == 0.5
    for system in ("base", "sft", "dpo", "oracle"):
        write(folder / system, [replace(answers(0)[0], correct=True)])
    assert read_evaluation(folder, DPO).results["dpo"]["auroc"] is None, "undefined"


def test_other_queries_are_other_data_and_other_settings_are_not(tmp_path: Path) -> None:
    first = read_evaluation(write_run(tmp_path / "1"), DPO)
    calibration = read_evaluation(write_run(tmp_path / "2", inputs={"data.calibration.clean": "z"}), DPO)
    queries = read_evaluation(write_run(tmp_path / "3", inputs={"data.test.hard": "z"}), DPO)
    assert first.revision == calibration.revision != queries.revision


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"inputs": {"model.init_args.adapters.dpo": "changed"}}, r"not evaluated there.* sft, dpo\)"),
        (None, "no run.json: give the run directory"),
        ({"record": {"finished": False}}, "not a finished"),
        ({"record": {"command": "fit"}}, "not a finished"),
        ({"trainer": {"limit_test_batches": 2}}, "a part of the test set"),
        ({"left_out": 3}, "did not answer the same questions: 'q57'"),
        ({"left_out": 60}, "sft: no predictions.jsonl"),
    ],
)
def test_results_of_something_else_are_refused(
    tmp_path: Path, settings: dict[str, Any] | None, says: str
) -> None:
    folder = tmp_path / "eval"
    if settings is not None:
        write_run(folder, **settings)
    with pytest.raises(DataError, match=f"{folder}.*{says}"):
        read_evaluation(folder, DPO)


CARD = Card("org/Model-7B", base_on_hub=True, evaluations=[FOUND], license={"license": "apache-2.0"})


def test_the_hubs_parser_reads_the_results(tmp_path: Path) -> None:
    save_card(tmp_path, CARD)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.base_model, data.library_name) == ("apache-2.0", "org/Model-7B", "peft")
    front = _metadata(CARD)
    name, results = model_index_to_eval_results(front["model-index"])
    assert name == "Model-7B, calibrated"
    assert {r.metric_type: r.metric_value for r in results} == {
        "accuracy": 0.75,
        "expected_calibration_error": 0.0625,
        "brier_score": 0.125,
    }, "an undefined metric has no value"
    assert {(r.task_type, r.dataset_type, r.dataset_split, r.dataset_revision) for r in results} == {
        ("image-text-to-text", "demo", "development", "2" * 32)
    }
    assert results[0].dataset_name == "demo: clean, hard (key object perturbed)"
    assert ModelCardData(**front).to_dict() == front, "nothing is lost"
    assert load_card(tmp_path) == CARD
    other = replace(FOUND, revision="3" * 32, results={"dpo": {**TUNED, "accuracy": 1.0}})
    data = ModelCard(card_text(replace(CARD, evaluations=[FOUND, other]))).data
    by_data = {r.dataset_revision: r.metric_value for r in data.eval_results if r.metric_type == "accuracy"}
    assert by_data == {"2" * 32: 0.75, "3" * 32: 1.0}


def test_the_base_model_stands_beside_the_stages() -> None:
    section = results_text(CARD)
    assert section in card_text(CARD)
    assert "The same 8 queries of `demo`, split `development`" in section
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("| base model", "0.500", "0.500"),
        ("| sft", "0.500", "0.250"),
        ("| **dpo (this one)**", "0.750", "0.062"),
    ]
    assert rows[2][4] == "-", "undefined"
    merged = card_text(replace(CARD, merged=True))
    assert "model-index" not in merged, "it claims no results of its own"
    assert "Measured with the adapter beside the base model, before it was merged." in merged


def test_a_folder_is_no_base_model_of_the_hub() -> None:
    card = Card("runs/base", revision="x")
    assert not [key for key in _metadata(card) if key.startswith("base_model")]
    assert "The base model is a folder, not a repository on the Hub" in card_text(card)
    assert "The base model is a folder" not in card_text(CARD)
