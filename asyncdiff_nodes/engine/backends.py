"""Numerical settings of torch that a worker must share with its parent for identical results."""

from __future__ import annotations

from typing import Any

import torch


def snapshot() -> dict[str, Any]:
    """The parent's settings, picklable."""
    return {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": {name: getattr(torch.backends.cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic", "enabled")},
        "cuda_matmul": {
            name: getattr(torch.backends.cuda.matmul, name)
            for name in ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
        },
        "sdp": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ],
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def restore(settings: dict[str, Any]) -> None:
    """Apply a :func:`snapshot` in this process."""
    torch.set_float32_matmul_precision(settings["matmul_precision"])
    deterministic = settings["deterministic"], settings["deterministic_warn_only"]
    # only where it changes something: the call imports torch's compiler, half of the time that a worker takes to start
    if deterministic != (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()):
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
    for name, value in settings["cudnn"].items():
        setattr(torch.backends.cudnn, name, value)
    for name, value in settings["cuda_matmul"].items():
        setattr(torch.backends.cuda.matmul, name, value)
    flash, efficient, math = settings["sdp"]
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_math_sdp(math)
    torch.backends.mkldnn.set_flags(settings["mkldnn"])
