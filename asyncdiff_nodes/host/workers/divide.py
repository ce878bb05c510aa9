"""Divide a call of the host's network into parts of its batch. Ranks do so too, so nothing of the host is imported here."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.batch import divide as divide_batch
from asyncdiff_nodes.host import OURS
from asyncdiff_nodes.host.patches.by_reference import ShippedPatch
from asyncdiff_nodes.host.patches.ipadapter import ImageAttention

_PATCHES = ("patches", "patches_replace")
# modules whose patches look at the prompt's item and at the negative prompt's together
_ACROSS_ITEMS = frozenset({"comfy_extras.nodes_nag"})


def divide(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, parts: int) -> list[Arguments]:
    """Divide as :func:`asyncdiff_nodes.engine.batch.divide`. Patches get the prompts of their part, and videos stay whole."""
    options = kwargs["transformer_options"]
    chunks = options.get("cond_or_uncond", [])
    motion = kwargs.get("motion")
    frames = kwargs.get("num_video_frames") or (motion["frames"] if motion else 1)  # per video, computed together
    torn = frames > 1 and (batch // frames) % parts
    if torn or across_items(options, len(chunks)) or (len(chunks) > 1 and len(chunks) % parts):
        return [(args, kwargs)]
    patches = {kind: options[kind] for kind in (*_PATCHES, OURS) if kind in options}  # their tensors are not batches
    rest = {name: value for name, value in options.items() if name not in patches}
    whole = {"motion": motion} if motion else {}  # its masks are for frames, the same in all videos
    parts_of_call = divide_batch(args, {**kwargs, "transformer_options": rest, **dict.fromkeys(whole)}, batch, parts)
    each = len(chunks) // parts
    for part, (_, own) in enumerate(parts_of_call):
        own |= whole
        own["transformer_options"] |= patches
        if len(chunks) > 1:
            own["transformer_options"]["cond_or_uncond"] = chunks[part * each : (part + 1) * each]
    return parts_of_call


def across_items(transformer_options: dict[str, Any], prompts: int) -> bool:
    """Whether a patch looks at several items at once, in a batch with items of so many prompts."""
    in_call = [
        patch
        for kind in _PATCHES
        for patches in transformer_options.get(kind, {}).values()
        for patch in (patches.values() if isinstance(patches, dict) else patches)
    ]
    if any((p.module if isinstance(p, ShippedPatch) else getattr(p, "__module__", None)) in _ACROSS_ITEMS for p in in_call):
        return True
    # masks and weights may belong to one latent each, and the pack finds a prompt's image only if there are two prompts
    return prompts != 2 and any(isinstance(p, ImageAttention) or ImageAttention.of(p) for p in in_call)
