"""The two samplers: KSampler and KSamplerAdvanced, widget by widget, on all devices."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from .model import ReadsSettings, advanced, options_input

_SEED = {"min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True}


def _common_inputs() -> list[io.Input]:
    """Inputs from steps to latent_image, as in both of the host's samplers."""
    return [
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Number of denoising steps."),
        io.Float.Input(
            "cfg",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Classifier-free guidance. Higher values follow the prompt more closely; too high a value spoils it.",
        ),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The sampling algorithm."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="How much noise each step removes."),
        io.Conditioning.Input("positive", tooltip="What the picture should show."),
        io.Conditioning.Input("negative", tooltip="What the picture should not show."),
        io.Latent.Input("latent_image", tooltip="The latent to denoise."),
    ]


def ksampler_inputs() -> list[io.Input]:
    """Inputs and widget order of the host's KSampler."""
    denoise_tip = "1 starts from pure noise. Lower values keep more of the latent (image to image)."
    return [
        _model_input(),
        io.Int.Input("seed", default=0, tooltip="Seed of the noise.", **_SEED),
        *_common_inputs(),
        io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=denoise_tip),
    ]


def _model_input() -> io.Input:
    return io.Model.Input("model", tooltip="The model that denoises. Its network is split over your devices.")


def _routed(node: type[io.ComfyNode], **inputs: Any) -> dict[str, Any]:
    """Inputs of the host's node, checked, from those of ``node``; all devices denoise its model."""
    from asyncdiff_nodes.host.checks import checked
    from asyncdiff_nodes.host.routing.hooks import attach

    inputs = checked(node, **inputs)
    options = inputs.pop("options")
    return inputs | {"model": attach(inputs["model"], options)}


class AsyncDiffKSampler(ReadsSettings):
    """KSampler on all devices."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and widget order of KSampler, then the options."""
        return io.Schema(
            node_id="AsyncDiffKSampler",
            display_name="KSampler (AsyncDiff)",
            category="AsyncDiff",
            description="KSampler on all of your GPUs: they denoise one picture together. With one GPU it behaves like KSampler "
            "and tells you.",
            inputs=[*ksampler_inputs(), options_input()],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(cls, model: Any, options: Any = None, **inputs: Any) -> io.NodeOutput:
        """Sample with the host's own node."""
        import nodes

        return io.NodeOutput(*nodes.KSampler().sample(**_routed(cls, model=model, options=options, **inputs)))


class AsyncDiffKSamplerAdvanced(ReadsSettings):
    """KSamplerAdvanced on all devices."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and widget order of KSamplerAdvanced, then the options."""
        steps = {"min": 0, "max": 10000}
        return io.Schema(
            node_id="AsyncDiffKSamplerAdvanced",
            display_name="KSampler Advanced (AsyncDiff)",
            category="AsyncDiff",
            description="KSampler (Advanced) on all of your GPUs: they denoise one picture together. With one GPU it behaves "
            "like KSampler (Advanced) and tells you.",
            inputs=[
                _model_input(),
                advanced(io.Combo.Input("add_noise", options=["enable", "disable"], tooltip="Whether to add noise first.")),
                io.Int.Input("noise_seed", default=0, tooltip="Seed of the noise.", **_SEED),
                *_common_inputs(),
                advanced(io.Int.Input("start_at_step", default=0, tooltip="The first step of this run.", **steps)),
                advanced(io.Int.Input("end_at_step", default=10000, tooltip="The run stops before this step.", **steps)),
                advanced(
                    io.Combo.Input(
                        "return_with_leftover_noise",
                        options=["disable", "enable"],
                        tooltip="Whether to keep the noise that is left when the run stops early, for another sampler to remove.",
                    )
                ),
                options_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(cls, model: Any, options: Any = None, **inputs: Any) -> io.NodeOutput:
        """Sample with the host's own node."""
        import nodes

        return io.NodeOutput(*nodes.KSamplerAdvanced().sample(**_routed(cls, model=model, options=options, **inputs)))
