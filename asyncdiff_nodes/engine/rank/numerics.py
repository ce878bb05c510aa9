"""Numerical settings of torch that a worker must share with its parent for identical results."""

from __future__ import annotations

import operator
from typing import Any

import torch

# attributes of torch.backends; some came with later versions
_FP32 = [  # what float32 may be rounded to: of backends, then of kinds of layers
    f"{where}fp32_precision"
    for where in ("", "cudnn.", "mkldnn.", "cuda.matmul.", "cudnn.conv.", "cudnn.rnn.", "mkldnn.matmul.", "mkldnn.conv.")
]
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
    """Take those of float32.

    From torch 2.9 on there are settings of each kind of layer; once they were used, the older ones cannot be read any more.
    """
    if hasattr(torch.backends, "fp32_precision"):
        return {name: operator.attrgetter(name)(torch.backends) for name in _FP32}
    return {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": torch.backends.cudnn.allow_tf32,
    }


def _restore_fp32(settings: dict[str, Any]) -> None:
    if hasattr(torch.backends, "fp32_precision"):
        for name, value in settings.items():
            owner, _, attribute = name.rpartition(".")
            setattr(operator.attrgetter(owner)(torch.backends) if owner else torch.backends, attribute, value)
        return
    torch.set_float32_matmul_precision(settings["matmul_precision"])
    torch.backends.cuda.matmul.allow_tf32 = settings["matmul"]
    torch.backends.cudnn.allow_tf32 = settings["cudnn"]
