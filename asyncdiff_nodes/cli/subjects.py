"""The subjects whose pictures ``compare`` and ``similarity`` look at: a demo model, or a diffusers pipeline in a folder."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from asyncdiff_nodes.demo import DemoPipeline
from asyncdiff_nodes.demo.features import features, kernel_distance, training_features
from asyncdiff_nodes.demo.pipeline import WEIGHTS
from asyncdiff_nodes.diffusers import SCHEDULERS, RoutedDenoiser, denoiser_of, is_flow, make_scheduler, noise_levels
from asyncdiff_nodes.engine import BlockGraph, NoiseLevels, PlanError, Simulator, family_of, meta_copy, trace

from .example_calls import CLASSES, example_call
from .zoo import PUBLISHED_CUTS

HELP = "demo, demo-transformer, or a diffusers folder"
_DEMOS = {"demo": "unet", "demo-transformer": "transformer"}
_PROMPTS = (
    "a red apple on a wooden table", "portrait of an old fisherman", "a lighthouse in a storm, oil painting", "a sleeping cat",
    "city street at night in the rain", "a bowl of ramen, studio light", "mountains above a sea of fog", "a yellow vintage car",
    "a knight on a white horse", "an astronaut in a garden", "stained glass window with a bird", "a cup of coffee from above",
    "a wooden cabin in the snow", "sunflowers in a blue vase", "a dog catching a ball", "an owl, ink drawing",
)  # fmt: skip


class Subject(Protocol):
    """A model that draws pictures from prompts.

    Attributes:
        denoiser: the network that is cut into segments.
        batch: pictures to draw at once.
    """

    denoiser: nn.Module
    batch: int

    def prompts(self, count: int) -> list[str]:
        """``count`` prompts to measure with."""

    def levels(self, scheduler: str, steps: int) -> NoiseLevels:
        """Noise of every call of a run."""

    def draw(
        self, prompts: list[str], *, steps: int, scheduler: str, seed: int, cfg: float | None, simulator: Simulator | None = None
    ) -> np.ndarray:
        """Pictures [B, H, W, 3] in 0..1; of ``simulator`` in place of the denoiser. ``cfg`` None is the model's own."""

    def to(self, device: str) -> None:
        """Move all networks to ``device``."""

    def published_cuts(self, graph: BlockGraph, segments: int) -> tuple[str, ...]:
        """Cuts of the published kind for the graph of :attr:`denoiser`.

        Raises:
            PlanError: there are none for so many segments.
        """

    def kernel_distance(self, pictures: np.ndarray) -> float | None:
        """The distance of these pictures from the training set, if that is known."""


def find_subject(name: str) -> Subject:
    """Find a subject by the name of a demo model, or of a folder.

    Raises:
        FileNotFoundError, ValueError: see their messages.
    """
    return _Demo(name) if name in _DEMOS else _Folder(name)


def graph_of(denoiser: nn.Module) -> BlockGraph:
    """For inputs of the model's own size, batch 2."""
    skeleton = meta_copy(denoiser)
    call = example_call(skeleton)
    return trace(skeleton, family_of(skeleton, *call), *call)


class _Demo:
    batch = 8

    def __init__(self, name: str) -> None:
        self._name = name
        self._pipeline = DemoPipeline.load(denoiser=_DEMOS[name])
        self.denoiser = self._pipeline.denoiser
        self.levels = self._pipeline.levels

    def prompts(self, count: int) -> list[str]:
        """Evenly spread over those of the training set."""
        known = json.loads((WEIGHTS / "prompts.json").read_text(encoding="utf-8"))["training"]
        return [known[index * len(known) // count] for index in range(count)]

    def draw(
        self, prompts: list[str], *, steps: int, scheduler: str, seed: int, cfg: float | None, simulator: Simulator | None = None
    ) -> np.ndarray:
        options: dict[str, Any] = {} if cfg is None else {"cfg": cfg}
        if simulator is not None:
            options |= {"denoiser": simulator, "on_start": simulator.begin}
        return self._pipeline.sample(prompts, steps=steps, scheduler=scheduler, seed=seed, output="float", **options)

    def to(self, device: str) -> None:
        for module in (self.denoiser, self._pipeline.text_encoder):
            module.to(device)

    def published_cuts(self, graph: BlockGraph, segments: int) -> tuple[str, ...]:
        if self._name not in PUBLISHED_CUTS:
            return even_cuts(graph, segments)
        if segments not in PUBLISHED_CUTS[self._name]:
            raise PlanError(f"--plans: the published method has no cuts for {segments} segments: choose 2, 3 or 4")
        return PUBLISHED_CUTS[self._name][segments]

    def kernel_distance(self, pictures: np.ndarray) -> float | None:
        return kernel_distance(features(pictures), training_features())


class _Folder:
    batch = 1

    def __init__(self, folder: str) -> None:
        if not (Path(folder) / "model_index.json").is_file():
            raise FileNotFoundError(
                f"--model {folder}: neither one of {', '.join(_DEMOS)} nor a diffusers folder, which has a model_index.json"
            )
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (ImportError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"--model {folder}: cannot be loaded ({error})") from error
        if getattr(pipe, "safety_checker", None) is not None:
            pipe.safety_checker = None  # it would blacken pictures, and so their distance
        pipe.set_progress_bar_config(disable=True)
        if is_flow(pipe.scheduler):
            raise ValueError(f"--model {folder}: trained for flow matching, which none of {', '.join(SCHEDULERS)} is for")
        self._pipe, self._schedule = pipe, pipe.scheduler.config
        try:
            self.denoiser = getattr(pipe, denoiser_of(pipe))
        except TypeError as error:
            raise ValueError(f"--model {folder}: {error}") from None
        if (kind := type(self.denoiser).__name__) not in CLASSES:
            raise ValueError(f"--model {folder}: its denoiser is a {kind}, not one of {', '.join(CLASSES)}")

    def prompts(self, count: int) -> list[str]:
        return [_PROMPTS[index % len(_PROMPTS)] for index in range(count)]

    def levels(self, scheduler: str, steps: int) -> NoiseLevels:
        solver = make_scheduler(scheduler, self._schedule)
        solver.set_timesteps(steps)
        return noise_levels(solver)

    def draw(
        self, prompts: list[str], *, steps: int, scheduler: str, seed: int, cfg: float | None, simulator: Simulator | None = None
    ) -> np.ndarray:
        pipe, name = self._pipe, denoiser_of(self._pipe)
        pipe.scheduler = make_scheduler(scheduler, self._schedule)
        options: dict[str, Any] = {} if cfg is None else {"guidance_scale": cfg}
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
        if simulator is not None:
            setattr(pipe, name, RoutedDenoiser(pipe, simulator))
        try:
            return pipe(prompts, num_inference_steps=steps, generator=generators, output_type="np", **options).images
        finally:
            setattr(pipe, name, self.denoiser)

    def to(self, device: str) -> None:
        self._pipe.to(device)

    def published_cuts(self, graph: BlockGraph, segments: int) -> tuple[str, ...]:
        return even_cuts(graph, segments)

    def kernel_distance(self, pictures: np.ndarray) -> float | None:
        return None


def even_cuts(graph: BlockGraph, segments: int) -> tuple[str, ...]:
    """Linear cuts into parts of equal cost, as the published implementation cuts transformers: the first block begins the first.

    Raises:
        PlanError: more segments than blocks.
    """
    if segments > len(graph.blocks):
        raise PlanError(f"--plans: {segments} segments, but the model has only {len(graph.blocks)} blocks")
    before = [0, *accumulate(block.macs for block in graph.blocks)]
    starts = [0]
    for part in range(1, segments):
        wanted = before[-1] * part / segments
        last = len(graph.blocks) - segments + part  # the parts to come need a block each
        starts.append(min(range(starts[-1] + 1, last + 1), key=lambda index: abs(before[index] - wanted)))
    return tuple(graph.names[start] for start in starts)
