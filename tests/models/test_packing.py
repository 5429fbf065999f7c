"""Packed rows: which tokens they contain, and which predictions are made where."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models

from vlm_calibration.models.shared_prefix import Packed, Prompts, pack
from vlm_calibration.text.confidence import render_response


def shared_by_all(sequences: Sequence[list[int]]) -> list[int]:
    """The longest common prefix."""
    return max(
        (
            sequences[0][:n]
            for n in range(len(sequences[0]) + 1)
            if all(s[:n] == sequences[0][:n] for s in sequences)
        ),
        key=len,
    )


def restored(packed: Packed, lengths: Sequence[int]) -> list[list[list[int]]]:
    """Each candidate's sequence restored from its packed row: the prefix, its suffix, and its last target."""
    sequences: list[list[list[int]]] = []
    for row, (ids, segment, length) in enumerate(
        zip(packed.inputs["input_ids"], packed.segment, lengths, strict=True)
    ):
        sequences.append([])
        shared = int((segment == 0).sum()) - length
        for k, predictions in enumerate(packed.predictions[row], start=1):
            targets = packed.targets[predictions[predictions >= 0]].tolist()
            if not targets:
                continue
            sequence = ids[(segment == 0) | (segment == k)].tolist()
            # A row omits the last token of each suffix, which predicts nothing.
            sequences[-1].append(sequence + (targets[-1:] if len(targets) > shared else []))
    return sequences


def _trained_tokenizer(texts: Sequence[str], one_token_a_digit: bool) -> Tokenizer:
    tokenizer = Tokenizer(token_models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if one_token_a_digit:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(list(texts) * 3, trainer)
    return tokenizer


ALL_LEVELS = tuple(range(0, 101, 10))


@pytest.mark.parametrize("one_token_a_digit", [True, False], ids=["digits", "numbers"])
@pytest.mark.parametrize(
    ("levels", "shared_by_digits", "shared_by_numbers"),
    [
        (ALL_LEVELS, "Yes. Confidence: ", "Yes. Confidence:"),
        ((80, 100), "Yes. Confidence: ", "Yes. Confidence:"),
        ((100, 10), "Yes. Confidence: 10", "Yes. Confidence:"),
        ((30,), "Yes. Confidence: 30%", "Yes. Confidence: 30%"),
    ],
    ids=["all", "80-100", "100-10", "30"],
)
def test_stated_percentages_part_at_a_token(
    levels: tuple[int, ...], shared_by_digits: str, shared_by_numbers: str, one_token_a_digit: bool
) -> None:
    prompt = "Is there a dog?\n"
    texts = [render_response("Yes", level / 100) for level in levels]
    tokenizer = _trained_tokenizer(
        [prompt + render_response("Yes", level / 100) for level in ALL_LEVELS], one_token_a_digit
    )
    assert len(tokenizer.encode("100").ids) == (3 if one_token_a_digit else 2)  # the trained token is " 100"
    assert len(tokenizer.encode(" 100").ids) == (4 if one_token_a_digit else 1)

    begin = tokenizer.encode(prompt).ids
    sequences = [tokenizer.encode(prompt + text).ids for text in texts]
    assert all(ids[: len(begin)] == begin for ids in sequences)
    inputs = {"input_ids": torch.tensor([begin]), "attention_mask": torch.ones(1, len(begin)).long()}
    packed = pack(Prompts(inputs, torch.tensor([len(begin)])), [[ids[len(begin) :] for ids in sequences]])

    prefix = packed.inputs["input_ids"][packed.segment == 0].tolist()
    assert prefix == shared_by_all(sequences), "all shared tokens"
    shared = shared_by_digits if one_token_a_digit else shared_by_numbers
    assert tokenizer.decode(prefix) == prompt + shared
    (from_row,) = restored(packed, [len(begin)])
    assert from_row == sequences
    assert [tokenizer.decode(ids) for ids in from_row] == [prompt + text for text in texts]


RESPONSE = st.lists(st.integers(1, 3), min_size=1, max_size=6)
QUERY = st.tuples(
    st.lists(st.integers(4, 9), min_size=1, max_size=5), st.lists(RESPONSE, min_size=1, max_size=6)
)
QUERIES = st.lists(QUERY, min_size=1, max_size=3)
Queries = list[tuple[list[int], list[list[int]]]]


def packed_queries(queries: Queries) -> Packed:
    """Pack rows that have tokens behind the prompt and an input that is not text."""
    widest = max(len(prompt) for prompt, _ in queries) + 1
    rows = [prompt + [99] * (widest - len(prompt)) for prompt, _ in queries]
    inputs = {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.ones(len(rows), widest).long(),
        "token_type_ids": torch.full((len(rows), widest), 2),
        "pixel_values": torch.arange(float(len(rows) * widest)).view(len(rows), widest),
    }
    lengths = torch.tensor([len(prompt) for prompt, _ in queries])
    return pack(Prompts(inputs, lengths), [responses for _, responses in queries])


@given(QUERIES)
def test_packed_rows_hold_every_candidate_and_no_prediction_twice(queries: Queries) -> None:
    packed = packed_queries(queries)
    made = zip(*(x.tolist() for x in (packed.rows, packed.positions, packed.targets)), strict=True)
    assert len(set(made)) == len(packed.rows)
    ids, segment, shift = packed.inputs["input_ids"], packed.segment, packed.shift
    assert ids.shape == segment.shape == shift.shape
    position = torch.arange(ids.shape[1]) - shift
    expected = [[prompt + response for response in responses] for prompt, responses in queries]
    assert restored(packed, [len(prompt) for prompt, _ in queries]) == expected
    assert torch.equal(packed.inputs["attention_mask"], (segment >= 0).long())
    assert not (ids[segment >= 0] == 99).any()
    assert packed.predictions.shape[1:] == (
        max(len(r) for _, r in queries),
        max(len(c) for _, r in queries for c in r),
    )
    assert sorted(set(packed.predictions[packed.predictions >= 0].tolist())) == list(
        range(len(packed.targets))
    )
    for b, (prompt, responses) in enumerate(queries):
        prefix = shared_by_all([prompt + r for r in responses])
        assert ids[b, segment[b] == 0].tolist() == prefix
        assert position[b, segment[b] == 0].tolist() == list(range(len(prefix)))
        assert packed.inputs["token_type_ids"][b].tolist() == [2] * len(prompt) + [0] * (
            ids.shape[1] - len(prompt)
        )
        for k, response in enumerate(responses):
            own = segment[b] == k + 1
            assert position[b, own].tolist() == [len(prefix) + i for i in range(int(own.sum()))]
            predictions = packed.predictions[b, k]
            assert (predictions >= 0).tolist() == [t < len(response) for t in range(len(predictions))]
            predictions = predictions[: len(response)]
            assert packed.targets[predictions].tolist() == response
            assert packed.rows[predictions].tolist() == [b] * len(response)
            columns = packed.positions[predictions]
            assert set(segment[b, columns].tolist()) <= {0, k + 1}, "in the prefix or in its own suffix"
            assert position[b, columns].tolist() == [len(prompt) + t - 1 for t in range(len(response))]
            assert ids[b, columns].tolist() == [prompt[-1], *response[:-1]]
    widest = max(len(prompt) for prompt, _ in queries) + 1
    assert packed.inputs["pixel_values"].shape == (len(queries), widest), "unchanged"
