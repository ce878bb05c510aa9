"""The node that compares AsyncDiff with KSampler: how near the picture is, and how long it takes."""

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
        tip = "With a VAE, the two pictures are compared; without one, the two latents."
        return io.Schema(
            node_id="AsyncDiffCompare",
            display_name="AsyncDiff Compare",
            category="AsyncDiff",
            description="Samples twice with the same seed: once with KSampler, and once on all GPUs together. Then it tells you "
            "how far apart the two results are, and how long each took.",
            inputs=[*ksampler_inputs(), options_input(), io.Vae.Input("vae", optional=True, tooltip=tip)],
            outputs=[
                io.Latent.Output("asyncdiff", display_name="AsyncDiff", tooltip="The latent that all GPUs computed together."),
                io.Latent.Output("ksampler", display_name="KSampler", tooltip="The latent that KSampler computed."),
                io.String.Output("text", display_name="text", tooltip="Distance, times, and the report on the second run."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Return NaN, which never equals itself, so that times are measured each time."""
        return float("nan")

    @classmethod
    def execute(cls, model: Any, options: Any = None, vae: Any = None, **inputs: Any) -> io.NodeOutput:
        """Sample twice. Returns both latents and the text, which the node shows as well."""
        from asyncdiff_nodes.host.checks import checked
        from asyncdiff_nodes.host.routing.compare import compare

        routed, usual, text = compare(**checked(cls, model=model, options=options, vae=vae, **inputs))
        return io.NodeOutput(routed, usual, text, ui=ui.PreviewText(text))
