"""A node pack for tests only: small random models without a checkpoint, and latents saved bit for bit."""

import sys
from pathlib import Path

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file

_TESTS = str(Path(__file__).resolve().parent.parent)
if _TESTS not in sys.path:
    sys.path.append(_TESTS)

from helpers import denoisers, small  # noqa: E402

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


class AsyncDiffTestDenoiser(io.ComfyNode):
    """A tiny model of one of the host's networks, a prompt and a latent for it; of a nested latent also the last one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AsyncDiffTestDenoiser",
            category=CATEGORY,
            inputs=[io.Combo.Input("name", options=list(denoisers.DENOISERS))],
            outputs=[io.Model.Output(), io.Conditioning.Output(), io.Latent.Output(), io.Latent.Output("last")],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        denoiser = denoisers.DENOISERS[name]
        latent = denoiser.latent()
        last = {"samples": denoisers.tensors_of(latent)[-1]}
        return io.NodeOutput(denoiser.model(), denoiser.conditioning(), latent, last)


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
    """``samples`` of a latent, in ``output/NAME.safetensors``; those of a nested one in one row."""

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
        tensors = denoisers.tensors_of(latent)
        samples = tensors[0].contiguous() if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])
        save_file({"samples": samples}, path)
        return io.NodeOutput()


class TestExtension(ComfyExtension):
    """The nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AsyncDiffTestModel, AsyncDiffTestDenoiser, AsyncDiffTestLora, AsyncDiffTestSave]


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI."""
    return TestExtension()
