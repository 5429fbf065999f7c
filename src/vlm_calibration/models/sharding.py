"""Fully sharded data parallelism (FSDP2, arXiv 2304.11277): each process stores a shard of every weight.

A forward gathers one unit at a time, a transformer block or what is outside the blocks, and all processes take part. Training gives
each of them the same passes. Answers do not: their lengths differ, a vision tower runs for a prompt and not for its next token, and
one process may have more batches than another. So processes take turns (`_Turns`): all of them gather the unit that the furthest behind
of them needs, also those that do not need it, which drop it at once. No process ever holds more of the model than in training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.records import DataError


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Shard the model over a mesh of processes, in place. Processes may then run different numbers of passes.

    Before anything else that all processes do together, a backward pass or a reduction, they call `wait_for_others`.
    """
    base = unwrap_peft(model)  # which both peft's forward and generation call
    units = [*transformer_blocks(model), base]
    for unit in units:
        # The rest of the model too: every unit is sharded between passes.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    base.turns = _Turns(units, mesh)


def wait_for_others(model: Any) -> None:
    """Help the other processes with their passes until none has any left; does nothing if the model is not sharded.

    Raises:
        DataError: processes ran different numbers of passes with gradients since the last call.
    """
    turns: _Turns | None = getattr(unwrap_peft(model), "turns", None)
    if turns is not None:
        turns.wait()


class _Turns:
    """The order in which processes gather units.

    Each process says which unit it needs next, and all gather the one with the lowest number. The blocks are numbered in the order in which
    a pass runs them. The rest of the model has the highest number, since a process keeps it during a pass or the whole generation of an
    answer: these begin together.

    Args:
        units: the sharded modules, none of which contains another except for the last, the whole model.
        mesh: the processes.
    """

    def __init__(self, units: list[Any], mesh: DeviceMesh) -> None:
        self.units = units
        self.generates = False
        self.trained = 0
        """Passes with gradients since the last `wait`."""
        # Numbers are compared on the CPU, so that a GPU never waits for them.
        ranks = dist.get_process_group_ranks(mesh.get_group())
        self.group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        for number, unit in enumerate(units):
            # Before the hook of FSDP, which gathers the unit.
            unit.register_forward_pre_hook(partial(self._before_forward, number), prepend=True)
        units[-1].generate = partial(self._generate, units[-1].generate)

    def wait(self) -> None:
        self._help_below(len(self.units))
        fewest, most = self._lowest(self.trained), -self._lowest(-self.trained)
        self.trained = 0
        if fewest != most:
            # A backward pass gathers and reduces in the order of its own passes, and would wait for ever.
            raise DataError(
                f"sharded weights need equally many passes in each process, but a training step ran {fewest} in one and {most} in "
                "another: use an `attn_implementation` with which candidates share a row, such as sdpa, or trainer/ddp"
            )

    def _before_forward(self, number: int, *_: Any) -> None:
        is_whole = number == len(self.units) - 1
        self.trained += is_whole and torch.is_grad_enabled()
        if not (self.generates and is_whole):
            self._help_below(number)

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # transformers runs the vision tower before the first forward of the whole model.
        rest = self.units[-1]
        self._help_below(len(self.units) - 1)
        self._unshard(rest)
        rest.set_reshard_after_forward(False, recurse=False)
        self.generates = True
        try:
            # By default transformers lets sharded processes wait for the longest answer of all, which every process must generate.
            return generate(*args, **{**kwargs, "synced_gpus": False})
        finally:
            self.generates = False
            rest.set_reshard_after_forward(True, recurse=False)
            rest.reshard()

    def _unshard(self, unit: Any) -> None:
        # FSDP prepares a model in its first forward, which this process need not have had.
        fully_shard.state(self.units[-1])._lazy_init()  # type: ignore[attr-defined]
        unit.unshard()

    def _help_below(self, own: int) -> None:
        """Gather and drop units until no process needs one with a lower number than this one."""
        while (number := self._lowest(own)) < own:
            self._unshard(self.units[number])
            self.units[number].reshard()

    def _lowest(self, own: int) -> int:
        """The lowest of the processes' numbers."""
        number = torch.tensor(own)
        dist.all_reduce(number, dist.ReduceOp.MIN, self.group)
        return int(number)


def transformer_blocks(model: Any) -> list[Any]:
    """The modules that transformers never splits between devices, in the language model and the tower."""
    base = unwrap_peft(model)
    names = {n for m in base.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    return [m for m in base.modules() if type(m).__name__ in names]


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather all trained and adapter weights; every process must call it. None if the model is not sharded."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad or "lora_" in name
    }
