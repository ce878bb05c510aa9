"""How networks are split that no table lists, as it was found out from calls of them in this session."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from asyncdiff_nodes.engine import AsyncDiffError, Family, UnsupportedModelError
from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.planning.discovery import Place, discover
from asyncdiff_nodes.engine.planning.family import listed_family
from asyncdiff_nodes.host.attributes import replaced

from .divide import divide

# fingerprint of a network -> modules that some of its calls run more than once; and the options that it reads
_avoided: defaultdict[str, set[str]] = defaultdict(set)
_read: dict[str, frozenset[str]] = {}


def avoid(fingerprint: str, block: str) -> None:
    """Note that networks with this fingerprint may run ``block`` more than once in a call, so that it must not be a block."""
    _avoided[fingerprint].add(block)


def options_read(fingerprint: str) -> frozenset[str] | None:
    """Return which of the host's options networks with this fingerprint read; None before that was found out."""
    return _read.get(fingerprint)


def family_of(
    skeleton: nn.Module, patcher: ModelPatcher, fingerprint: str, entry: str, places: tuple[Place, Place] | None, call: Arguments
) -> Family:
    """The family of ``skeleton``, the network of ``patcher``: how to split it, trace it, and divide its calls.

    Args:
        entry, places, call: of its first call: the method, where latent and timestep are, and its arguments.

    Raises:
        UnsupportedModelError: its class is not listed, and it is found out that it cannot be split.
    """
    family = listed_family(skeleton)
    _read.setdefault(fingerprint, frozenset())
    if family is None:
        own = entry if type(skeleton) is type(patcher.model.diffusion_model) else "forward"
        read: set[str] = set()
        how = {"entry": own, "places": places, "prepare": functools.partial(_traceable, read=read), "tracing": _tracing}
        family, _ = discover(skeleton, *call, **how, avoid=_avoided[fingerprint])
        _read[fingerprint] |= read
    return replace(family, trace_inputs=_traceable, tracing=_tracing, divide=divide)


class _Noting(dict):
    """Options that note in ``read`` which of them are read."""

    def __init__(self, options: dict[str, Any], read: set[str]) -> None:
        super().__init__(options)
        self._read = read

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The option ``key``, or ``default``."""
        self._read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._read.add(str(key))
        return super().__contains__(key)

    def copy(self) -> _Noting:
        """A copy that notes the same."""
        return _Noting(self, self._read)


def _traceable(
    args: tuple[Any, ...], kwargs: dict[str, Any], read: set[str] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a call with an attention, and patches, that run on the meta device.

    Some of the host's attentions call kernels that do not, and some patches read the step.

    Args:
        read: gets the names of the options that are read.
    """

    def attention(_: Any, *args: Any, **kwargs: Any) -> Any:
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)

    options = {**(kwargs.get("transformer_options") or {}), "optimized_attention_override": attention}
    options["patches_replace"] = {
        place: {where: getattr(patch, "traced", patch) for where, patch in patches.items()}
        for place, patches in options.get("patches_replace", {}).items()
    }
    return args, {**kwargs, "transformer_options": options if read is None else _Noting(options, read)}


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Run a network on the meta device as on others, and have whatever it raises there be a reason not to split it.

    The host's attention asks for free memory, where no other can be put in its place.
    """
    its_own = comfy.model_management.get_free_memory

    def get_free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
        if not isinstance(device, torch.device) or device.type != "meta":
            return its_own(device, torch_free_too)
        return (2**40, 2**40) if torch_free_too else 2**40

    try:
        with replaced(comfy.model_management, "get_free_memory", get_free_memory):
            yield
    except AsyncDiffError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"its forward fails on the meta device ({type(error).__name__}: {error})") from error
