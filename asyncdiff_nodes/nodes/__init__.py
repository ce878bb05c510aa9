"""The nodes: schemas, and one call into :mod:`asyncdiff_nodes.host` each."""

from comfy_api.latest import ComfyExtension, io

from .compare import AsyncDiffCompare
from .demo import AsyncDiffDemoLoader, AsyncDiffDemoTextEncode
from .model import AsyncDiffModel, AsyncDiffOptions
from .report import AsyncDiffReport
from .samplers import AsyncDiffKSampler, AsyncDiffKSamplerAdvanced


class AsyncDiffExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes' classes, in the order of the menu."""
        return [
            AsyncDiffKSampler,
            AsyncDiffKSamplerAdvanced,
            AsyncDiffModel,
            AsyncDiffOptions,
            AsyncDiffReport,
            AsyncDiffCompare,
            AsyncDiffDemoLoader,
            AsyncDiffDemoTextEncode,
        ]
