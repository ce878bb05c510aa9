"""Models that other nodes compile (``torch.compile``): the ranks compile their own blocks instead, as these nodes ask for."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS

from asyncdiff_nodes.engine import UnsupportedModelError

from .by_reference import is_plain


def compile_arguments(patcher: ModelPatcher) -> dict[str, Any] | None:
    """The arguments of ``torch.compile`` for the blocks of ``patcher``; None if nobody compiles it.

    Raises:
        UnsupportedModelError: it is compiled in a way that cannot be that of its blocks.
    """
    if not any(COMPILE_KEY in keys for keys in patcher.wrappers.values()):
        return None
    given = {name: value for name, value in patcher.model_options.get(TORCH_COMPILE_KWARGS, {}).items() if value is not None}
    # which inputs of the whole network need no second look; blocks have others
    given["options"] = {name: value for name, value in given.get("options", {}).items() if name != "guard_filter_fn"}
    if not given["options"]:
        del given["options"]
    if "backend" not in given or not is_plain(given):
        raise UnsupportedModelError("it is compiled (torch.compile) by code that a worker process does not have")
    graphs = given["backend"] == "cudagraphs" or given.get("mode") in ("reduce-overhead", "max-autotune")
    if graphs or given.get("options", {}).get("triton.cudagraphs"):
        raise UnsupportedModelError("it is compiled (torch.compile) with CUDA graphs, whose results the next call overwrites")
    return given


def without_compiled_network(model_options: dict[str, Any]) -> None:
    """Have this sampling call the network itself, which the ranks compute, in place of the compiled one."""
    model_options["transformer_options"]["wrappers"].get(WrappersMP.APPLY_MODEL, {}).pop(COMPILE_KEY, None)
