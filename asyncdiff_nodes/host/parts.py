"""How a call of the host's network is divided into parts of its batch. Ranks do so, too: nothing of the host is imported here."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.batch import divide as divide_batch

from .shipping import ShippedPatch

# the prompt's item and the negative one's
_ACROSS_ITEMS = frozenset({"comfy_extras.nodes_nag"})


def divide(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, parts: int) -> list[Arguments]:
    """See :func:`asyncdiff_nodes.engine.batch.divide`; patches are told which prompts their part has, videos stay whole."""
    options = kwargs["transformer_options"]
    chunks = options.get("cond_or_uncond", [])
    frames = kwargs.get("num_video_frames") or 1  # of each video: they are computed together
    torn = frames > 1 and (batch // frames) % parts
    if torn or across_items(options) or (len(chunks) > 1 and len(chunks) % parts):
        return [(args, kwargs)]
    found = divide_batch(args, kwargs, batch, parts)
    if len(chunks) > 1:
        each = len(chunks) // parts
        for part, (_, own) in enumerate(found):
            own["transformer_options"]["cond_or_uncond"] = chunks[part * each : (part + 1) * each]
    return found


def across_items(transformer_options: dict[str, Any]) -> bool:
    """Whether there is a patch that looks at several items of a batch at once."""
    found = [
        patch
        for kind in ("patches", "patches_replace")
        for patches in transformer_options.get(kind, {}).values()
        for patch in (patches.values() if isinstance(patches, dict) else patches)
    ]
    return any((p.module if isinstance(p, ShippedPatch) else getattr(p, "__module__", None)) in _ACROSS_ITEMS for p in found)
