"""Find out how the most used networks are split, at their true size, and write docs/data/true_size.json. No weight is loaded.

python tools/measure/true_size.py [FILE]

Then python tools/measure/tables.py for the page that shows it. It takes two minutes, within an installed ComfyUI.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import within_host

DEVICES = (2, 3, 4)
_WAN = {"model_type": "t2v", "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "in_dim": 16, "out_dim": 16}
_FLUX = {
    "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 15360, "hidden_size": 6144, "mlp_ratio": 3.0,
    "num_heads": 48, "depth": 8, "depth_single_blocks": 48, "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1,
    "qkv_bias": False, "guidance_embed": True, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True,
    "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
}  # fmt: skip
_CHROMA = {
    "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5,
    "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": [], "vec_in_dim": None,
}  # fmt: skip
_Z_IMAGE = {
    "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30,
    "qk_norm": True, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "context_in_dim": 3584,
    "hidden_size": 2048, "mlp_ratio": 4.0, "num_heads": 16, "depth": 54, "depth_single_blocks": 0,
    "axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True, "guidance_embed": False, "byt5": True, "meanflow": False,
    "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True,
}  # fmt: skip
# family: class, configuration, shapes of the latent (several where it denoises several), of the prompt, and of other tensors
NETWORKS: dict[str, tuple[str, dict[str, Any], list[tuple[int, ...]], tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "MiniMax-H3": (
        "minimax.model.MiniMaxH3Model", {}, [(1, 24, 16, 45, 80), (1, 32, 2, 60)], (1, 256, 5376), {},
    ),
    "Qwen-Image": (
        "qwen_image.model.QwenImageTransformer2DModel", {"in_channels": 64, "num_layers": 60}, [(1, 16, 1, 128, 128)],
        (1, 128, 3584), {},
    ),
    "LTX-2": (
        "lightricks.av_model.LTXAVModel", {}, [(1, 128, 16, 22, 40), (1, 8, 126, 16)], (1, 1024, 7680), {},
    ),
    "Wan 2.1, 2.2 14B": ("wan.model.WanModel", _WAN, [(1, 16, 21, 60, 104)], (1, 512, 4096), {}),
    "Z-Image": ("lumina.model.NextDiT", _Z_IMAGE, [(1, 16, 128, 128)], (1, 128, 2560), {}),
    "Krea 2": ("krea2.model.SingleStreamDiT", {}, [(1, 16, 128, 128)], (1, 128, 12 * 2560), {}),
    "FLUX.2": ("flux.model.Flux", _FLUX, [(1, 128, 64, 64)], (1, 512, 15360), {"guidance": (1,)}),
    "Chroma": ("chroma.model.Chroma", _CHROMA, [(1, 16, 128, 128)], (1, 256, 4096), {"guidance": (1,)}),
    "HunyuanVideo 1.5": (
        "hunyuan_video.model.HunyuanVideo", _HUNYUAN, [(1, 65, 31, 45, 80)], (1, 256, 3584),
        {"txt_byt5": (1, 40, 1472), "clip_fea": (1, 729, 1152)},
    ),
    "Kandinsky 5": ("kandinsky5.model.Kandinsky5", {}, [(1, 33, 31, 64, 96)], (1, 256, 3584), {"y": (1, 768)}),
}  # fmt: skip


def rows() -> Iterator[dict[str, Any]]:
    """Yield one row for each network and number of devices."""
    import importlib

    import comfy.ops
    import torch

    from asyncdiff_nodes.cli.placements import describe
    from asyncdiff_nodes.engine import Plan, place
    from asyncdiff_nodes.engine.planning.discovery import discover
    from asyncdiff_nodes.host.workers import found

    torch.set_num_threads(1)
    dtype = torch.bfloat16

    def empty(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for family, (path, config, latents, prompt, others) in NETWORKS.items():
        module, _, name = path.rpartition(".")
        network = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
        skeleton = network(**config, dtype=dtype, device="meta", operations=comfy.ops.disable_weight_init).eval()
        x = [empty(shape) for shape in latents]
        given = {"context": empty(prompt), "transformer_options": {}, **{key: empty(shape) for key, shape in others.items()}}
        if name == "NextDiT":
            given["num_tokens"] = prompt[1]
        if name == "LTXAVModel":
            given |= {"attention_mask": None, "a_timestep": torch.full((1,), 500.0)}
        if name == "MiniMaxH3Model":
            given["minimax_payload"] = {}
        entry = "_forward" if hasattr(network, "_forward") else "forward"
        places = (0, "x"), (1, "timesteps" if name == "SingleStreamDiT" else "timestep")
        began = time.process_time()
        args = (x if len(x) > 1 else x[0], torch.full((1,), 500.0))
        how = {"entry": entry, "places": places, "prepare": found.traceable, "tracing": found.tracing}
        discovered, graph = discover(skeleton, args, given, **how)
        seconds = time.process_time() - began
        for devices in DEVICES:
            placed = describe(place(graph, Plan(segments=devices)))
            yield {
                "family": family,
                "class": name,
                "input": [list(shape) for shape in latents],
                "blocks": len(graph.blocks),
                "share": discovered.found.share,
                "seconds": seconds,
                "devices": devices,
                "balance": 1 / (devices * placed["max_share"]),
                "mib_per_call": placed["mib_per_call"],
                "weights_mib": [segment["weight_mib"] + graph.glue_bytes / 2**20 for segment in placed["segments"]],
                "whole_mib": (graph.glue_bytes + sum(block.weight_bytes for block in graph.blocks)) / 2**20,
            }


def inside(file: str) -> None:
    """Write the rows to ``file``, within the host."""
    within_host.on_cpu()
    Path(file).write_text(json.dumps(list(rows())), encoding="utf-8")


if __name__ == "__main__":
    inside(sys.argv[2]) if sys.argv[1:2] == ["--inside"] else within_host.measure(__file__)
