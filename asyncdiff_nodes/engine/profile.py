"""How long each block really takes. MACs mislead where memory is the limit, as in the deep layers of small pictures."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from .graph import BlockGraph
from .telemetry import Stopwatch


@torch.inference_mode()
def block_seconds(
    module: nn.Module, graph: BlockGraph, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int = 3
) -> list[float]:
    """Seconds of each block of ``graph`` in a call of the whole model, the median of ``repeats`` after a first one.

    Args:
        module: the model with its weights, on the kind of device that the plan is for.
        args, kwargs: inputs of one call, on the model's device.
    """
    watch = Stopwatch(next(module.parameters()).device)
    marks: dict[str, list[Any]] = {}
    hooks = []
    for name in graph.names:

        def note(*_: Any, name: str = name) -> None:
            marks.setdefault(name, []).append(watch.mark())

        block = module.get_submodule(name)
        hooks += [block.register_forward_pre_hook(note), block.register_forward_hook(note)]
    runs = []
    try:
        for _ in range(repeats + 1):
            marks.clear()
            module(*args, **kwargs)
            runs.append([watch.seconds(marks[name][1]) - watch.seconds(marks[name][0]) for name in graph.names])
    finally:
        for hook in hooks:
            hook.remove()
    return [statistics.median(times) for times in zip(*runs[1:], strict=True)]
