"""Check the inputs of a node: a link may bring anything, and the host checks widgets only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from asyncdiff_nodes.engine import AsyncDiffError
from asyncdiff_nodes.host.routing.options import Options

from .values import number, shown, whole

_NUMBERS: dict[str, tuple[Callable[[Any], Any], str]] = {"INT": (whole, "a whole number"), "FLOAT": (number, "a number")}
_SEEDS = (-(2**63), 2**64 - 1)  # PyTorch's
# the numbers that the host can use, where it cannot use all; NaN is in no range
_RANGES = {
    "seed": _SEEDS,
    "noise_seed": _SEEDS,
    "steps": (0, 2**63 - 1),
    "start_at_step": (0, math.inf),
    "end_at_step": (0, math.inf),
    "denoise": (-math.inf, math.inf),
}


class InputError(AsyncDiffError, ValueError):
    """A value that an input of a node does not accept."""


def checked(node: type[io.ComfyNode], **values: Any) -> dict[str, Any]:
    """Check ``values``, inputs of ``node`` by name, and return them with all numbers as Python's own.

    Each value must be of the type that the schema names. Whatever the host's KSampler accepts is accepted, even if its widgets
    do not offer it.

    Raises:
        InputError: a value is of another type, or nothing can be sampled with it.
    """
    plain = values | {each.id: _checked(each, values[each.id]) for each in node.define_schema().inputs if each.id in values}
    if plain.get("steps") == 0:
        _check_schedule(**plain)
    return plain


def _checked(wanted: io.Input, value: Any) -> Any:
    """Return ``value`` in the form that the input ``wanted`` accepts."""
    if value is None and wanted.optional:
        return None
    kind, name = wanted.get_io_type(), wanted.id
    if kind == "COMBO":
        if not isinstance(value, str) or value not in wanted.options:
            few = wanted.options if len(wanted.options) <= 10 else [*wanted.options[:10], "..."]
            raise InputError(f"{name}={shown(value)}: choose one of {', '.join(few)}")
        return value
    if kind in _NUMBERS:
        take, what = _NUMBERS[kind]
        if (plain := take(value)) is None:
            raise InputError(f"{name}={shown(value)}: choose {what}, {wanted.min} to {wanted.max}")
        if name in _RANGES and not _RANGES[name][0] <= plain <= _RANGES[name][1]:
            raise InputError(f"{name}={shown(value)} is out of range: choose {wanted.min} to {wanted.max}")
        return plain
    takes, cure = _KINDS[kind]
    if not takes(value):
        raise InputError(
            f"{name}={shown(value)} is not of type {kind}: {cure}" + (", or leave it out" if wanted.optional else "")
        )
    return value


def _is_conditioning(value: Any) -> bool:
    """Whether this is a list, perhaps empty, of pairs: a prompt's tensor or None, and a dictionary about it."""
    return isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) and _is_prompt(*pair[:2]) for pair in value)


def _is_prompt(tensor: Any = None, said: Any = None) -> bool:
    return (tensor is None or _is_tensor(tensor)) and isinstance(said, dict)


def _is_tensor(value: Any) -> bool:
    """Whether this is a tensor, or an object of the host's class for several tensors of different shapes."""
    return hasattr(value, "is_nested")


def _check_schedule(model: ModelPatcher, steps: int, sampler_name: str, scheduler: str, denoise: float = 1.0, **_: Any) -> None:
    """Refuse 0 steps if the host's schedule does not allow them. If it does, there is nothing to sample."""
    try:
        comfy.samplers.KSampler(model, steps, model.load_device, sampler_name, scheduler, denoise)
    except ArithmeticError as error:
        raise InputError(f"steps={steps} is out of range for scheduler={scheduler}: choose 1 or more") from error


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "MODEL": (lambda value: isinstance(value, ModelPatcher), "link the MODEL of a loader, such as Load Checkpoint"),
    "CONDITIONING": (_is_conditioning, "link the CONDITIONING of a text encoder, such as CLIP Text Encode (Prompt)"),
    "LATENT": (
        lambda value: isinstance(value, dict) and _is_tensor(value.get("samples")),
        "link the LATENT of a node such as Empty Latent Image or VAE Encode",
    ),
    "VAE": (
        lambda value: callable(getattr(value, "decode", None)) and not isinstance(value, bytes),
        "link the VAE of a loader, such as Load Checkpoint",
    ),
    "STRING": (lambda value: isinstance(value, str), "write a text, or link one"),
    "ASYNCDIFF_OPTIONS": (lambda value: isinstance(value, Options), "link the output of AsyncDiff Options"),
}
