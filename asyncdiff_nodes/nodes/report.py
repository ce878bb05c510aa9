"""The report on the last sampling, as text and as a picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui


class AsyncDiffReport(io.ComfyNode):
    """Shows what the ranks did in the last run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema with a latent as input, so that the node runs after the sampler."""
        return io.Schema(
            node_id="AsyncDiffReport",
            display_name="AsyncDiff Report",
            category="AsyncDiff",
            description="Shows what the last AsyncDiff run did: plan, times, speed-up, bytes sent, the weights on each device, "
            "the drift (how much the values that are sent change from step to step), and a timeline of the devices.",
            inputs=[io.Latent.Input("latent", tooltip="The sampler's result. The report is made after the sampler has run.")],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report as text."),
                io.Image.Output(display_name="timeline", tooltip="When each device was computing, one row per device."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Return NaN, which never equals itself, since every run has its own report."""
        return float("nan")

    @classmethod
    def execute(cls, latent: Any) -> io.NodeOutput:
        """Return text and timeline of the last run.

        Raises:
            ValueError: nothing has been sampled with an AsyncDiff node yet.
        """
        from asyncdiff_nodes.host.checks import checked
        from asyncdiff_nodes.host.page.report import last_run
        from asyncdiff_nodes.host.page.timeline import timeline

        checked(cls, latent=latent)
        record = last_run()
        if record is None:
            raise ValueError(
                "AsyncDiff Report: nothing has been sampled with an AsyncDiff node yet; link latent to an AsyncDiff sampler"
            )
        text = record.text()
        return io.NodeOutput(text, timeline(record), ui=ui.PreviewText(text))
