"""The structure of a model, and how its calls go through it: traced once for each shape of their inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from asyncdiff_nodes.engine.bands import Bands
from asyncdiff_nodes.engine.batch import Arguments, batch_of
from asyncdiff_nodes.engine.errors import PlanError, UnsupportedModelError
from asyncdiff_nodes.engine.inputs import Inputs
from asyncdiff_nodes.engine.planning.bands import find_bands
from asyncdiff_nodes.engine.planning.discovery import discover
from asyncdiff_nodes.engine.planning.family import UNKNOWN, Family, example_of, listed_family
from asyncdiff_nodes.engine.planning.graph import BlockGraph
from asyncdiff_nodes.engine.planning.plan import Plan
from asyncdiff_nodes.engine.planning.trace import trace
from asyncdiff_nodes.engine.tensors import meta_copy


class TracedModel:
    """What the parent knows of a model without its weights.

    Args:
        module: on any device.
        family: as for :class:`.WorkerGroup`.

    Attributes:
        skeleton: the module on the meta device.
        bandless: why calls are not computed in bands, though a plan says so.
    """

    def __init__(self, module: nn.Module, family: Family | None) -> None:
        self.skeleton = meta_copy(module)
        self.bandless = ""
        self._family = family or listed_family(module)
        self._graphs: dict[Any, BlockGraph] = {}
        self._bands: dict[Any, Bands | None] = {}

    @property
    def family(self) -> Family:
        """How the model is split. Raises PlanError before that is found out, in :meth:`first`."""
        if self._family is None:
            raise PlanError(UNKNOWN)
        return self._family

    def example(self) -> Arguments | None:
        """Return inputs of a typical call, if the family knows any."""
        return example_of(self._family, self.skeleton)

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan) -> tuple[BlockGraph, Plan]:
        """Trace one branch's part of a call, and find out first how to split a model that no table has.

        Returns:
            The graph, and ``plan``; without bands where segments have to do without them.

        Raises:
            UnsupportedModelError: see its message.
        """
        graph = None
        if self._family is None:
            self._family, graph = discover(self.skeleton, args, kwargs)
        part = self.family.parts(args, kwargs, plan.branches)[0]
        if graph is None or plan.branches > 1:
            graph = trace(self.skeleton, self.family, *part)
        in_bands = plan.bands > 1 and self.bands(Inputs.take(*part, self.family.timestep), plan) is not None
        return graph, plan if in_bands else replace(plan, bands=1)

    def graph(self, inputs: Inputs, placed: BlockGraph) -> BlockGraph:
        """Return the block graph with these inputs, as one of ``placed``, by which blocks were placed.

        Raises:
            OtherPathError: the model takes another path with these inputs.
        """
        signature = inputs.signature
        if signature not in self._graphs:
            self._graphs[signature] = trace(self.skeleton, self.family, *inputs.arguments()).within(placed)
        return self._graphs[signature]

    def bands(self, inputs: Inputs, plan: Plan) -> Bands | None:
        """Find how these inputs are computed in bands, if ``plan`` says so; None where its segments do without.

        Raises:
            UnsupportedModelError: they cannot be, and there are no segments.
        """
        if plan.bands == 1:
            return None
        key = inputs.signature, inputs.integers
        if key not in self._bands:
            try:
                self._bands[key] = find_bands(self.skeleton, self.family, *inputs.arguments(), plan.bands)
            except UnsupportedModelError as error:
                if plan.segments == 1:
                    raise
                self._bands[key], self.bandless = None, str(error)
        return self._bands[key]

    def microbatches(self, inputs: Inputs, graph: BlockGraph, count: int) -> int:
        """Say into how many parts of its batch, at most ``count``, the call can be divided."""
        if count == 1:
            return 1
        args, kwargs = inputs.arguments()
        batch = batch_of(args, kwargs, self.family.sample)
        alike = all(meta.divides(batch) for block in graph.blocks for meta in block.outputs)
        return len(self.family.parts(args, kwargs, count)) if alike else 1
