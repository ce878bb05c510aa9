"""The first use of a network whose blocks, or bands, were found automatically: two calls are compared with ComfyUI's own.

What would make splitting wrong is looked for on the meta device before, in what the network does there. This is for the rest:
what only shows with values, and in a second call. It is done once per network and version, and kept in the user's folder.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfyui_version import __version__ as comfyui_version
from torch import nn

from asyncdiff_nodes import __version__
from asyncdiff_nodes.engine import Family
from asyncdiff_nodes.engine.trees import flatten, unflatten
from asyncdiff_nodes.host.workers import user_files

from .network_call import NetworkCall
from .own_network import OwnNetwork

_FILE, _KEPT = "checked", 200
_OWN = frozenset(vars(nn.Module()))  # attributes that every module has


def due(family: Family, fingerprint: str, bands: bool) -> bool:
    """Whether a network with this fingerprint is still to be compared, in bands or not."""
    return (bands or family.found is not None) and _key(fingerprint, bands) not in user_files.load(_FILE)


def passed(fingerprint: str, bands: bool, network: str) -> None:
    """Note that networks with this fingerprint, of the class ``network``, gave the same in two calls."""
    user_files.save(_FILE, user_files.load(_FILE) | {_key(fingerprint, bands): network}, _KEPT)


def computed(
    called: NetworkCall, x: torch.Tensor, own: OwnNetwork, on_host: Callable[..., Any]
) -> tuple[tuple[dict[str, Any], Any], ...]:
    """What the host computes for a call, and for the same with another latent: the changed arguments, and the result of each."""
    latent = next(iter(called.given))
    other = {latent: _another(called.given[latent])}
    residuals = [(each, [*each]) for each in (called.given.get("control") or {}).values()]

    def computed_once(**changes: Any) -> Any:
        result = on_host(**changes)
        for each, values in residuals:
            each[:] = values  # UNets empty these lists
        return result

    own.load(x)  # before the network's state is noted: the host keeps its own notes in there
    with _state_restored(called.network):
        return ({}, computed_once()), (other, computed_once(**other))


def _another(latent: Any) -> Any:
    """A latent like this one, or a list of them, with other values."""
    leaves, structure = flatten(latent)
    changed = [0.9 * leaf.flip(-1) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
    return unflatten(changed, structure)


@contextlib.contextmanager
def _state_restored(network: nn.Module) -> Iterator[None]:
    """Restore afterwards whatever calls keep in ``network``, so that they leave no trace in the picture."""
    kept = [(vars(module), _own(module)) for module in network.modules()]
    try:
        yield
    finally:
        for attributes, values in kept:
            for key in attributes.keys() - _OWN - values.keys():
                del attributes[key]
            attributes.update(values)


def _own(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that others do not have."""
    return {key: _copied(value) for key, value in vars(module).items() if key not in _OWN}


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def _key(fingerprint: str, bands: bool) -> str:
    how = " in bands" if bands else ""
    return hashlib.sha256(f"{fingerprint} {comfyui_version} {__version__}{how}".encode()).hexdigest()[:24]
