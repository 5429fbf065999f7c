"""Packed rows: which tokens they contain, and which predictions are made where."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.models.shared_prefix import Packed, Prompts, pack

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
        first, *others = (prompt + response for response in responses)
        prefix = next(first[:n] for n in range(len(first), 0, -1) if all(o[:n] == first[:n] for o in others))
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
