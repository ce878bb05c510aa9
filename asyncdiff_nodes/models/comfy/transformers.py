"""ComfyUI's diffusion transformers, one row each: which modules are blocks, and the inputs that a first trace takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.errors import UnsupportedModelError
from asyncdiff_nodes.engine.planning.family import Family, HiddenStates
from asyncdiff_nodes.models.network import Network
from asyncdiff_nodes.models.stack import meta, stacked


def _inputs(net: Network, channels: int, size: Any, batch: int, text: int, tokens: int, **others: Any) -> Arguments:
    """Inputs of one call: ``x`` [B, C, (F,) h, w] for a ``size`` of one side or of all, and ``tokens`` of ``text`` channels."""
    sides = (size, size) if isinstance(size, int) else size
    kwargs = {"context": meta(batch, tokens, text, dtype=net.dtype), "transformer_options": {}}
    return (meta(batch, channels, *sides, dtype=net.dtype), meta(batch)), kwargs | others


def _frames(size: Any, default: tuple[int, int, int]) -> tuple[int, int, int]:
    """Latent frames, height and width."""
    return (default[0], size, size) if isinstance(size, int) else tuple(size or default)


def _width(net: Network, layer: str) -> int:
    """Input channels of the layer of this name."""
    width: int = net.get_submodule(layer).weight.shape[1]
    return width


def _flux_inputs(net: Network, size: Any = None, batch: int = 1) -> Arguments:
    params = net.params
    pooled = None if params.vec_in_dim is None else meta(batch, params.vec_in_dim, dtype=net.dtype)
    guidance = meta(batch) if params.guidance_embed else None
    return _inputs(net, params.in_channels, size or 128, batch, params.context_in_dim, 256, y=pooled, guidance=guidance)


def _hunyuan_blocks(net: Network) -> list[str]:
    if getattr(net, "time_r_in", None) is not None:
        raise UnsupportedModelError(
            "its HunyuanVideo is distilled by mean flow: every call reads the sampler's schedule, which a rank does not have"
        )
    return _HUNYUAN_BLOCKS(net)


def _hunyuan_inputs(net: Network, size: Any = None, batch: int = 1) -> Arguments:
    return _flux_inputs(net, _frames(size, (33, 90, 160))[-len(net.patch_size) :], batch)  # made with the same parameters


def _ltxv_inputs(net: Network, size: Any = None, batch: int = 2) -> Arguments:
    channels, sides = _width(net, "patchify_proj"), _frames(size, (13, 16, 24))
    # where nothing projects the prompt, the blocks take it as it is
    projected = isinstance(net.caption_projection, nn.Module)
    text = _width(net, "caption_projection.linear_1" if projected else "transformer_blocks.0.attn2.to_k")
    return _inputs(net, channels, sides, batch, text, 128, attention_mask=None)


def _lumina_inputs(net: Network, size: Any = None, batch: int = 2) -> Arguments:
    return _inputs(net, net.in_channels, size or 128, batch, _width(net, "cap_embedder.1"), 128, num_tokens=128)


def _qwen_inputs(net: Network, size: Any = None, batch: int = 2) -> Arguments:
    sides = _frames(size, (1, 128, 128))
    return _inputs(net, net.in_channels // net.patch_size**2, sides, batch, _width(net, "txt_in"), 128)


def _sd3_inputs(net: Network, size: Any = None, batch: int = 2) -> Arguments:
    text = getattr(net.context_embedder, "in_features", net.hidden_size)  # there may be nothing to embed
    pooled = None if net.y_embedder is None else meta(batch, _width(net, "y_embedder.mlp.0"), dtype=net.dtype)
    return _inputs(net, net.in_channels, size or 128, batch, text, 154, y=pooled)


def _wan_inputs(wan: Network, size: Any = None, batch: int = 2) -> Arguments:
    channels, text = _width(wan, "patch_embedding"), _width(wan, "text_embedding.0")
    return _inputs(wan, channels, _frames(size, (21, 60, 104)), batch, text, 512)


_X, _TIMESTEP, _TIMESTEPS = (0, "x"), (1, "timestep"), (1, "timesteps")
_FLUX_BLOCKS = stacked(("img_in", "txt_in"), ("double_blocks", "single_blocks"), ("final_layer",))
_LTXV_BLOCKS = stacked(("patchify_proj",), ("transformer_blocks",), ("proj_out",))
# pictures to refer to pass the embedders, too, which a block could do only once: they are left to every rank
_HUNYUAN_BLOCKS = stacked(("txt_in",), ("double_blocks", "single_blocks"), ("final_layer",))
_LUMINA_BLOCKS = stacked((), ("context_refiner", "noise_refiner", "layers"), ("final_layer",))
_QWEN_BLOCKS = stacked(("img_in", "txt_norm", "txt_in"), ("transformer_blocks",), ("norm_out", "proj_out"))
_SD3_BLOCKS = stacked(("x_embedder", "context_embedder"), ("joint_blocks",), ("final_layer",))
_WAN_BLOCKS = stacked(("patch_embedding",), ("blocks",), ("head",))

_FLUX_HIDDEN = HiddenStates("double_blocks.0", (0, "img"), {"double_blocks": 0, "single_blocks": 0})
# behind those, hidden states are joined with the prompt's in one order or the other, by version of ComfyUI
_HUNYUAN_HIDDEN = HiddenStates("double_blocks.0", (0, "img"), {"double_blocks": 0})
_LTXV_HIDDEN = HiddenStates("transformer_blocks.0", (0, "x"), {"transformer_blocks": 0})
_LUMINA_HIDDEN = HiddenStates("noise_refiner.0", (0, "x"), {"noise_refiner": 0, "layers": 0})
_QWEN_HIDDEN = HiddenStates("transformer_blocks.0", (0, "hidden_states"), {"transformer_blocks": 1})
_SD3_HIDDEN = HiddenStates("joint_blocks.0", (1, "x"), {"joint_blocks": 1})
_WAN_HIDDEN = HiddenStates("blocks.0", (0, "x"), {"blocks": 0})

# FLUX.1, and what is built like it
FLUX = Family("Flux", _FLUX_BLOCKS, _TIMESTEP, _flux_inputs, sample=_X, hidden=_FLUX_HIDDEN)
# HunyuanVideo
HUNYUAN_VIDEO = Family("HunyuanVideo", _hunyuan_blocks, _TIMESTEP, _hunyuan_inputs, sample=_X, hidden=_HUNYUAN_HIDDEN)
# LTX-Video
LTXV = Family("LTXVModel", _LTXV_BLOCKS, _TIMESTEP, _ltxv_inputs, sample=_X, hidden=_LTXV_HIDDEN)
# Lumina Image 2 and Z-Image
LUMINA = Family("NextDiT", _LUMINA_BLOCKS, _TIMESTEPS, _lumina_inputs, sample=_X, hidden=_LUMINA_HIDDEN)
# Qwen-Image and its editing models
QWEN_IMAGE = Family("QwenImageTransformer2DModel", _QWEN_BLOCKS, _TIMESTEP, _qwen_inputs, sample=_X, hidden=_QWEN_HIDDEN)
# SD 3 and SD 3.5
SD3 = Family("OpenAISignatureMMDITWrapper", _SD3_BLOCKS, _TIMESTEPS, _sd3_inputs, sample=_X, hidden=_SD3_HIDDEN)
# Wan 2.1 and 2.2
WAN = Family("WanModel", _WAN_BLOCKS, _TIMESTEP, _wan_inputs, sample=_X, hidden=_WAN_HIDDEN)
