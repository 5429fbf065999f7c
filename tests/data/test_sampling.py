"""The sampler: every sample exactly once over all processes, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.data.loading import EpochSampler


def _shards(
    length: int, processes: int, *, shuffle: bool, even: bool, epoch: int = 0, seed: int = 0
) -> list[list[int]]:
    shards = []
    for rank in range(processes):
        sampler = EpochSampler(
            length, rank=rank, num_replicas=processes, shuffle=shuffle, even=even, seed=seed
        )
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler)
        assert {e for e, _ in drawn} <= {epoch if shuffle else 0}
        shards.append([i for _, i in drawn])
    return shards


def _woven(shards: list[list[int]]) -> list[int]:
    """Sample 0 of every process, then sample 1 of every process, and so on."""
    return [shard[i] for i in range(max(map(len, shards))) for shard in shards if i < len(shard)]


@given(st.integers(0, 60), st.integers(1, 9), st.booleans(), st.integers(0, 3))
def test_everything_is_drawn_once_or_all_processes_draw_equally_often(
    length: int, processes: int, shuffle: bool, epoch: int
) -> None:
    shards = _shards(length, processes, shuffle=shuffle, even=False, epoch=epoch)
    assert sorted(chain(*shards)) == list(range(length))
    if not shuffle:
        assert _woven(shards) == list(range(length))
    even = _shards(length, processes, shuffle=shuffle, even=True, epoch=epoch)
    assert {len(shard) for shard in even} == {length // processes}
    drawn = list(chain(*even))
    assert len(set(drawn)) == len(drawn) > length - processes


@pytest.mark.parametrize("even", [True, False])
def test_order_is_a_function_of_seed_and_epoch(even: bool) -> None:
    def order(epoch: int, seed: int, processes: int = 1) -> list[int]:
        return _woven(_shards(40, processes, shuffle=True, even=even, epoch=epoch, seed=seed))

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) == order(3, 1, processes=4)
    assert order(3, 1) != order(4, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != list(range(40))


def test_what_is_left_out_changes_from_epoch_to_epoch() -> None:
    left_out = set()
    for epoch in range(40):
        drawn = set(chain(*_shards(7, 3, shuffle=True, even=True, epoch=epoch)))
        assert len(drawn) == 6
        left_out |= set(range(7)) - drawn
    assert left_out == set(range(7))


@given(st.integers(1, 60), st.integers(1, 9), st.sets(st.integers(0, 59)))
def test_what_is_done_is_left_out_and_moves_nothing_else(
    length: int, processes: int, indices: set[int]
) -> None:
    done = {index for index in indices if index < length}
    for rank, shard in enumerate(_shards(length, processes, shuffle=False, even=False)):
        settings: dict[str, Any] = {"shuffle": False, "even": False, "done": done}
        sampler = EpochSampler(length, rank=rank, num_replicas=processes, **settings)
        remaining = [index for index in shard if index not in done]
        assert [index for _, index in sampler] == sampler.indices().tolist() == remaining
        assert len(sampler) == len(remaining)
