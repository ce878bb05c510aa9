"""A node pack for tests only: small random models without a checkpoint, and latents saved bit for bit."""

import sys
from pathlib import Path

import comfy.sd
import folder_paths
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file

_TESTS = str(Path(__file__).resolve().parent.parent)
if _TESTS not in sys.path:
    sys.path.append(_TESTS)

from helpers import small  # noqa: E402

CATEGORY = "AsyncDiff/tests"


class AsyncDiffTestModel(io.ComfyNode):
    """A model of one kind, and two prompts for it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AsyncDiffTestModel",
            category=CATEGORY,
            inputs=[io.Combo.Input("kind", options=list(small.KINDS)), io.Int.Input("seed", default=0, min=0)],
            outputs=[io.Model.Output(), io.Conditioning.Output("positive"), io.Conditioning.Output("negative")],
        )

    @classmethod
    def execute(cls, kind, seed) -> io.NodeOutput:
        return io.NodeOutput(small.model(kind, seed), small.conditioning(kind, 1), small.conditioning(kind, 2))


class AsyncDiffTestLora(io.ComfyNode):
    """The model with a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AsyncDiffTestLora",
            category=CATEGORY,
            inputs=[io.Model.Input("model"), io.Float.Input("strength", default=1.0, min=-10.0, max=10.0)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, strength) -> io.NodeOutput:
        return io.NodeOutput(comfy.sd.load_lora_for_models(model, None, small.lora(model), strength, 0)[0])


class AsyncDiffTestSave(io.ComfyNode):
    """``samples`` of a latent, in ``output/NAME.safetensors``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AsyncDiffTestSave",
            category=CATEGORY,
            inputs=[io.Latent.Input("latent"), io.String.Input("name")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        """Never equal: another prompt may have written the same name."""
        return float("nan")

    @classmethod
    def execute(cls, latent, name) -> io.NodeOutput:
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({"samples": latent["samples"].contiguous()}, path)
        return io.NodeOutput()


class TestExtension(ComfyExtension):
    """The three nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AsyncDiffTestModel, AsyncDiffTestLora, AsyncDiffTestSave]


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI."""
    return TestExtension()
