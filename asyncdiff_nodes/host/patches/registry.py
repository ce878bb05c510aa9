"""The kinds of patches that ranks can compute. A new one is a file beside this one, and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import nn

from .animatediff.calls import AnimateDiff
from .by_reference import ByReference, Variable
from .compiled import Compiled
from .ipadapter import ImageAdapter
from .protocol import PatchInSampling, RoutedPatch
from .sag import SelfAttentionGuidance
from .tome import TokenMerging

# in the order in which they change the ranks' network
KINDS: tuple[RoutedPatch, ...] = (
    Compiled(),
    AnimateDiff(),
    SelfAttentionGuidance(),
    TokenMerging(),
    ImageAdapter(),
    ByReference(),
)


def models_of(patcher: ModelPatcher) -> dict[str, ModelPatcher]:
    """All further models of ``patcher`` whose weights the ranks have; see :meth:`.protocol.RoutedPatch.models`."""
    return {prefix: model for kind in KINDS for prefix, model in kind.models(patcher).items()}


def begun(patcher: ModelPatcher) -> list[PatchInSampling]:
    """The work of the model's patches in a sampling that begins."""
    return [begun for kind in KINDS if (begun := kind.begin(patcher)) is not None]


def shipped(patch: Any, options: dict[str, Any], variables: dict[int, Variable]) -> Callable[..., Any] | None:
    """The stand-in in a rank for the function ``patch``; None if no rank can have it."""
    stand_ins = (kind.shipped(patch, options, variables) for kind in KINDS)
    return next((each for each in stand_ins if each is not None), None)


def is_routed(patch: Any, network: nn.Module) -> bool:
    """Whether ranks can run ``patch`` as ``network``, the host's, does."""
    return any(kind.shipped(patch, {}, {}) is not None and kind.runs_in(network) for kind in KINDS)


def is_needless(patch: Any) -> bool:
    """Whether ranks do not need ``patch``."""
    return any(kind.is_needless(patch) for kind in KINDS)
