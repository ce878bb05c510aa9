"""The batch of a sampling's calls, such as the two halves of CFG: whether branches are for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.engine import Plan
from asyncdiff_nodes.host.page.progress import title
from asyncdiff_nodes.host.patches.animatediff.calls import motion_models
from asyncdiff_nodes.host.workers.memory import room_for_weights

from .divide import across_items

# With these the host may evaluate a prompt in calls of its own, or not in all steps.
_APART = frozenset({"area", "start_percent", "end_percent", "gligen", "hooks"})


def items_per_call(guider: Any, conds: dict[str, Any], model_options: dict[str, Any], batch: int) -> int:
    """Batch items of each call of the network that ``guider`` will make for ``batch`` latents, as far as can be foretold.

    1 where the host will, or may, evaluate the prompts one after the other. The frames of a video are one item.
    """
    model = guider.model_patcher
    if model.model.model_config.unet_config.get("use_temporal_attention") or motion_models(model):
        batch = 1
    prompts = {name: entries for name, entries in conds.items() if entries}
    optimized = not model_options.get("disable_cfg1_optimization", False)
    if prompts.keys() == {"positive", "negative"} and math.isclose(getattr(guider, "cfg", 0.0), 1.0) and optimized:
        del prompts["negative"]
    found = [entry for entries in prompts.values() for entry in entries]
    alike = len(found) == len(prompts) and len({id(entry.get("control")) for entry in found}) == 1
    apart = any(_APART & entry.keys() or entry.get("set_area_to_bounds") for entry in found)
    if apart or not alike or across_items(model_options.get("transformer_options", {}), len(prompts)):
        return 1
    return len(prompts) * batch


def affordable(patchers: Sequence[ModelPatcher], plan: Plan, devices: Sequence[str], memory: float) -> bool:
    """Whether each branch has equal devices, and these room for their part of these networks and of ``memory``, that of a call.

    A branch on a slower device would hold up the others: segments can be cut to measure.
    """
    if len(set(map(title, devices))) > 1:
        return False
    size = sum(patcher.model_size() for patcher in patchers)
    return size / plan.segments < min(room_for_weights(devices, memory / plan.branches, patchers))
