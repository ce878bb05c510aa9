"""Token merging (ToMe): ranks get the random numbers that its patches draw, since one generator serves all blocks.

Nothing of the host is imported here: a rank does not have the host's flags yet when it imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from asyncdiff_nodes.host import OURS

from .by_reference import ShippedPatch, Variable
from .protocol import PatchInSampling, RoutedCall, RoutedPatch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_NUMBERS = "random numbers"  # key in a call: place of an attention -> the numbers drawn there
_MODULE, _VARIABLE = "comfy_extras.nodes_tomesd", "u"
_KIND = "attn1_patch"  # of the patch that draws

AttentionPlace = tuple[str, int, int]  # list of blocks, block, layer of its transformer


@dataclass(frozen=True)
class Merging:
    """A patch of the node by reference."""

    patch: ShippedPatch

    def __call__(self, *args: Any) -> Any:
        """Run the patch, whose last argument is the options of the call."""
        numbers = args[-1][OURS][_NUMBERS].get(_place(args[-1]))

        def draw(*_: Any, **__: Any) -> torch.Tensor:
            if numbers is None:
                raise RuntimeError(f"no random numbers were sent for the tokens to merge in block {_place(args[-1])}")
            return numbers

        with _Drawing(draw):
            return self.patch(*args)


class _Drawing(TorchFunctionMode):
    """Call ``draw`` in place of ``torch.randint`` for a while."""

    def __init__(self, draw: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._draw if func is torch.randint else func)(*args, **(kwargs or {}))


class _Asked(Exception):
    """Raised when a patch asks for random numbers, with the arguments."""


class TokenMerging(RoutedPatch):
    """The patches of *ToMe Patch Model*."""

    def shipped(self, patch: Any, options: dict[str, Any], variables: dict[int, Variable]) -> Callable[..., Any] | None:
        """See :class:`RoutedPatch`."""
        if getattr(patch, "__module__", None) != _MODULE:
            return None
        reference = ShippedPatch.of(patch, variables, scratch=_VARIABLE)
        return reference and Merging(reference)

    def runs_in(self, network: nn.Module) -> bool:
        """Whether it is known where in ``network`` tokens are merged."""
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        return type(network) is UNetModel

    def begin(self, patcher: ModelPatcher) -> PatchInSampling:
        """See :class:`RoutedPatch`. Each call is searched for such patches, since nodes add them there too."""
        return _Drawn()


class _Drawn(PatchInSampling):
    """One sampling, in which the host draws the numbers before each call."""

    def before(self, call: RoutedCall) -> None:
        """Draw as the patches would, block after block, from the generator of the latent's device."""
        patches = call.arguments["transformer_options"].get("patches", {}).get(_KIND, ())
        merging = next((patch for patch in patches if isinstance(patch, Merging)), None)
        if merging is None:
            return
        asked = _asked(merging.patch, call.x)
        places = _of_full_resolution(call.network) if asked else ()
        numbers = {place: torch.randint(*asked[0], **{**asked[1], "device": call.x.device}) for place in places}
        call.add(_NUMBERS, numbers)
        call.repeatable = False  # the host would draw other numbers


def _asked(patch: ShippedPatch, x: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with which ``patch`` draws random numbers for an attention to as many tokens as ``x`` has pixels."""
    tokens = torch.empty(1, x.shape[2] * x.shape[3], 1, device="meta")

    def ask(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise _Asked(args, kwargs)

    try:
        with _Drawing(ask):
            patch(tokens, tokens, tokens, {"original_shape": list(x.shape)})
    except _Asked as asked:
        return asked.args
    return None


def _of_full_resolution(network: nn.Module) -> Iterator[AttentionPlace]:
    """The attentions to as many tokens as the latent has pixels, in order of execution; only there tokens are merged."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample

    def lowers(group: nn.Module) -> bool:
        return any(isinstance(module, Downsample) for module in group.modules())

    groups = len(network.input_blocks)
    full = next((index for index, group in enumerate(network.input_blocks) if lowers(group)), groups)
    for kind, indices in (("input", range(full)), ("output", range(groups - full, groups))):
        for index in indices:
            for layer in getattr(network, f"{kind}_blocks")[index]:
                for depth in range(len(getattr(layer, "transformer_blocks", ()))):
                    yield kind, index, depth


def _place(options: dict[str, Any]) -> AttentionPlace:
    return (*options["block"], options["block_index"])
