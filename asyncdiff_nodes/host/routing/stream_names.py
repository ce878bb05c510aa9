"""Names for the streams of the network's calls, made of everything that distinguishes streams."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncdiff_nodes.host.controlnet.calls import NetCall
from asyncdiff_nodes.host.patches.obstacles import identity
from asyncdiff_nodes.host.patches.protocol import RoutedCall

from .frame_windows import Windows
from .streams import Streams, outline_of


@dataclass(frozen=True)
class NamedCall:
    """Everything that is known about a call's stream.

    Attributes:
        stream: its name.
        certain: whether it is known which earlier call this one continues.
        gone: names of streams that will not be called again.
        first: whether it is the first of its stream.
        arguments: an outline of its arguments.
        patches: the patches in it, whatever their values.
        kind: equal for calls that take the same path through the network.
    """

    stream: Hashable
    certain: bool
    gone: list[Hashable]
    first: bool
    arguments: Any
    patches: str
    kind: tuple[Hashable, ...]


class StreamNames:
    """The stream names of one sampling.

    A prompt has further streams under a guidance patch, after a ControlNet starts in mid-run, and for each window of frames.

    Args:
        streams: distinguishes the calls for one prompt at one noise level.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._windows = Windows()
        self._patches: dict[str, int] = {}  # the patches of a call -> a number
        self._seen: set[Hashable] = set()

    @property
    def turn(self) -> int:
        """Number of timesteps so far for windows of frames, including the current one."""
        return self._windows.turn

    def evaluate(self, x: torch.Tensor, sigma: torch.Tensor) -> None:
        """Note that the sampler evaluates the model at its latent ``x`` [B, C, ...] with noise ``sigma`` [B]."""
        self._streams.evaluate(x, sigma)

    def of(
        self, call: RoutedCall, rest: list[Any], timesteps: torch.Tensor, nets: Sequence[NetCall], synchronous: bool
    ) -> NamedCall:
        """Name the stream of ``call``; patches have already added to the call's path.

        Args:
            rest: see :func:`.streams.rest_of`; from the arguments before patches added to them.
            nets: the ControlNets' calls in it.
            synchronous: no call of this sampling builds on another one.
        """
        options, shipped = call.options, call.arguments["transformer_options"]
        outline, patches = outline_of(rest), identity(shipped, by_value=False)
        shared = tuple(call.x.shape), outline, _residuals(call.arguments.get("control")), tuple(net.net for net in nets)
        number = self._patches.setdefault(identity(shipped), len(self._patches))
        window = getattr(options.get("context_window"), "index_list", None) or options.get("ad_params", {}).get("sub_idxs")
        uuids = tuple(options.get("uuids", ()))
        prompt: Hashable = (uuids, *shared, number, repr(window), *call.path)
        gone: list[Hashable] = []
        stream: Hashable | None = prompt
        if window is not None:
            stream, gone = self._windows.stream(prompt, float(timesteps.flatten()[0]))
        elif not synchronous:
            latent = next(iter(call.arguments.values()))
            x = latent if isinstance(latent, torch.Tensor) else None
            stream = self._streams.of(uuids, prompt, x, float(timesteps.flatten()[0]), rest)
        name = prompt if stream is None else stream
        first = name not in self._seen
        self._seen.add(name)
        return NamedCall(name, stream is not None, gone, first, outline, patches, (*shared, patches))


def _residuals(control: dict[str, Any] | None) -> str:
    """An outline of the control residuals: a ControlNet that starts or stops in mid-run begins new streams."""
    if control is None:
        return ""
    return str({name: [item is not None for item in items] for name, items in control.items()})
