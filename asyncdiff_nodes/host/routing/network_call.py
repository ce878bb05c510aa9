"""One call of the host's network, as it is made at the end of all hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from asyncdiff_nodes.engine.trees import flatten


@dataclass(frozen=True)
class NetworkCall:
    """A call of one of the network's methods, which computes all of it.

    Attributes:
        entry: the name of the method: the one that the network's hooks are around, where it calls any.
        given: its arguments by name, in order: the latent and the timestep come first.
        compute: makes the call on the host; with another latent, if it is given one.
    """

    network: Any
    entry: str
    given: dict[str, Any]
    compute: Callable[..., Any]

    @classmethod
    def of(cls, network: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> NetworkCall:
        """Describe a call of ``method``, the one of ``network`` at the end of all hooks."""
        entry = _entry(type(network), getattr(method, "__name__", "forward"))
        signature = _signature(getattr(type(network), entry))
        given = signature.bind(network, *args, **kwargs).arguments
        del given[next(iter(signature.parameters))]  # self
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        latent = next(iter(given))

        def compute(**other: Any) -> Any:
            if other and args:
                return method(other[latent], *args[1:], **kwargs)
            return method(*args, **kwargs | other)

        return cls(network, entry, given, compute)

    @property
    def places(self) -> tuple[tuple[int, str], tuple[int, str]]:
        """Position and keyword of latent and timestep."""
        latent, timestep, *_ = self.given
        return (0, latent), (1, timestep)

    @property
    def x(self) -> torch.Tensor:
        """The latent [B, C, ...]; of several, such as a video and its sound, all elements [B, 1, n], as samplers have them."""
        latent = next(iter(self.given.values()))
        if isinstance(latent, torch.Tensor):
            return latent
        return torch.cat([part.reshape(len(part), 1, -1) for part in latent], -1)

    @property
    def timesteps(self) -> torch.Tensor:
        """The timestep of each item; of several latents that of the first."""
        times: torch.Tensor = flatten(list(self.given.values())[1])[0][0]
        return times


_signature = functools.cache(inspect.signature)  # it takes longer than all other overhead of a call


@functools.cache
def _entry(cls: type, name: str) -> str:
    """``name`` where that is a method of the class that names its arguments; else ``forward``, which takes the same."""
    method = getattr(cls, name, None)
    kinds = [parameter.kind for parameter in _signature(method).parameters.values()] if inspect.isfunction(method) else []
    return "forward" if not kinds or inspect.Parameter.VAR_POSITIONAL in kinds else name


@functools.cache
def has_hook(cls: type) -> bool:
    """Whether the ``forward`` of a network's class, or one that it calls, calls the DIFFUSION_MODEL wrappers."""
    forwards = (vars(base).get("forward") for base in cls.__mro__)
    return any("DIFFUSION_MODEL" in forward.__code__.co_names for forward in forwards if inspect.isfunction(forward))
