"""Model files for the shared workflows: small random ones that the host's own loaders accept, under the real ones' names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[3] / "workflows"
# SDXL is known by the depths of all its transformers, and has two text encoders: no file of a few hundred MB is taken for it.
# Those of the other families have billions of parameters, or text encoders that have.
NOT_SMALL = {
    "sd_xl_base_1.0.safetensors",
    "sd_xl_refiner_1.0.safetensors",
    "flux1-dev-fp8.safetensors",
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors",
    "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "gemma_3_12B_it_fp4_mixed.safetensors",
    "qwen_3_4b.safetensors",
}


def named(workflow: Path) -> set[tuple[str, str]]:
    """Folder below ``models`` and name of each file that a workflow asks for."""
    nodes = json.loads(workflow.read_text(encoding="utf-8"))["nodes"]
    return {(model["directory"], model["name"]) for node in nodes for model in node["properties"].get("models", [])}


def place_empty(models: Path) -> None:
    """Empty files for all workflows: enough for the page and for the server's validation, but not to run."""
    for folder, name in set().union(*map(named, WORKFLOWS.glob("*.json"))):
        (models / folder).mkdir(parents=True, exist_ok=True)
        (models / folder / name).touch()


def place_small(models: Path) -> None:
    """Small random models for all workflows; empty files for those that cannot be small."""
    import comfy.cldm.cldm
    import torch

    from helpers import small

    place_empty(models)
    with torch.inference_mode(False), torch.no_grad():
        network, inpainting = _network(), _network(in_channels=9)
        # a LoRA is made for the names and shapes of its network
        lora = small.lora(SimpleNamespace(model=SimpleNamespace(diffusion_model=network)))
        config = {key: value for key, value in _config().items() if key not in ("out_channels", "transformer_depth_output")}
        control = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=torch.float16)
        small.randomise(control, 6)
        rest = _text_encoder() | _vae()
        files = {
            "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": _prefixed("model.diffusion_model.", network) | rest,
            "checkpoints/sd-v1-5-inpainting.safetensors": _prefixed("model.diffusion_model.", inpainting) | rest,
            "loras/blindbox_v1_mix.safetensors": lora,
            "loras/lcm_lora_sdv1-5.safetensors": lora,
            "controlnet/control_v11p_sd15_canny_fp16.safetensors": control.state_dict(),
        }
        for name, tensors in files.items():
            _write(models / name, tensors)


def _config(**changes: Any) -> dict[str, Any]:
    """The least that is taken for SD 1.5: 320 channels and a context of 768, on one level."""
    from helpers import small

    depths = {"transformer_depth": [1], "transformer_depth_output": [1, 1]}
    sizes = {"model_channels": 320, "channel_mult": (1,), "num_res_blocks": [1], "num_heads": 8}
    return {**small.unet_config("sd15"), **sizes, **depths, **changes}


def _network(**changes: Any) -> Any:
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from helpers import small

    network = UNetModel(**_config(**changes), dtype=torch.float16)
    small.randomise(network, 5)
    return network


def _text_encoder() -> dict[str, Any]:
    """CLIP-L with all of its layers, since the loader knows no smaller one. They are zeros: it returns its position embedding."""
    import comfy.ops
    import comfy.sd1_clip
    import torch
    from comfy.clip_model import CLIPTextModel

    config = json.loads((Path(comfy.sd1_clip.__file__).parent / "sd1_clip_config.json").read_text(encoding="utf-8"))
    state = CLIPTextModel(config, torch.float16, "meta", comfy.ops.disable_weight_init).text_model.state_dict()
    name = "embeddings.position_embedding.weight"
    state[name] = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(7)).half()
    state["final_layer_norm.weight"] = torch.ones(state["final_layer_norm.weight"].shape).half()
    return {f"cond_stage_model.transformer.text_model.{key}": value for key, value in state.items()}


def _vae() -> dict[str, Any]:
    """The tiny VAE that the host takes in place of the real one."""
    from comfy.taesd.taesd import TAESD

    from helpers import small

    vae = TAESD()
    small.randomise(vae.taesd_encoder, 8)
    small.randomise(vae.taesd_decoder, 9)
    return _prefixed("first_stage_model.", vae)


def _prefixed(prefix: str, module: Any) -> dict[str, Any]:
    return {prefix + name: value for name, value in module.state_dict().items()}


def _write(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file of float16. Tensors on the meta device become zeros that take no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end := end + 2 * tensor.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                file.seek(start + header[name]["data_offsets"][0])
                file.write(tensor.half().contiguous().numpy().tobytes())
        file.truncate(start + end)
