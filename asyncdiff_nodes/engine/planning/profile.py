"""Seconds that each block really takes. MACs mislead where memory is the limit, as in the deep layers of small pictures."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.telemetry import Stopwatch

from .graph import BlockGraph


@contextlib.contextmanager
def block_marks(module: nn.Module, names: Iterable[str], watch: Stopwatch) -> Iterator[dict[str, list[Any]]]:
    """Have the blocks ``names`` of ``module`` note, while it lasts, when they begin and end: block -> two marks of ``watch``."""
    marks: dict[str, list[Any]] = {}
    hooks = []
    try:
        for name in names:

            def begin(*_: Any, name: str = name) -> None:
                marks[name] = [watch.mark()]

            def end(*_: Any, name: str = name) -> None:
                marks[name].append(watch.mark())

            block = module.get_submodule(name)
            # before any other hook: sending an output is no part of computing it
            hooks += [block.register_forward_pre_hook(begin), block.register_forward_hook(end, prepend=True)]
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def block_seconds(
    module: nn.Module, graph: BlockGraph, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int = 3
) -> list[float]:
    """Measure the seconds of each block of ``graph`` in a call of the whole model, the median of ``repeats`` after a first one.

    Args:
        module: the model with its weights, on the kind of device that the plan is for.
        args, kwargs: inputs of one call, on the model's device.
    """
    watch = Stopwatch(next(module.parameters()).device)
    runs = []
    with block_marks(module, graph.names, watch) as marks:
        for _ in range(repeats + 1):
            module(*args, **kwargs)
            runs.append([watch.between(*marks[name]) for name in graph.names])
    return [statistics.median(times) for times in zip(*runs[1:], strict=True)]
