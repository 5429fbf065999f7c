"""Greedy generation in batches gives the answer of each prompt alone, for any padding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration.data.collate import PromptBatch, SFTBatch
from vlm_calibration.models.generation import generate
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.text.confidence import end_of_confidence

SETTINGS = {
    "do_sample": True,
    "temperature": 5.0,
    "num_beams": 3,
    "num_return_sequences": 2,
    "repetition_penalty": 1.9,
    "suppress_tokens": [43],
    "sequence_bias": [[[47], 100.0]],
    "min_new_tokens": 6,
    "max_new_tokens": 2,
    "stop_strings": ["a"],
    "cache_implementation": "static",
}


def test_no_generation_setting_of_a_checkpoint_changes_an_answer(
    model_folder: str, processor: Any, prompts: PromptBatch, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    tokens = {k: v for k, v in json.loads(path.read_text()).items() if k.endswith("_token_id")}
    path.write_text(json.dumps({**SETTINGS, **tokens}))
    model = load_base(BaseModel(str(tmp_path / "model"), dtype="float32"))
    left = model.generation_config.to_diff_dict()
    left.pop("transformers_version", None)
    assert left == {**tokens, "do_sample": False, "num_beams": 1}
    answers = generate(model, prompts.inputs, processor.tokenizer, 8).texts
    assert answers == _likeliest(model, prompts, processor.tokenizer, 8)


def _likeliest(model: Any, prompts: PromptBatch, tokenizer: Any, n: int) -> list[str]:
    """The answers of `n` tokens, each the one that scores highest after the tokens before it."""
    inputs = prompts.inputs.copy()
    begin = inputs["input_ids"].shape[1]
    for _ in range(n):
        token = model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    texts = tokenizer.batch_decode(inputs["input_ids"][:, begin:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def test_an_answer_ends_where_it_is_complete(
    load_model: Callable[..., Any], processor: Any, prompts: PromptBatch, batch: SFTBatch
) -> None:
    """The model never ends a turn; one of three rows is never complete and takes all tokens."""
    model, tokenizer = load_model(), processor.tokenizer
    answer = "Yes. Confidence: 80%"
    ids = tokenizer(f"{answer} dog", add_special_tokens=False)["input_ids"]
    [dog] = tokenizer("dog", add_special_tokens=False)["input_ids"]
    steps: list[int] = []

    def script(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        token = [*ids, *[dog] * 20][len(steps)]
        steps.append(token)
        target = torch.tensor([token, token, dog])[: len(output), None, None]
        return torch.full_like(output, -100.0).scatter(-1, target.expand(*output.shape[:2], 1), 100.0)

    model.get_output_embeddings().register_forward_hook(script)
    generated = generate(model, prompts.inputs, tokenizer, 16, end_of_confidence)
    assert generated.texts == [answer, answer, " ".join(["dog"] * 16)]
    assert generated.passes == [len(ids), len(ids), 16]
    assert generated.complete == [True, True, False]

    steps.clear()
    complete = {name: values[:2] for name, values in prompts.inputs.items()}
    assert generate(model, complete, tokenizer, 16, end_of_confidence).texts == [answer, answer]
    assert len(steps) == len(ids), "no pass after all answers are complete"
    with pytest.raises(ValueError, match="padded on the left"):
        generate(model, batch.inputs, tokenizer, 3)
