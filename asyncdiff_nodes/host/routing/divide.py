"""How a call of the host's network is divided into parts of its batch. Ranks do so, too: nothing of the host is imported here."""

from __future__ import annotations

from typing import Any

from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.batch import divide as divide_batch
from asyncdiff_nodes.host.patches.by_reference import ShippedPatch
from asyncdiff_nodes.host.patches.ipadapter import ImageAttention
from asyncdiff_nodes.host.patches.tome import NUMBERS

_PATCHES = ("patches", "patches_replace")
# the prompt's item and the negative one's
_ACROSS_ITEMS = frozenset({"comfy_extras.nodes_nag"})


def divide(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, parts: int) -> list[Arguments]:
    """See :func:`asyncdiff_nodes.engine.batch.divide`; patches are told which prompts their part has, videos stay whole."""
    options = kwargs["transformer_options"]
    chunks = options.get("cond_or_uncond", [])
    motion = kwargs.get("motion")
    frames = kwargs.get("num_video_frames") or (motion["frames"] if motion else 1)  # of each video: they are computed together
    torn = frames > 1 and (batch // frames) % parts
    if torn or across_items(options, len(chunks)) or (len(chunks) > 1 and len(chunks) % parts):
        return [(args, kwargs)]
    patches = {kind: options[kind] for kind in (*_PATCHES, NUMBERS) if kind in options}  # what they look at is no batch
    rest = {name: value for name, value in options.items() if name not in patches}
    whole = {"motion": motion} if motion else {}  # its masks are of frames, for all videos
    found = divide_batch(args, {**kwargs, "transformer_options": rest, **dict.fromkeys(whole)}, batch, parts)
    each = len(chunks) // parts
    for part, (_, own) in enumerate(found):
        own |= whole
        own["transformer_options"] |= patches
        if len(chunks) > 1:
            own["transformer_options"]["cond_or_uncond"] = chunks[part * each : (part + 1) * each]
    return found


def across_items(transformer_options: dict[str, Any], prompts: int) -> bool:
    """Whether there is a patch that looks at several items at once of a batch with items of so many prompts."""
    found = [
        patch
        for kind in _PATCHES
        for patches in transformer_options.get(kind, {}).values()
        for patch in (patches.values() if isinstance(patches, dict) else patches)
    ]
    if any((p.module if isinstance(p, ShippedPatch) else getattr(p, "__module__", None)) in _ACROSS_ITEMS for p in found):
        return True
    # masks and weights may be of one latent each, and which image is a prompt's the pack finds by whether there are two
    return prompts != 2 and any(isinstance(p, ImageAttention) or ImageAttention.of(p) for p in found)
