"""Models that other nodes compile (``torch.compile``): the ranks compile their own blocks instead, in the same way."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS

from asyncdiff_nodes.engine import UnsupportedModelError

from .by_reference import is_plain
from .protocol import PatchInSampling, RoutedPatch


def is_compiled(patcher: ModelPatcher) -> bool:
    """Whether another node compiles the network of ``patcher`` with the host's own function."""
    return any(COMPILE_KEY in keys for keys in patcher.wrappers.values())


def compile_arguments(patcher: ModelPatcher) -> dict[str, Any] | None:
    """The arguments of ``torch.compile`` for the blocks of ``patcher``; None if no node compiles it.

    Raises:
        UnsupportedModelError: it is compiled in a way that does not work for its blocks.
    """
    if not is_compiled(patcher):
        return None
    given = {name: value for name, value in patcher.model_options.get(TORCH_COMPILE_KWARGS, {}).items() if value is not None}
    # this filter is for inputs of the whole network; blocks have others
    given["options"] = {name: value for name, value in given.get("options", {}).items() if name != "guard_filter_fn"}
    if not given["options"]:
        del given["options"]
    if "backend" not in given or not is_plain(given):
        raise UnsupportedModelError("it is compiled (torch.compile) by code that a worker process does not have")
    graphs = given["backend"] == "cudagraphs" or given.get("mode") in ("reduce-overhead", "max-autotune")
    if graphs or given.get("options", {}).get("triton.cudagraphs"):
        raise UnsupportedModelError("it is compiled (torch.compile) with CUDA graphs, whose results the next call overwrites")
    return given


class Compiled(RoutedPatch):
    """A network that is compiled as a whole by the host, and block by block by the ranks."""

    def obstacle(self, patcher: ModelPatcher, model_options: dict[str, Any]) -> str | None:
        """See :class:`RoutedPatch`."""
        if any("compile" in str(key) and key != COMPILE_KEY for keys in patcher.wrappers.values() for key in keys):
            return "another pack compiles the model in its own way"
        return None

    def identity(self, patcher: ModelPatcher) -> Any:
        """See :class:`RoutedPatch`."""
        return compile_arguments(patcher)

    def begin(self, patcher: ModelPatcher) -> PatchInSampling | None:
        """See :class:`RoutedPatch`."""
        return _CompiledSampling() if is_compiled(patcher) else None


class _CompiledSampling(PatchInSampling):
    rounds = True  # compiled by itself, a block becomes other code than inside the network

    def begin(self, model_options: dict[str, Any]) -> None:
        """Make this sampling call the network itself, which the ranks compute, instead of the compiled one."""
        model_options["transformer_options"]["wrappers"].get(WrappersMP.APPLY_MODEL, {}).pop(COMPILE_KEY, None)
