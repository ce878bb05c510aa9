"""Numerical settings of torch that a worker must share with its parent for identical results."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

# attributes of torch.backends: what float32 may be rounded to, at large and in kinds of layers (from torch 2.9 on)
_FP32 = [
    f"{where}fp32_precision"
    for where in ("", "cudnn.", "mkldnn.", "cuda.matmul.", "cudnn.conv.", "cudnn.rnn.", "mkldnn.matmul.", "mkldnn.conv.")
]
_ALLOW_TF32 = ("cuda.matmul.allow_tf32", "cudnn.allow_tf32")  # the older ones
_REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_CUDNN = ("benchmark", "deterministic", "enabled")
_ATTENTION = {  # how to ask -> how to say
    "flash_sdp_enabled": "enable_flash_sdp",
    "mem_efficient_sdp_enabled": "enable_mem_efficient_sdp",
    "math_sdp_enabled": "enable_math_sdp",
    "cudnn_sdp_enabled": "enable_cudnn_sdp",
    "fp16_bf16_reduction_math_sdp_allowed": "allow_fp16_bf16_reduction_math_sdp",
}


def snapshot() -> dict[str, Any]:
    """Take this process's settings, picklable."""
    cuda = torch.backends.cuda
    return {
        "fp32": _fp32(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": {name: getattr(torch.backends.cudnn, name) for name in _CUDNN},
        "cuda_matmul": _cuda_matmul(),
        "attention": {say: getattr(cuda, ask)() for ask, say in _ATTENTION.items()},
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def restore(settings: dict[str, Any]) -> None:
    """Apply a :func:`snapshot` in this process."""
    _restore_fp32(settings["fp32"])
    deterministic = settings["deterministic"], settings["deterministic_warn_only"]
    # only where it changes something: the call imports torch's compiler, half of the time that a worker takes to start
    if deterministic != (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()):
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
    for name, value in settings["cudnn"].items():
        setattr(torch.backends.cudnn, name, value)
    for name, value in settings["cuda_matmul"].items():
        setattr(torch.backends.cuda.matmul, name, value)
    for say, value in settings["attention"].items():
        getattr(torch.backends.cuda, say)(value)
    torch.backends.mkldnn.set_flags(settings["mkldnn"])


def _cuda_matmul() -> dict[str, Any]:
    matmul, settings = torch.backends.cuda.matmul, {}
    if hasattr(matmul, "allow_fp16_accumulation"):
        settings["allow_fp16_accumulation"] = matmul.allow_fp16_accumulation
    for name in _REDUCED:
        split = getattr(matmul, f"{name}_split_k", None)
        settings[name] = getattr(matmul, name) if split is None else (getattr(matmul, name), split)
    return settings


def _fp32() -> dict[str, Any]:
    """Take those of float32, the older ones and, where torch has them, the newer ones.

    Once only the newer ones were set, torch refuses to tell the older ones: such code as its own compiler then fails. So a rank
    is given both. Where this process is in that state itself, the older ones are left out, and the rank gets into it, too.
    """
    older = {name: _get(name) for name in _ALLOW_TF32 if _known(partial(_get, name))}
    if _known(torch.get_float32_matmul_precision):
        older["precision"] = torch.get_float32_matmul_precision()
    return {"older": older, "newer": {name: _get(name) for name in _FP32} if hasattr(torch.backends, "fp32_precision") else {}}


def _restore_fp32(settings: dict[str, Any]) -> None:
    older = dict(settings["older"])
    precision = older.pop("precision", None)
    for name, value in older.items():
        _set(name, value)
    if precision is not None:  # after allow_tf32, which sets it to one of two of its three values
        torch.set_float32_matmul_precision(precision)
    for name, value in settings["newer"].items():
        _set(name, value)


def _known(ask: Callable[[], Any]) -> bool:
    try:
        ask()
    except RuntimeError:  # it contradicts what was set by the other interface
        return False
    return True


def _get(name: str) -> Any:
    return operator.attrgetter(name)(torch.backends)


def _set(name: str, value: Any) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(operator.attrgetter(owner)(torch.backends) if owner else torch.backends, attribute, value)
