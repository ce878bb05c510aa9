"""Sampling with the demo model: prompts in, pictures out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from asyncdiff_nodes.diffusers import make_scheduler, noise_levels
from asyncdiff_nodes.engine import NoiseLevels

from .text_encoder import TextEncoder
from .tokenizer import WordTokenizer

WEIGHTS = Path(__file__).parent / "weights"
DENOISERS = {"unet": UNet2DConditionModel, "transformer": PixArtTransformer2DModel}
FILES = (
    "text_encoder.json",
    "text_encoder.safetensors",
    "vocab.json",
    "scheduler/scheduler_config.json",
)


class DemoPipeline:
    """Denoiser, text encoder, tokenizer and noise schedule of a demo model.

    The model works on pictures folded 2x2 into channels (``pixel_unshuffle``): 32x32x3 becomes 12x16x16.

    Attributes:
        denoiser: diffusers ``UNet2DConditionModel``, or ``PixArtTransformer2DModel``; v-prediction.
        text_encoder: maps token ids [B, L] to a context [B, L, D].
        tokenizer: word-level tokenizer.
        scheduler_config: the ``scheduler_config.json`` as a dict.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        text_encoder: TextEncoder,
        tokenizer: WordTokenizer,
        scheduler_config: dict,
    ) -> None:
        self.denoiser = denoiser
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scheduler_config = scheduler_config

    @classmethod
    def load(cls, folder: str | Path | None = None, dtype: torch.dtype = torch.float32, denoiser: str = "unet") -> DemoPipeline:
        """Load a weights folder (the shipped one by default) in ``dtype``; reads safetensors only.

        Args:
            denoiser: one of ``DENOISERS``. The UNet is the demo model proper; the transformer shows what is so with transformers.

        Raises:
            FileNotFoundError: a file of the folder is missing.
        """
        folder = WEIGHTS if folder is None else Path(folder)
        parts = (f"{denoiser}/config.json", f"{denoiser}/diffusion_pytorch_model.safetensors")
        missing = [name for name in (*parts, *FILES) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"folder: {str(folder)!r} lacks {', '.join(missing)}; give a complete weights folder, such as the one in the "
                "project's repository, or make one with `python tools/demo_model/train.py --export`"
            )
        loaded = DENOISERS[denoiser].from_pretrained(
            folder / denoiser, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True
        )
        text_encoder = TextEncoder(**_read_json(folder / "text_encoder.json"))
        text_encoder.load_state_dict(load_file(folder / "text_encoder.safetensors"))
        return cls(
            loaded.eval(),
            text_encoder.to(dtype).eval(),
            WordTokenizer.load(folder / "vocab.json"),
            _read_json(folder / "scheduler" / "scheduler_config.json"),
        )

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Context of the prompts, [B, L, D] in the text encoder's dtype and device."""
        if not prompts:
            raise ValueError(f"prompts: {prompts!r} is empty; give at least one prompt (it may be '')")
        device = self.text_encoder.positions.device
        with torch.no_grad():
            return self.text_encoder(self.tokenizer(list(prompts)).to(device))

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Words of the prompts that are not in the vocabulary, in order, each once."""
        return list(dict.fromkeys(word for prompt in prompts for word in self.tokenizer.unknown(prompt)))

    def make_scheduler(self, name: str):  # noqa: ANN201 - four unrelated diffusers classes
        """A new diffusers scheduler; see :func:`~asyncdiff_nodes.diffusers.make_scheduler`."""
        return make_scheduler(name, self.scheduler_config)

    def levels(self, scheduler: str, steps: int) -> NoiseLevels:
        """Noise of every call of a run."""
        solver = self.make_scheduler(scheduler)
        solver.set_timesteps(steps)
        return noise_levels(solver)

    def initial_noise(self, count: int, seed: int) -> torch.Tensor:
        """Unit noise [count, C, H, W], float32 on the CPU; row i depends on ``seed`` and i alone."""
        config = self.denoiser.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        rows = [torch.randn(shape, generator=_generator(seed, index)) for index in range(count)]
        return torch.stack(rows)

    def sample(
        self,
        prompts: Sequence[str],
        steps: int = 20,
        cfg: float = 3.0,
        scheduler: str = "ddim",
        seed: int = 0,
        denoiser: Callable | None = None,
        on_start: Callable[..., None] | None = None,
        callback: Callable[[int, int], None] | None = None,
        output: str = "uint8",
    ) -> np.ndarray:
        """Draw one picture per prompt.

        Args:
            prompts: B prompts. Picture i depends on prompt i, ``seed`` and i, not on the other prompts. (With the
                ancestral scheduler the noise added in each step also has its own generator per picture.)
            steps: denoising steps, at least 1.
            cfg: classifier-free guidance scale; 1 means the plain conditional prediction, still in a CFG batch.
            scheduler: see :meth:`make_scheduler`.
            seed: any int.
            denoiser: called as ``denoiser(sample [2B, C, H, W], timestep=[2B], encoder_hidden_states=[2B, L, D],
                return_dict=False)`` instead of the own one; the batch is [unconditional, conditional].
            on_start: called once as ``on_start(timesteps [steps], levels=NoiseLevels)`` before the first step, such as a group's
                ``begin``.
            callback: called as ``callback(step, steps)`` after each step, ``step`` counting from 1.
            output: "uint8" or "float".

        Returns:
            [B, size, size, 3], uint8 in 0..255, or float32 in 0..1.

        Raises:
            ValueError: no prompts, ``steps`` < 1, an unknown scheduler or output.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts: got the string {prompts!r}; give a list of prompts, e.g. [{prompts!r}]")
        if steps < 1:
            raise ValueError(f"steps: {steps} is too few; give at least 1")
        if output not in ("uint8", "float"):
            raise ValueError(f"output: {output!r} is unknown; choose 'uint8' or 'float'")
        solver = self.make_scheduler(scheduler)
        count = len(prompts)
        context = self.encode([""] * count + list(prompts)) if count else self.encode(prompts)
        model = denoiser or self.denoiser
        device, dtype = self.denoiser.device, self.denoiser.dtype
        solver.set_timesteps(steps, device=device)
        if on_start is not None:
            on_start(solver.timesteps, levels=noise_levels(solver))
        step_options = {}
        if scheduler == "euler_a":
            # A list of generators, one per picture, keeps the pictures independent of the batch.
            step_options["generator"] = [_generator(seed, index, stream=1) for index in range(count)]
        image = self.initial_noise(count, seed).to(device) * solver.init_noise_sigma
        total = len(solver.timesteps)
        with torch.no_grad():
            for index, timestep in enumerate(solver.timesteps):
                scaled = solver.scale_model_input(image, timestep).to(dtype)
                inputs = {"timestep": timestep.expand(2 * count), "encoder_hidden_states": context}
                predicted = model(torch.cat([scaled, scaled]), **inputs, return_dict=False)[0]
                uncond, cond = predicted.float().chunk(2)
                guided = uncond + cfg * (cond - uncond)
                image = solver.step(guided, timestep, image, **step_options, return_dict=False)[0]
                if callback is not None:
                    callback(index + 1, total)
        pixels = torch.nn.functional.pixel_shuffle(image.float(), 2).add(1.0).div(2.0).clamp(0.0, 1.0)
        pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return pixels if output == "float" else np.rint(pixels * 255.0).astype(np.uint8)


def _generator(seed: int, index: int, stream: int = 0) -> torch.Generator:
    """CPU generator for picture ``index``; ``stream`` separates initial noise from later draws."""
    # SeedSequence mixes the numbers, so that neighbouring seeds and indices share nothing.
    state = np.random.SeedSequence([seed % 2**64, index, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
