"""The sampler: every sample exactly once over all processes, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from vlm_calibration.data.loading import EpochSampler


def _shards(length: int, processes: int, training: bool, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    shards = []
    for rank in range(processes):
        sampler = EpochSampler(length, rank=rank, num_replicas=processes, training=training, seed=seed)
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler)
        assert {e for e, _ in drawn} <= {epoch if training else 0}
        shards.append([i for _, i in drawn])
    return shards


def _woven(shards: list[list[int]]) -> list[int]:
    """Sample 0 of every process, then sample 1 of every process, and so on."""
    return [shard[i] for i in range(max(map(len, shards))) for shard in shards if i < len(shard)]


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3))
def test_evaluation_draws_everything_exactly_once(length: int, processes: int, epoch: int) -> None:
    assert _woven(_shards(length, processes, False, epoch)) == list(range(length))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3))
def test_training_draws_equally_often_and_nothing_twice(length: int, processes: int, epoch: int) -> None:
    shards = _shards(length, processes, True, epoch)
    assert {len(shard) for shard in shards} == {length // processes}
    drawn = list(chain(*shards))
    assert len(set(drawn)) == len(drawn)
    assert length - len(drawn) < processes


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(epoch: int, seed: int, processes: int = 1) -> list[int]:
        return _woven(_shards(40, processes, True, epoch, seed))

    assert order(3, 1) == order(3, 1) == order(3, 1, processes=4)
    assert order(3, 1) != order(4, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != list(range(40))


def test_what_is_left_out_changes_from_epoch_to_epoch() -> None:
    left_out = set()
    for epoch in range(40):
        drawn = set(chain(*_shards(7, 3, True, epoch)))
        assert len(drawn) == 6
        left_out |= set(range(7)) - drawn
    assert left_out == set(range(7))


@given(st.integers(1, 60), st.integers(1, 9), st.sets(st.integers(0, 59)))
def test_what_is_done_is_left_out_and_moves_nothing_else(
    length: int, processes: int, indices: set[int]
) -> None:
    done = {index for index in indices if index < length}
    for rank, shard in enumerate(_shards(length, processes, False)):
        sampler = EpochSampler(length, rank=rank, num_replicas=processes, training=False, done=done)
        remaining = [index for index in shard if index not in done]
        assert [index for _, index in sampler] == sampler.indices().tolist() == remaining
        assert len(sampler) == len(remaining)
