"""What the engine must know of a model family: which submodules are blocks, and where sample and timestep are passed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.bands import BandMode
from asyncdiff_nodes.engine.batch import Arguments, divide, sample_of
from asyncdiff_nodes.engine.errors import UnsupportedModelError
from asyncdiff_nodes.extensions import families

UNKNOWN = "how to split this model is found out in its first call, which it has not had"


@dataclass(frozen=True)
class HiddenStates:
    """Places of a transformer's hidden states of the sample: what its blocks add to, and hand on.

    Attributes:
        block: name of the first block that takes them.
        argument: their position and keyword in its forward.
        lists: list of blocks that hand them on -> their index among the tensors that such a block returns. Where one tensor holds
            the prompt's as well, they are the last tokens.
    """

    block: str
    argument: tuple[int, str]
    lists: Mapping[str, int]


@dataclass(frozen=True)
class Findings:
    """What a model was seen to do, on meta, when its blocks were found.

    Attributes:
        share: part of its multiply-accumulates that is in blocks.
        read_values: whether it takes its path by values of its inputs.
    """

    share: float
    read_values: bool


@dataclass(frozen=True)
class Family:
    """A family of module trees that are split in the same way.

    Attributes:
        name: shown in messages and reports.
        block_names: names of the submodules that may be placed, in any order (the trace finds the order).
        timestep: position and keyword of the timestep in the model's ``forward``.
        sample: position and keyword of the noisy sample.
        example_inputs: ``(module, latent_size, batch) -> (args, kwargs)``, tensors on the meta device; ``None`` for the
            size means the model's own. Used to plan before the first call; without, it is planned then.
        trace_inputs: ``(args, kwargs) -> (args, kwargs)``, what a trace passes instead of a call's own inputs, where the
            forward cannot run on the meta device with these; ``None`` changes nothing.
        tracing: makes what is entered while a trace runs.
        divide: ``(args, kwargs, batch, parts)`` -> the same call for each part of the batch; see :func:`~.batch.divide`.
        banded: ``(args, kwargs, mode) -> (args, kwargs)``, the same call whose attentions ask ``mode`` for keys and values, where
            they are not PyTorch's own; it may say that a call cannot be computed in bands.
        local: names of others' operators that give for some tokens what they give for them among all.
        hidden: of a transformer; ``None`` where nothing is known of its hidden states, or there are none.
        entry: the method of the model that a call is of.
        keep_shape: modules within blocks that look at values, but return what is like their largest argument.
        found: what the model was seen to do when this was found out automatically; ``None`` where it was written by hand.
    """

    name: str
    block_names: Callable[[nn.Module], list[str]]
    timestep: tuple[int, str]
    example_inputs: Callable[[nn.Module, int | None, int], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    trace_inputs: Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    tracing: Callable[[], AbstractContextManager[Any]] = nullcontext
    sample: tuple[int, str] = (0, "sample")
    divide: Callable[[tuple[Any, ...], dict[str, Any], int, int], list[Arguments]] = divide
    banded: Callable[[tuple[Any, ...], dict[str, Any], BandMode], Arguments] | None = None
    local: frozenset[str] = frozenset()
    hidden: HiddenStates | None = None
    entry: str = "forward"
    keep_shape: tuple[str, ...] = ()
    found: Findings | None = None

    def parts(self, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> list[Arguments]:
        """Divide the call into at most ``count`` parts of its batch."""
        sample = sample_of(args, kwargs, self.sample)
        if count == 1 or not isinstance(sample, torch.Tensor):  # a sample of several tensors is not divided
            return [(args, kwargs)]
        return self.divide(args, kwargs, sample.shape[0], count)


def listed_family(module: nn.Module) -> Family | None:
    """Find the family of ``module``, by the names of its class and of the package that this is from; None if no table has it.

    A class that is built on a listed one is another: blocks that it adds would be computed by every rank.
    """
    cls = type(module)
    return families().get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}")


def example_of(family: Family | None, skeleton: nn.Module) -> Arguments | None:
    """Return inputs of a typical call, if ``family`` knows any."""
    return None if family is None or family.example_inputs is None else family.example_inputs(skeleton, None, 2)


def find_family(module: nn.Module) -> Family:
    """Find the family of ``module``, where it has to be known before any call; see :func:`listed_family`.

    Raises:
        UnsupportedModelError: no registered table lists its class; see :mod:`asyncdiff_nodes.extensions`.
    """
    if family := listed_family(module):
        return family
    raise UnsupportedModelError(
        f"no block list for a {type(module).__module__}.{type(module).__qualname__}; listed: {', '.join(sorted(families()))}. "
        "Its blocks are found out in its first call, or from example_inputs"
    )
