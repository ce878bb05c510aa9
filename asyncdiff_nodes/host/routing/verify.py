"""Compare calls of the ranks with the host's own results: a safety net for cases that nobody has thought of."""

from __future__ import annotations

import platform
import sys
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_version import __version__ as comfyui_version

from asyncdiff_nodes import __version__
from asyncdiff_nodes.engine import WorkerGroup, accelerator
from asyncdiff_nodes.engine.devices import on_cluster
from asyncdiff_nodes.engine.trees import flatten
from asyncdiff_nodes.host.patches.packs import around, code_name, of_host

# allowed difference, relative to the result: rounding adds up over the layers; other weights or code change much more
_ROUNDING = {torch.float16: 3e-2, torch.bfloat16: 1e-1}
_ROUNDING_OF_OTHERS = 1e-3

# model of the host -> the kinds of its calls that were compared; and why it is no longer routed
_compared: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()
_wrong: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def distrusted(patcher: ModelPatcher) -> str | None:
    """Why the host computes this model from now on, in words; None if its ranks were never wrong."""
    return _wrong.get(patcher.model)


def strangers(patcher: ModelPatcher, model_options: dict[str, Any], guider: Any) -> list[str]:
    """Names of code of other packs that is attached to a model, or guides it, so that no test covers it."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    callbacks = [each for keys in patcher.callbacks.values() for each in keys.values()]
    hooks = [each for keys in wrappers.values() for each in keys.values()]
    attached = [function for each in (*hooks, *callbacks) for function in each]
    attached += [*around(model_options), *patcher.object_patches.values(), type(guider)]
    return sorted({code_name(each) for each in attached if not of_host(each)})


class Audit:
    """The comparisons of one sampling.

    Args:
        mode: ``off``; ``first``: a call of each kind, once per model; ``always``: once per sampling; ``auto``: like ``first``,
            if there are strangers. Nothing is compared where there is no room for the host's network.
        strange: see :func:`strangers`.
        rounds: because of a patch, the ranks' results equal the host's only up to rounding.

    Attributes:
        agreed: how many calls gave the host's result.
        lacked_room: a call was not compared although the user wanted that, since the host has no room for its network.
    """

    def __init__(self, mode: str, patcher: ModelPatcher, strange: list[str], rounds: bool) -> None:
        self.agreed, self.lacked_room = 0, False
        self._mode, self._patcher, self._strange, self._rounds = mode, patcher, strange, rounds
        self._kinds: set[Hashable] = set() if mode == "always" else _compared.setdefault(patcher.model, set())

    def wants(self, kind: Hashable, x: torch.Tensor) -> bool:
        """Whether to compare a call of this ``kind`` at ``x``; the caller must then do so."""
        kind = (self._patcher.patches_uuid, *self._strange, kind)
        if self._mode == "off" or kind in self._kinds or (self._mode == "auto" and not self._strange):
            return False
        self._kinds.add(kind)
        if not self._has_room(x):
            self.lacked_room = self._mode != "auto"
            return False
        return True

    @property
    def watches(self) -> bool:
        """Whether the user lets anything be compared."""
        return self._mode != "off"

    def _has_room(self, x: torch.Tensor) -> bool:
        need = self._patcher.model_size() + self._patcher.memory_required(list(x.shape))
        return comfy.model_management.get_free_memory(self._patcher.load_device) > need

    def differs(
        self, group: WorkerGroup, computed: Any, expected: Any, x: torch.Tensor, facts: dict[str, Any], rounds: bool = False
    ) -> str | None:
        """A report for the user where ``computed``, the ranks' result, is not the ``expected`` one of the host; None where it is.

        Args:
            facts: more facts about the call at ``x``, for the report.
            rounds: a difference as of rounding is none in any case.
        """
        if isinstance(computed, tuple) and isinstance(expected, torch.Tensor):
            computed = computed[0]  # the others are what a patch saw
        computed, expected = _joined(computed), _joined(expected)
        alike = computed.shape == expected.shape and computed.dtype == expected.dtype
        if alike and torch.equal(computed, expected):
            self.agreed += 1
            return None
        far = float("inf")
        if alike:
            a, b = computed.double(), expected.double()
            far = float((a - b).norm() / b.norm().clamp_min(1e-12))
            exact = _bit_by_bit(group, x.device) and not _unaligned(self._patcher.model.diffusion_model)
            rounds = rounds or self._rounds or not exact
            if rounds and far <= _ROUNDING.get(x.dtype, _ROUNDING_OF_OTHERS):
                self.agreed += 1
                return None
        network = self._patcher.model.diffusion_model
        reason = f"the ranks computed a call of its {type(network).__name__} differently from ComfyUI (found by verify)"
        _wrong[self._patcher.model] = reason
        details = {
            "relative difference": f"{far:.3g}",
            "versions": f"AsyncDiff {__version__}, ComfyUI {comfyui_version}, PyTorch {torch.__version__}, "
            f"Python {platform.python_version()}, {sys.platform}",
            "devices": f"{', '.join(group.devices)}; ComfyUI's is {x.device}",
            "plan": group.plan,
            "cuts": ", ".join(group.placement.cuts),
            "model": f"{type(self._patcher.model).__name__}, {self._patcher.model_dtype()}, {len(self._patcher.patches)} patched",
            "latent": f"{x.dtype} {list(x.shape)}",
            "code of other packs on it": ", ".join(self._strange) or "none",
            **facts,
        }
        return "\n".join([f"{reason}: please report this", *(f"  {name}: {value}" for name, value in details.items())])


def _unaligned(network: Any) -> bool:
    """Whether some weights lie in memory as a file has them: a CPU's products of such matrices are rounded otherwise."""
    return any(type(weight.data) is torch.Tensor and weight.is_cpu and weight.data_ptr() % 64 for weight in network.parameters())


def _joined(result: Any) -> torch.Tensor:
    """A network's result as one tensor, in which NaN is equal to NaN."""
    leaves = [leaf.nan_to_num() for leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor)]
    return leaves[0] if len(leaves) == 1 else torch.cat([leaf.flatten() for leaf in leaves])


def _bit_by_bit(group: WorkerGroup, device: torch.device) -> bool:
    """Whether the host's result on ``device`` must be the same bit for bit: the whole batch, on devices of the same kind."""
    plan = group.plan
    if plan.branches > 1 or plan.microbatches > 1 or plan.bands > 1:
        return False
    if any(on_cluster(each) or torch.device(each).type != device.type for each in group.devices):
        return False
    if device.type == "cpu":
        return torch.get_num_threads() == 1  # sums are split over the threads, and ranks share the threads
    return len({accelerator.title(str(each)) for each in (*group.devices, device)}) == 1
