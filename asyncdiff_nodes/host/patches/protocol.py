"""The protocol of a routed patch: everything that ranks need to compute one kind of patch that nodes put on a model.

A kind of patch is a class in one file beside this one, and one entry in registry.py. Nothing of the host is imported here: a
rank does not have the host's flags yet when it imports patches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from asyncdiff_nodes.host import OURS

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .by_reference import Variable


@dataclass
class RoutedCall:
    """A call of the network on its way to the ranks.

    Attributes:
        network: the host's network.
        arguments: by their names in the network's ``forward``; what patches add is sent to the ranks too.
        options: the host's transformer options. The ranks get those among the arguments instead.
        x: the latent [B, C, ...].
        path: what patches add to make it another stream than the calls before.
        repeatable: whether the host would compute the same if it made the call once more.
    """

    network: nn.Module
    arguments: dict[str, Any]
    options: dict[str, Any]
    x: torch.Tensor
    path: list[Hashable] = field(default_factory=list)
    repeatable: bool = True

    def add(self, key: str, value: Any) -> None:
        """Send ``value`` along for patches in ranks: they find it in their options, under the pack's own key and ``key``."""
        self.arguments["transformer_options"].setdefault(OURS, {})[key] = value


class PatchInSampling:
    """The work of a kind of patch in one sampling of a model that has such a patch. By default it does nothing.

    Attributes:
        only_ranks: once the host has computed a call, it must compute the rest: its network is no longer the ranks'.
        rounds: the ranks' results are the host's up to rounding only.
    """

    only_ranks = False
    rounds = False

    def prepare(self) -> None:
        """Bring the host's objects into the state that the ranks' network is compared with, before ranks are started."""

    def shape(self, latent: list[int]) -> list[int]:
        """The shape of the latent in each call of the network, where the sampler's latent has the shape ``latent``."""
        return latent

    def begin(self, model_options: dict[str, Any]) -> None:
        """Begin, now that the ranks are ready; ``model_options`` are those of this sampling."""

    def before(self, call: RoutedCall) -> str | None:
        """Add to ``call`` what ranks need for it. Returns why only the host can compute it, in words; None if ranks can."""
        return None

    def after(self, call: RoutedCall, result: Any) -> Any:
        """Return the network's output from the ranks' ``result``, and tell the host's patch what it would have seen."""
        return result


class RoutedPatch:
    """A kind of patch. Every method has a default for the kinds that do not need it."""

    def obstacle(self, patcher: ModelPatcher, model_options: dict[str, Any]) -> str | None:
        """Why the ranks cannot have the patch on the model of ``patcher``, in words; None if they can, or there is none."""
        return None

    def injects(self, patcher: ModelPatcher, key: str) -> bool:
        """Whether the injection into the network under ``key`` is of this kind."""
        return False

    def models(self, patcher: ModelPatcher) -> Mapping[str, ModelPatcher]:
        """Further models whose weights the ranks have: prefix of the weights' names in the ranks' network -> the model."""
        return {}

    def identity(self, patcher: ModelPatcher) -> Hashable:
        """A value that is equal for models whose ranks differ only in weights, as far as this kind goes.

        Raises:
            UnsupportedModelError: no rank can have this patch.
        """
        return None

    def build(self, network: nn.Module, patcher: ModelPatcher) -> nn.Module:
        """The ``network`` of ``patcher``, on the meta device, with the changes of the patch. Raises as :meth:`identity`."""
        return network

    def begin(self, patcher: ModelPatcher) -> PatchInSampling | None:
        """The patch's work in a sampling that begins; None if there is no such patch, or nothing to do."""
        return None

    def shipped(self, patch: Any, options: dict[str, Any], variables: dict[int, Variable]) -> Callable[..., Any] | None:
        """The stand-in in a rank for ``patch``, a function in these ``options`` of a call; None if it is of another kind.

        Args:
            variables: see :meth:`.by_reference.ShippedPatch.of`.
        """
        return None

    def runs_in(self, network: nn.Module) -> bool:
        """Whether its functions do the same in a rank as in ``network``, the host's."""
        return True

    def is_needless(self, patch: Any) -> bool:
        """Whether ``patch``, one of a call's functions, is of this kind, and ranks do not need it."""
        return False
