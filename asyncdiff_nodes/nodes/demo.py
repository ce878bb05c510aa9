"""Nodes of the demo model: its MODEL and VAE, and CONDITIONING from its own text encoder."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "AsyncDiff"


class AsyncDiffDemoLoader(io.ComfyNode):
    """Outputs the shipped demo model and its VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema without inputs, with MODEL and VAE as outputs."""
        return io.Schema(
            node_id="AsyncDiffDemoLoader",
            display_name="Load AsyncDiff Demo",
            category=CATEGORY,
            description=(
                "A tiny model that draws emoji from text. It comes with this pack, so you can try AsyncDiff without a download. "
                "It draws 32 x 32 pixels: connect EmptyChromaRadianceLatentImage at 32 x 32 and AsyncDiff Demo Text Encode, and "
                "sample about 20 steps at cfg 3."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The demo model. It works directly on 32 x 32 pixels."),
                io.Vae.Output(tooltip="Turns the sampled pixels into an image."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load both from the pack's own files.

        Raises:
            FileNotFoundError: a file of the pack is missing.
        """
        from asyncdiff_nodes.host.demo import load_demo

        return io.NodeOutput(*load_demo())


class AsyncDiffDemoTextEncode(io.ComfyNode):
    """Encodes a prompt for the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema with the input ``text`` and the output CONDITIONING."""
        return io.Schema(
            node_id="AsyncDiffDemoTextEncode",
            display_name="AsyncDiff Demo Text Encode",
            category=CATEGORY,
            description="Encodes a prompt for the AsyncDiff demo model, which has its own text encoder.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="red heart",
                    tooltip=(
                        "The English name of one emoji, up to five plain words: 'red heart', 'panda face', 'slice of pizza', "
                        "'soccer ball', 'sunflower'. A new mix of a colour and a common shape often works, such as 'green "
                        "heart'. The model ignores words that it was not trained on, and the log names them. Leave this empty "
                        "for the negative prompt."
                    ),
                )
            ],
            outputs=[io.Conditioning.Output(tooltip="Works with the demo model only.")],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        """Encode ``text``.

        Raises:
            FileNotFoundError: a file of the pack is missing.
        """
        from asyncdiff_nodes.host.checks import checked
        from asyncdiff_nodes.host.demo import encode

        checked(cls, text=text)
        return io.NodeOutput(encode(text))
