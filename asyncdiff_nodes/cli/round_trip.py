"""What talking costs between the caller and its ranks on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

import torch

from asyncdiff_nodes.engine import Plan, RankOptions, WorkerGroup

from .example_calls import example_call
from .zoo import find_model


def measure_round_trip(devices: Sequence[str]) -> float:
    """Seconds from a result, on its rank, to the start of the next call: of a small model in two ranks on ``devices``.

    The latent [2, 12, 40, 40] is a little larger than that of SD at 512 px, with CFG.
    """
    model, calls = find_model("demo"), 40
    skeleton = model.skeleton(torch.float32)
    plan = Plan(forecast=0)
    weights, ranks = model.random_weights(torch.float32), RankOptions(threads_per_rank=1)
    with WorkerGroup(skeleton, plan, devices, weights=weights, ranks=ranks) as group:
        args, kwargs = torch.utils._pytree.tree_map(_zeros, example_call(skeleton, 40))
        for _ in range(calls):
            group(*args, **kwargs)
        last = [record for record in group.stats().records if record.rank == 1]
    return statistics.median(after.start - before.end for before, after in pairwise(last[calls // 4 :]))


def _zeros(leaf: object) -> object:
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
