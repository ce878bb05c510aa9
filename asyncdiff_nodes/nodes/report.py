"""The report on the last sampling, as text and as a picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui


class AsyncDiffReport(io.ComfyNode):
    """What the ranks did in the last run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """A latent, so that it runs after the sampler."""
        return io.Schema(
            node_id="AsyncDiffReport",
            display_name="AsyncDiff Report",
            category="AsyncDiff",
            description="The last AsyncDiff run: plan, times, speed-up, bytes, drift and memory, and a timeline of the devices.",
            inputs=[io.Latent.Input("latent", tooltip="The sampler's result: the report is made after it.")],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report in words."),
                io.Image.Output(display_name="timeline", tooltip="When each device computed, one lane per rank."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Never equal: every run has a report of its own."""
        return float("nan")

    @classmethod
    def execute(cls, latent: Any) -> io.NodeOutput:
        """Text and timeline of the last run."""
        from asyncdiff_nodes.host.checks import checked
        from asyncdiff_nodes.host.page.report import last_run
        from asyncdiff_nodes.host.page.timeline import timeline

        checked(cls, latent=latent)
        record = last_run()
        if record is None:
            raise ValueError(
                "AsyncDiff Report: nothing was sampled with an AsyncDiff node yet; connect the latent of such a sampler"
            )
        text = record.text()
        return io.NodeOutput(text, timeline(record), ui=ui.PreviewText(text))
