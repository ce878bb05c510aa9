"""The shipped demo model in the host's own terms: a MODEL, a VAE and CONDITIONING.

The weights have diffusers' layout, but diffusers is not needed: the files are read directly, and the keys are renamed by the
host's own table. The network works on pictures folded 2x2 into channels; here the folding is part of the network, so that
the host samples plain pixels [B, 3, H, W] and its pixel-space VAE decodes them. Noise is independent from pixel to pixel,
so sampling folded or unfolded pictures is the same.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import load_file
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import asyncdiff_nodes.demo
from asyncdiff_nodes.demo.text_encoder import TextEncoder
from asyncdiff_nodes.demo.tokenizer import WordTokenizer

WEIGHTS = Path(asyncdiff_nodes.demo.__file__).parent / "weights"
FOLD = 2

log = logging.getLogger(__name__)


class DemoUNet(UNetModel):
    """The host's UNet with three things that the demo model has and SD does not.

    It folds its input and unfolds its output, its GroupNorms have ``norm_num_groups`` groups instead of 32, and its widths
    need not be multiples of ``model_channels``.

    Args:
        model_channels: width of the first level.
        channel_mult: width of each level as a multiple of ``model_channels``, not necessarily whole.
        norm_num_groups: groups of every GroupNorm.
        operations: the host's class of layers.
        options: the other arguments of ``UNetModel``; ``in_channels`` and ``out_channels`` are those of the folded picture.
    """

    def __init__(
        self, *, model_channels: int, channel_mult: list[float], norm_num_groups: int, operations: type, **options: object
    ) -> None:
        widths = [_LevelWidth(round(multiple * model_channels)) for multiple in channel_mult]
        super().__init__(
            model_channels=model_channels,
            channel_mult=widths,
            operations=_with_groups(operations, norm_num_groups),
            **options,
        )
        self.channel_mult = channel_mult
        self.in_channels //= FOLD**2  # those of its input, before folding

    def _forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Pixels [B, 3, H, W], H and W even, to v of the same shape; the other arguments are the host's."""
        return pixel_shuffle(super()._forward(pixel_unshuffle(x, FOLD), *args, **kwargs), FOLD)


class DemoPixels(comfy.latent_formats.LatentFormat):
    """Latents that are RGB pixels in [-1, 1]: nothing is scaled, and a preview is the picture itself."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class DemoConfig(comfy.supported_models_base.BASE):
    """What the host has to know about the demo model, made from the two configurations in diffusers' form.

    Args:
        unet: contents of ``unet/config.json``.
        scheduler: contents of ``scheduler/scheduler_config.json``.

    Raises:
        ValueError: the noise schedule or the prediction type is not the one that :meth:`get_model` sets up.
    """

    unet_extra_config = {}  # noqa: RUF012 - the base class's attribute; its defaults would replace the number of heads
    latent_format = DemoPixels
    # SD's is 1 for a pixel of 320 channels; here four pixels share 48. Without it the host would set 600 MiB aside.
    memory_usage_factor = 0.05

    def __init__(self, unet: dict, scheduler: dict) -> None:
        kind = scheduler["beta_schedule"], scheduler["prediction_type"]
        if kind != ("scaled_linear", "v_prediction"):
            raise ValueError(f"scheduler: {kind} is not supported; use ('scaled_linear', 'v_prediction')")
        super().__init__(host_unet_config(unet))
        self.sampling_settings = {
            "beta_schedule": "linear",  # the host's name for diffusers' "scaled_linear"
            "linear_start": scheduler["beta_start"],
            "linear_end": scheduler["beta_end"],
            "timesteps": scheduler["num_train_timesteps"],
        }

    def get_model(self, state_dict: dict, prefix: str = "", device: torch.device | None = None) -> comfy.model_base.BaseModel:
        """Build the host's model of the network, without weights yet; ``state_dict`` and ``prefix`` are not used."""
        return comfy.model_base.BaseModel(
            self, model_type=comfy.model_base.ModelType.V_PREDICTION, device=device, unet_model=DemoUNet
        )


def host_unet_config(config: dict) -> dict:
    """Arguments of :class:`DemoUNet` from a diffusers ``UNet2DConditionModel`` configuration."""
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    depths = [int("CrossAttn" in name) for name in config["down_block_types"]]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width / widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in depths for _ in range(layers)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in depths for _ in range(layers + 1)],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "context_dim": config["cross_attention_dim"],
        "num_heads": config["attention_head_dim"],  # a misnomer of diffusers: in this UNet it is the number of heads
        "norm_num_groups": config["norm_num_groups"],
    }


def load_demo(folder: str | Path = WEIGHTS) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.VAE]:
    """The demo model and its VAE, freshly loaded from ``folder``.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the noise schedule is not supported.
        RuntimeError: the weights are not exactly those of the network that ``unet/config.json`` describes.
    """
    # The VAE only rescales, but the host would choose bfloat16 for it on a GPU, which is coarser than 8 bits near white.
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    return load_model(folder), vae


def load_model(folder: str | Path = WEIGHTS, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The demo model from ``folder``, in the dtype and on the devices that the host chooses.

    Args:
        folder: a weights folder as shipped.
        disable_dynamic: use the host's plain patcher even where it has a dynamic one; the host asks for that.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the noise schedule is not supported.
        RuntimeError: the weights are not exactly those of the network that ``unet/config.json`` describes.
    """
    management = comfy.model_management
    config = DemoConfig(_read_json(folder, "unet/config.json"), _read_json(folder, "scheduler/scheduler_config.json"))
    weights = load_file(_existing(folder, "unet/diffusion_pytorch_model.safetensors"))
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes))

    model = config.get_model({})
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    # A name that is not in the host's table is kept, and is then refused as unexpected.
    renamed = {names.get(name, name): tensor.to(dtype) for name, tensor in weights.items()}
    model.diffusion_model.load_state_dict(renamed)
    model.to(offload_device)

    plain = comfy.model_patcher.ModelPatcher
    kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = kind(model, load_device=load_device, offload_device=offload_device)
    # The host uses this to make independent copies for other devices.
    patcher.cached_patcher_init = (load_model, (folder,))
    return patcher


def encode(text: str, folder: str | Path = WEIGHTS) -> list[list]:
    """Conditioning ``[[context [1, L, D], {}]]`` of a prompt; the empty prompt's is the unconditional one.

    The log names words that the model has never seen.

    Raises:
        FileNotFoundError: a file of the folder is missing.
    """
    tokenizer = WordTokenizer.load(_existing(folder, "vocab.json"))
    encoder = TextEncoder(**_read_json(folder, "text_encoder.json"))
    encoder.load_state_dict(load_file(_existing(folder, "text_encoder.safetensors")))
    if unknown := tokenizer.unknown(text):
        log.warning("The AsyncDiff demo model does not know the words: %s", ", ".join(unknown))
    with torch.no_grad():
        return [[encoder.eval()(tokenizer([text])), {}]]


class _LevelWidth:
    """Factor that the host multiplies ``model_channels`` by; the product is always ``width``."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __mul__(self, model_channels: int) -> int:
        return self.width

    __rmul__ = __mul__


def _with_groups(operations: type, groups: int) -> type:
    """The host's layers, except that every GroupNorm has ``groups`` groups."""

    class Operations(operations):
        @staticmethod
        def GroupNorm(num_groups: int, num_channels: int, **options: object) -> torch.nn.GroupNorm:
            return operations.GroupNorm(groups, num_channels, **options)

    return Operations


def _existing(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"folder: {str(folder)!r} has no {name}; install ComfyUI-AsyncDiff again, the file is part of it")
    return path


def _read_json(folder: str | Path, name: str) -> dict:
    return json.loads(_existing(folder, name).read_text(encoding="utf-8"))
