"""The price of asynchrony, seen before it is paid."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .model import options_input
from .samplers import ksampler_inputs


class AsyncDiffCompare(io.ComfyNode):
    """KSampler and KSampler (AsyncDiff) side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and widget order of KSampler, then the options and the VAE."""
        tip = "With it, the distance is that of the pictures, otherwise that of the latents."
        return io.Schema(
            node_id="AsyncDiffCompare",
            display_name="AsyncDiff Compare",
            category="AsyncDiff",
            description="Samples twice with the same seed, as KSampler and by all GPUs together, and says how far apart the "
            "results are and how long each took.",
            inputs=[*ksampler_inputs(), options_input(), io.Vae.Input("vae", optional=True, tooltip=tip)],
            outputs=[
                io.Latent.Output("asyncdiff", display_name="AsyncDiff", tooltip="The latent by all GPUs."),
                io.Latent.Output("ksampler", display_name="KSampler", tooltip="The latent by KSampler."),
                io.String.Output("text", display_name="text", tooltip="Distance and times, and the report on the run."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Never equal: times are measured anew."""
        return float("nan")

    @classmethod
    def execute(cls, model: Any, options: Any = None, vae: Any = None, **inputs: Any) -> io.NodeOutput:
        """Both latents, and the text on the node as well."""
        from asyncdiff_nodes.host.checks import checked
        from asyncdiff_nodes.host.routing.compare import compare

        routed, usual, text = compare(**checked(cls, model=model, options=options, vae=vae, **inputs))
        return io.NodeOutput(routed, usual, text, ui=ui.PreviewText(text))
