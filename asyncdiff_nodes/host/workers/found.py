"""How networks are split that no table lists: found out from a call of each, and kept in the user's folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_version import __version__ as comfyui_version
from torch import nn

from asyncdiff_nodes import __version__
from asyncdiff_nodes.engine import AsyncDiffError, Family, UnsupportedModelError
from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.planning.discovery import Place, discover
from asyncdiff_nodes.engine.planning.family import Findings, HiddenStates, listed_family
from asyncdiff_nodes.engine.trees import flatten
from asyncdiff_nodes.host.attributes import replaced

from . import user_files
from .banded import LOCAL, in_bands
from .divide import divide

_FILE, _KEPT = "found", 400
_VERSIONS = f"{comfyui_version} {torch.__version__} {__version__}"

_read: dict[str, frozenset[str]] = {}  # fingerprint of a network -> the options that it reads


class _ForwardError(UnsupportedModelError):
    """A forward that fails on the meta device, maybe because of its arguments."""


def options_read(fingerprint: str) -> frozenset[str] | None:
    """Return which of the host's options networks with this fingerprint read; None before that was found out."""
    return _read.get(fingerprint)


def avoid(fingerprint: str, block: str) -> None:
    """Note that networks with this fingerprint may run ``block`` more than once in a call, so that it must not be a block."""
    key = _key(fingerprint, "avoided")
    entries = user_files.load(_FILE)
    user_files.save(_FILE, entries | {key: sorted({*entries.get(key, []), block})}, _KEPT)


def family_of(
    skeleton: nn.Module, patcher: ModelPatcher, fingerprint: str, entry: str, places: tuple[Place, Place] | None, call: Arguments
) -> Family:
    """The family of ``skeleton``, the network of ``patcher``: how to split it, trace it, and divide its calls.

    What is found out is kept in the user's folder, for this configuration of the network and arguments like these.

    Args:
        entry, places, call: of its first call: the method, where latent and timestep are, and its arguments.

    Raises:
        UnsupportedModelError: its class is not listed, and it is found out that it cannot be split.
    """
    family = listed_family(skeleton)
    _read.setdefault(fingerprint, frozenset())
    if family is None:
        own = entry if type(skeleton) is type(patcher.model.diffusion_model) else "forward"
        family = _found(skeleton, fingerprint, own, places, call)
    return replace(family, trace_inputs=traceable, tracing=tracing, divide=divide, banded=in_bands, local=LOCAL)


def _found(skeleton: nn.Module, fingerprint: str, entry: str, places: tuple[Place, Place] | None, call: Arguments) -> Family:
    entries = user_files.load(_FILE)
    avoided = entries.get(_key(fingerprint, "avoided"), [])
    key = _key(fingerprint, repr((entry, places, avoided, _outline(call))))
    data = entries.get(key)
    if data is None:
        read: set[str] = set()
        how = {"entry": entry, "places": places, "prepare": functools.partial(traceable, read=read), "tracing": tracing}
        try:
            data = _to_data(discover(skeleton, *call, **how, avoid=avoided)[0], read)
        except _ForwardError:
            raise
        except UnsupportedModelError as error:
            data = {"reason": str(error)}
        user_files.save(_FILE, user_files.load(_FILE) | {key: data}, _KEPT)
    if "reason" in data:
        raise UnsupportedModelError(data["reason"])
    _read[fingerprint] |= set(data["options"])
    return _from_data(data)


def _to_data(family: Family, options: Iterable[str]) -> dict[str, Any]:
    """What JSON can hold of a family that was found, and of the options that its network reads."""
    hidden = family.hidden and asdict(family.hidden)
    parts = {name: getattr(family, name) for name in ("name", "sample", "timestep", "entry", "keep_shape")}
    return parts | {
        "blocks": family.block_names(None),
        "hidden": hidden,
        "found": asdict(family.found),
        "options": sorted(options),
    }


def _from_data(data: dict[str, Any]) -> Family:
    """The family that :func:`_to_data` was given."""
    hidden = data["hidden"] and HiddenStates(**data["hidden"] | {"argument": tuple(data["hidden"]["argument"])})
    return Family(
        name=data["name"],
        block_names=lambda _: list(data["blocks"]),
        timestep=tuple(data["timestep"]),
        sample=tuple(data["sample"]),
        hidden=hidden,
        entry=data["entry"],
        keep_shape=tuple(data["keep_shape"]),
        found=Findings(**data["found"]),
    )


def _outline(call: Arguments) -> Any:
    """An outline of a call's arguments: what is there, and of how many dimensions, whatever its size."""
    leaves, structure = flatten(call)
    kinds = [(leaf.ndim, str(leaf.dtype)) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in leaves]
    return structure, kinds


def _key(fingerprint: str, more: str) -> str:
    return hashlib.sha256(f"{fingerprint} {_VERSIONS} {more}".encode()).hexdigest()[:24]


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


def traceable(
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
def tracing() -> Iterator[None]:
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
        raise _ForwardError(f"its forward fails on the meta device ({type(error).__name__}: {error})") from error
