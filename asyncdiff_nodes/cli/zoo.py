"""Models by name for ``plan`` and ``bench``: true architectures; weights only where a command asks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from asyncdiff_nodes.engine.tensors import meta_copy, tensors_of

from .example_calls import CLASSES

DEMO_WEIGHTS = Path(__file__).resolve().parent.parent / "demo" / "weights"

_UNET = "UNet2DConditionModel"
_SDXL_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": _SDXL_DOWN,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "svd": {"_class_name": "UNetSpatioTemporalConditionModel"},
    "animatediff": {"_class_name": "UNetMotionModel", "sample_size": 64, "cross_attention_dim": 768},
    "pixart": {"_class_name": "PixArtTransformer2DModel", "sample_size": 128, "caption_channels": 4096},
    "sd35-large": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    "flux": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
    "qwen-image": {"_class_name": "QwenImageTransformer2DModel"},
    "wan-14b": {"_class_name": "WanTransformer3DModel"},
    "hunyuan-video": {"_class_name": "HunyuanVideoTransformer3DModel"},
    "ltx-video": {"_class_name": "LTXVideoTransformer3DModel"},
}

DEMOS = {"demo": DEMO_WEIGHTS, "demo-transformer": DEMO_WEIGHTS / "transformer"}
NAMES = (*_CONFIGS, *DEMOS)

# where the published implementation cuts (github.com/czg1225/AsyncDiff), by model and number of segments
PUBLISHED_CUTS: dict[str, dict[int, tuple[str, ...]]] = {
    "sd15": {
        2: ("conv_in", "up_blocks.1.attentions.1"),
        3: ("conv_in", "mid_block", "up_blocks.2.attentions.2"),
        4: ("conv_in", "down_blocks.2", "up_blocks.1.attentions.1", "up_blocks.3"),
    },
    "sd21": {
        2: ("conv_in", "up_blocks.1.attentions.2"),
        3: ("conv_in", "mid_block", "up_blocks.3"),
        4: ("conv_in", "down_blocks.2", "up_blocks.2", "up_blocks.3.attentions.0"),
    },
    "sdxl": {
        2: ("down_blocks.2", "up_blocks.0.resnets.2"),
        3: ("down_blocks.2", "up_blocks.0.attentions.0", "up_blocks.1"),
        4: ("down_blocks.1.attentions.0", "mid_block", "up_blocks.0.resnets.1", "up_blocks.1"),
    },
}
PUBLISHED_CUTS["demo"] = PUBLISHED_CUTS["sd15"]  # the same block layout

# of whole runs of 50 DDIM steps on RTX A5000 with NVLink (arXiv 2406.06911), by model and (segments, stride)
PUBLISHED_SPEEDUPS: dict[str, dict[tuple[int, int], float]] = {
    "sd15": {(2, 1): 1.8, (3, 1): 2.2, (4, 1): 2.6, (2, 2): 2.9, (3, 2): 3.7},
    "sd21": {(2, 1): 1.8, (3, 1): 2.3, (4, 1): 2.6, (2, 2): 3.0, (3, 2): 4.0},
    "sdxl": {(2, 1): 1.7, (3, 1): 2.4, (4, 1): 2.7, (2, 2): 2.8, (3, 2): 3.8},
}


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        name: as the user gave it.
        config: of the diffusers class that it names; ``UNet2DConditionModel`` if none.
        pixels_per_latent: picture pixels per latent pixel, along one side.
    """

    name: str
    config: dict[str, Any]
    pixels_per_latent: int

    def latent_size(self, pixels: int | None) -> int | None:
        """Latent pixels along one side for a picture of ``pixels``; the model's own size if None, None if it has none."""
        if pixels is None:
            return self.config.get("sample_size")
        patch = self.config.get("patch_size") or 2 ** (len(self.config.get("block_out_channels", (0,) * 4)) - 1)
        if not isinstance(patch, int):  # of a video: frames, rows, columns
            patch = patch[-1]
        step = self.pixels_per_latent * patch
        if pixels < step or pixels % step:
            raise ValueError(f"--size {pixels}: model {self.name} needs a multiple of {step} pixels")
        return pixels // self.pixels_per_latent

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The module tree on the meta device."""
        with torch.device("meta"):
            denoiser = getattr(diffusers, self.config.get("_class_name", _UNET)).from_config(self.config)
        # Module.to: diffusers' own warns about lists of layers that are empty here
        # a copy, since some buffers are made on the CPU all the same
        return meta_copy(nn.Module.to(denoiser, dtype)).eval().requires_grad_(False)

    def with_random_weights(self, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
        """The model at its true size with small random weights: right for speed, not for pictures."""
        denoiser = self.skeleton(dtype).to_empty(device=device)
        torch.manual_seed(0)
        for name, tensor in tensors_of(denoiser):
            _fill(name, tensor)
        return denoiser

    def random_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Such weights one by one, for who need not have them all at once."""
        for name, tensor in tensors_of(self.skeleton(dtype)):
            yield name, _fill(name, torch.empty_like(tensor, device="cpu"))


def _fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim > 1 and tensor.is_floating_point():
        return tensor.uniform_(-0.02, 0.02)
    return tensor.fill_(float(name.endswith("weight")))


def find_model(name: str) -> Model:
    """A model by name, or the denoiser of a diffusers folder.

    Raises:
        FileNotFoundError: neither.
        ValueError: a denoiser that cannot be split.
    """
    if name in _CONFIGS:
        return Model(name, _CONFIGS[name], pixels_per_latent=8)
    folder = DEMOS.get(name, Path(name))
    for path in (folder / "unet" / "config.json", folder / "transformer" / "config.json", folder / "config.json"):
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if (kind := config.get("_class_name", _UNET)) not in CLASSES:
                raise ValueError(f"--model {name}: {path} is a {kind}, not one of {', '.join(CLASSES)}")
            return Model(name, config, pixels_per_latent=2 if name in DEMOS else _vae_scale(folder))
    raise FileNotFoundError(f"--model {name}: neither one of {', '.join(NAMES)} nor a diffusers folder with unet/config.json")


def _vae_scale(folder: Path) -> int:
    path = folder / "vae" / "config.json"
    if not path.is_file():
        return 8
    return 2 ** (len(json.loads(path.read_text(encoding="utf-8"))["block_out_channels"]) - 1)
