"""A tiny model of every denoising network that the host's ``comfy.model_base`` builds, with what its own KSampler needs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import nodes
import torch

from . import denoisers_others, denoisers_pictures, denoisers_videos


class Draw:
    """Random tensors of one seed, one after the other."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def ids(self, high: int, *shape: int) -> torch.Tensor:
        """Tokens."""
        return torch.randint(0, high, shape, generator=self.generator)

    def mask(self, *shape: int) -> torch.Tensor:
        """A mask of zeros and ones."""
        return (torch.rand(shape, generator=self.generator) > 0.5).float()

    def seen(self, tokens: int, width: int) -> SimpleNamespace:
        """A CLIP_VISION_OUTPUT, as far as models read it."""
        states = self(1, tokens, width)
        side = round(tokens**0.5) * 16
        return SimpleNamespace(penultimate_hidden_states=states, last_hidden_state=states, image_sizes=[(3, side, side)])


@dataclass(frozen=True)
class Denoiser:
    """A kind of model: how its classes are called, a tiny configuration, and the shapes of what it is given."""

    name: str
    config: str
    base: str
    unet: dict
    latents: tuple
    prompt: tuple[int, int] | None
    extras: Callable[[Draw], dict] = lambda _: {}

    def model(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, compute: torch.dtype = torch.float32
    ) -> comfy.model_patcher.ModelPatcher:
        """A MODEL, built as the host builds it from a checkpoint."""
        config_class = getattr(comfy.supported_models, self.config)
        config = config_class({**config_class.unet_config, **self.unet})
        config.unet_config.update(self.unet)  # some classes set sizes of real networks
        config.set_inference_dtype(dtype, None if dtype is compute else compute)
        weights = _CHECKPOINTS.get(self.name, lambda _: {})(Draw(seed + 1))
        base = config.get_model(weights)
        fill(base.diffusion_model, seed)
        device = comfy.model_management.get_torch_device()
        return comfy.model_patcher.ModelPatcher(base.eval(), device, torch.device("cpu"))

    def detected(self, model: comfy.model_patcher.ModelPatcher) -> dict:
        """What the host would detect in a file of ``model``, were it as large as a real one."""
        known = getattr(comfy.supported_models, self.config).unet_config
        config = {key: value for key, value in model.model.model_config.unet_config.items() if key != "dtype"}
        return config | {key: known[key] for key in known.keys() & {"image_model"}}

    def conditioning(self, seed: int = 1) -> list:
        """A CONDITIONING; the model's own ``extra_conds`` makes of it what its network reads."""
        draw = Draw(seed)
        return [[draw(1, *(self.prompt or (1, 1))), self.extras(draw)]]

    def latent(self, seed: int = 2) -> dict:
        """A LATENT, nested if the network denoises several tensors at once; not empty where the host can sample such a one."""
        draw = Draw(seed)
        if self.name in FROM_NOTHING:
            return {"samples": torch.zeros(1, *self.latents)}
        if isinstance(self.latents[0], tuple):
            from comfy.nested_tensor import NestedTensor  # not in older hosts, which have no such network

            return {"samples": NestedTensor([draw(1, *shape) for shape in self.latents])}
        frames = 3 if self.base in FRAMES_AS_BATCH else 1
        return {"samples": draw(frames, *self.latents)}


_TABLES = (denoisers_pictures, denoisers_videos, denoisers_others)
_CHECKPOINTS = denoisers_pictures.CHECKPOINTS | denoisers_others.CHECKPOINTS
# these denoise the frames of a video as a batch of pictures
FRAMES_AS_BATCH = ("SVD_img2vid", "SV3D_u", "SV3D_p")
# unless it is empty, the host's latent format gives it twice the channels and half the frames, and so noise of another shape
FROM_NOTHING = ("hunyuan_image_refiner",)
# a host that is older than a configuration class cannot build the case
DENOISERS = {
    name: Denoiser(name, *row) for table in _TABLES for name, row in table.ROWS.items() if hasattr(comfy.supported_models, row[0])
}


# buffers that a class leaves empty, since it loads them with its weights
_LOADED = ("pos_embed", "positive_conditioning", "negative_conditioning", "norm.beta")
_FREQUENCIES = ("rope.inv_freq", "rotary_pos_emb.inv_freq")
# networks that older hosts call with both prompts at once only
GUIDED = ("hunyuan3d21",)
# networks that BaseModel classes hold and no sampler calls
NO_DENOISERS = {
    "comfy.ldm.rt_detr.rtdetr_v4.RTv4": "detects objects in one call",
    "comfy.ldm.depth_anything_3.model.DepthAnything3Net": "estimates depth in one call",
    "comfy.ldm.sam3.detector.SAM3Model": "segments in calls of its own nodes",
}


def network_classes() -> dict[str, set[str]]:
    """Networks that the host can build, by qualified name, and the names of the BaseModel classes that build them."""
    found: dict[str, set[str]] = {}
    for base in vars(comfy.model_base).values():
        if isinstance(base, type) and issubclass(base, comfy.model_base.BaseModel):
            network = _network(base)
            found.setdefault(f"{network.__module__}.{network.__qualname__}", set()).add(base.__name__)
    return found


def _network(base: type) -> type:
    """The class that ``base`` passes on as ``unet_model``, or that its parent does."""
    for owner in base.__mro__:
        if "__init__" not in vars(owner):
            continue
        passed = _passed(owner.__init__)
        if passed and passed != "unet_model":
            return eval(passed, vars(comfy.model_base))  # its own source text, such as comfy.ldm.wan.model.WanModel
        if passed or owner is comfy.model_base.BaseModel:
            return inspect.signature(owner.__init__).parameters["unet_model"].default
    raise TypeError(base)


def _passed(init: Callable) -> str | None:
    """Source text of the ``unet_model`` argument in a call of the parent's ``__init__``, by name or in fourth place."""
    for call in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(init)))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "__init__":
            named = [keyword.value for keyword in call.keywords if keyword.arg == "unet_model"]
            itself = not ast.unparse(call.func).startswith("super(")  # BaseModel.__init__(self, ...)
            found = [*named, *call.args[3 + itself : 4 + itself]]
            if found:
                return ast.unparse(found[0])
    return None


def sampled(
    model: comfy.model_patcher.ModelPatcher,
    denoiser: Denoiser,
    prompt: int = 1,
    latent: int | dict = 2,
    denoise: float = 1.0,
    steps: int = 3,
    cfg: float | None = None,
) -> torch.Tensor:
    """What KSampler makes, all tensors of a nested latent in one row."""
    prompts = denoiser.conditioning(prompt), denoiser.conditioning(4)
    cfg = cfg or (2.0 if denoiser.name in GUIDED else 1.0)
    start = denoiser.latent(latent) if isinstance(latent, int) else latent
    found = nodes.KSampler().sample(model, 5, steps, cfg, "euler", "simple", *prompts, start, denoise)[0]
    return torch.cat([tensor.flatten() for tensor in tensors_of(found)])


def tensors_of(latent: dict) -> list[torch.Tensor]:
    """Of a LATENT, those that are nested in it, or the one that there is."""
    samples = latent["samples"]
    return list(samples.unbind()) if samples.is_nested else [samples]


def lora(model: comfy.model_patcher.ModelPatcher) -> dict:
    """A LoRA of rank 4 on every fourth matrix."""
    generator, found = torch.Generator().manual_seed(4), {}
    matrices = [(name, weight) for name, weight in model.model.diffusion_model.named_parameters() if weight.ndim == 2]
    for name, weight in matrices[::4]:
        key = f"diffusion_model.{name.removesuffix('.weight')}"
        found[f"{key}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.1
        found[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.1
    return found


def fill(network: torch.nn.Module, seed: int) -> None:
    """Random weights that keep what passes them about as large as it was; buffers that a class computes keep their values."""
    draw = Draw(seed)
    for name, weight in network.named_parameters():
        scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        if weight.ndim > 1 and name.startswith("motion_encoder.enc."):
            scale = 1.0  # its layers scale their weights themselves
        centre = 1.0 if weight.ndim == 1 and name.endswith(("weight", "scale", "gamma")) else 0.0
        weight.data.copy_(centre + draw(*weight.shape) * scale)
    for name, buffer in network.named_buffers():
        if name.endswith(_LOADED):
            buffer.copy_(draw(*buffer.shape))
        elif name.endswith(_FREQUENCIES):
            buffer.copy_(10000.0 ** -(torch.arange(len(buffer)) / len(buffer)))
