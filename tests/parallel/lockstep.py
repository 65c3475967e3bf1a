"""Ranks of a group as threads that meet at every collective, so that a cut model can be run with real weights."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from fxroof.analyzer import sharding

_here = threading.local()
_LIBRARY = torch.library.Library("fxroof", "IMPL")


class Group:
    """What the ranks hand to each other."""

    def __init__(self, size: int) -> None:
        self.parts: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.sent = 0

    def exchange(self, rank: int, part: torch.Tensor) -> list[torch.Tensor]:
        self.parts[rank] = part.clone()
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


def _all_reduce(x: torch.Tensor, gpus: int) -> None:
    parts = _here.group.exchange(_here.rank, x)
    assert len(parts) == gpus
    x.copy_(torch.stack(parts).sum(0))


def _all_gather(x: torch.Tensor, width: int, gpus: int) -> torch.Tensor:
    whole = torch.cat(_here.group.exchange(_here.rank, x), dim=-1)
    assert whole.shape[-1] == width
    return whole


_LIBRARY.impl("all_reduce", _all_reduce, "CPU")
_LIBRARY.impl("all_gather", _all_gather, "CPU")


def run(module: torch.nn.Module, size: int, call: Callable[[torch.nn.Module], Any], **shares: int) -> list[Any]:
    """What `call` makes of each rank's share."""
    group, results, errors = Group(size), [None] * size, []
    copies = [copy.deepcopy(module) for _ in range(size)]

    def work(rank: int) -> None:
        _here.group, _here.rank = group, rank
        try:
            share = copies[rank]
            with torch.no_grad(), sharding.sharded(share, rank=rank, **shares):
                results[rank] = call(share)
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
