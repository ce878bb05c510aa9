"""The batch of a sampling's calls, such as the two halves of CFG, and whether branches can share it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher

from asyncdiff_nodes.engine import Plan
from asyncdiff_nodes.host.page.progress import title
from asyncdiff_nodes.host.patches.registry import models_of
from asyncdiff_nodes.host.workers.divide import across_items

# With these keys the host may evaluate a prompt in separate calls, or not in every step.
_APART = frozenset({"area", "start_percent", "end_percent", "gligen", "hooks"})


def items_per_call(guider: Any, conds: dict[str, Any], model_options: dict[str, Any], batch: int) -> int:
    """Number of batch items in each call of the network that ``guider`` makes for ``batch`` latents, as far as is known.

    It is 1 where the host will, or may, evaluate the prompts one after the other. The frames of a video are one item.
    """
    model = guider.model_patcher
    if model.model.model_config.unet_config.get("use_temporal_attention") or models_of(model):
        batch = 1
    prompts = {name: entries for name, entries in conds.items() if entries}
    optimized = not model_options.get("disable_cfg1_optimization", False)
    if prompts.keys() == {"positive", "negative"} and math.isclose(getattr(guider, "cfg", 0.0), 1.0) and optimized:
        del prompts["negative"]
    entries_of_all = [entry for entries in prompts.values() for entry in entries]
    alike = len(entries_of_all) == len(prompts) and len({id(entry.get("control")) for entry in entries_of_all}) == 1
    apart = any(_APART & entry.keys() or entry.get("set_area_to_bounds") for entry in entries_of_all)
    if apart or not alike or across_items(model_options.get("transformer_options", {}), len(prompts)):
        return 1
    return len(prompts) * batch


def affordable(patchers: Sequence[ModelPatcher], plan: Plan, devices: Sequence[str], room: Sequence[float]) -> bool:
    """Whether all devices are equal and have room for their part of the networks, ``room`` bytes of weights each.

    A branch or a band on a slower device would hold up the others. Segments, however, can be cut to fit their device.
    """
    if len(set(map(title, devices))) > 1:
        return False
    size = sum(patcher.model_size() for patcher in patchers)
    return size / plan.weight_parts < min(room)
