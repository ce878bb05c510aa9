"""Trace of a model to its block graph, by one forward on the meta device: no weight is read, moved or allocated."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from asyncdiff_nodes.engine.batch import sample_of
from asyncdiff_nodes.engine.errors import UnsupportedModelError
from asyncdiff_nodes.engine.tensors import TensorMeta, tensors_of
from asyncdiff_nodes.engine.trees import flatten

from .family import Family, HiddenStates
from .graph import Block, BlockGraph, Hidden
from .provenance import Provenance, Sources, blocks_of, inputs_of

_NO_META_KERNEL = re.compile(  # in PyTorch's words: for its own operators, and for those of others
    r"(\w+::\w+): attempted to run this operator with Meta|no fake impl registered for <CustomOpDef\((\S+)\)>"
)


def trace(skeleton: nn.Module, family: Family, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockGraph:
    """Run ``skeleton`` once on meta inputs and record its block graph.

    Args:
        skeleton: the model on the meta device; see :func:`~asyncdiff_nodes.engine.tensors.meta_copy`.
        family: names the blocks.
        args, kwargs: inputs of one call; tensors on any device, only their shapes and dtypes are used.

    Raises:
        UnsupportedModelError: a block is nested in another, or ran more than once; the forward needs values.
        Exception: whatever the model's forward raises for these inputs.

    Three layers, of which the last one reads the first one's output, too:

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.c = (nn.Linear(4, 4, device="meta") for _ in range(3))
    ...     def forward(self, x, t):
    ...         skip = self.a(x)
    ...         return self.c(self.b(skip) + skip)
    >>> family = Family("Net", lambda net: ["a", "b", "c"], timestep=(1, "t"), example_inputs=None, sample=(0, "x"))
    >>> graph = trace(Net(), family, (torch.empty(2, 4), 0), {})
    >>> graph.names, sorted(graph.edges)
    (('a', 'b', 'c'), [(0, 1), (0, 2), (1, 2)])
    >>> [block.macs for block in graph.blocks], graph.blocks[0].reads  # 2 rows of 4 times 4 weights; the first leaf is x
    ([32, 32, 32], frozenset({0}))
    """
    names = family.block_names(skeleton)
    for name in names:
        if any(other != name and name.startswith(other + ".") for other in names):
            raise UnsupportedModelError(f"family {family.name}: block {name} lies within another block")
    args, kwargs = tree_map(_to_meta, (args, kwargs))
    recorder = _Recorder(family)
    for position, leaf in enumerate(flatten((args, kwargs))[0]):
        recorder.provenance.mark(leaf, frozenset({~position}))
    if family.trace_inputs is not None:
        args, kwargs = family.trace_inputs(args, kwargs)
    # the last one sees an operation first
    try:
        with (
            recorder.listening(skeleton, names),
            torch.no_grad(),
            _ConvolutionLayouts(),
            recorder.flops,
            recorder.provenance,
            _CudnnConvolution(),  # the first one to see an operation
        ):
            result = skeleton(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if missing := _NO_META_KERNEL.search(str(error)):
            raise UnsupportedModelError(
                f"it uses {missing[1] or missing[2]}, an operator of which PyTorch cannot tell the result's shape without "
                "computing it (it has no meta kernel). The model may be split where another one does its work"
            ) from error
        if "meta" not in str(error).lower():
            raise
        raise UnsupportedModelError(f"with these inputs its forward depends on values, not shapes alone ({error})") from error
    return recorder.graph(skeleton, result)


class _Recorder:
    """Notes what each block does while a skeleton runs, and makes a block graph of it.

    Attributes:
        provenance, flops: to be entered while the skeleton runs.
    """

    def __init__(self, family: Family) -> None:
        self.provenance, self.flops = Provenance(), FlopCounterMode(display=False)
        self._family = family
        self._blocks: dict[str, Block | None] = {}  # in the order in which they begin; None until they end
        self._edges: set[tuple[int, int]] = set()
        self._flops_before = 0  # the running block
        # the hidden states that the first block of a transformer takes, and what they are made of
        self._taken: tuple[TensorMeta, Sources] | None = None

    @contextlib.contextmanager
    def listening(self, skeleton: nn.Module, names: Iterable[str]) -> Iterator[None]:
        """Listen, while it lasts, to when the blocks ``names`` begin and end."""
        with contextlib.ExitStack() as hooks:
            for name in names:
                block = skeleton.get_submodule(name)
                hooks.callback(block.register_forward_pre_hook(partial(self._begins, name), with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(partial(self._ends, name)).remove)
            yield

    def _begins(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if name in self._blocks:
            raise UnsupportedModelError(f"family {self._family.name}: block {name} runs more than once per call")
        index = len(self._blocks)
        self._blocks[name] = None
        sources = self.provenance.enter(index, (args, kwargs))
        self._edges.update((producer, index) for producer in blocks_of(sources))
        hidden = self._family.hidden
        if hidden is not None and name == hidden.block:
            states = sample_of(args, kwargs, hidden.argument)
            if isinstance(states, torch.Tensor):  # else this version of the model calls it otherwise
                self._taken = TensorMeta.of(states), self.provenance.sources(states)
        self._flops_before = self.flops.get_total_flops()

    def _ends(self, name: str, block: nn.Module, _: Any, output: Any) -> None:
        macs = (self.flops.get_total_flops() - self._flops_before) // 2
        leaves, structure = flatten(output)
        reads = inputs_of(self.provenance.leave(output))
        self._blocks[name] = Block(name, tuple(map(TensorMeta.of, leaves)), structure, macs, _nbytes(block), reads)

    def graph(self, skeleton: nn.Module, result: Any) -> BlockGraph:
        """Return the block graph of ``skeleton``, which has just returned ``result``."""
        *before, end = (block for block in self._blocks.values() if block is not None)  # all have ended
        last, sources = len(before), self.provenance.sources(result)
        blocks = (*before, replace(end, reads=end.reads | inputs_of(sources)))
        read_by_result = {(producer, last) for producer in blocks_of(sources) if producer < last}
        graph = BlockGraph(
            blocks=blocks,
            edges=frozenset(self._edges | read_by_result),
            glue_macs=self.flops.get_total_flops() // 2 - sum(block.macs for block in blocks),
            glue_bytes=_nbytes(skeleton) - sum(block.weight_bytes for block in blocks),
        )
        if self._family.hidden is None or self._taken is None:
            return graph
        return replace(graph, hidden=_hidden(graph, self._family.hidden, *self._taken))


class _CudnnConvolution(TorchDispatchMode):
    """Runs cuDNN's convolution as the usual one: it has no meta kernel.

    ComfyUI calls it for 3D convolutions on NVIDIA's GPUs, since the usual one takes too much memory in some versions of PyTorch.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.cudnn_convolution.default:
            return func(*args, **(kwargs or {}))
        value, weight, padding, stride, dilation, groups = args[:6]
        return torch.ops.aten.convolution(value, weight, None, stride, padding, dilation, False, [0] * len(padding), groups)


class _ConvolutionLayouts(TorchDispatchMode):
    """Gives the results of 2D convolutions the memory format that devices give them, which torch's meta kernel leaves open.

    Values cross in the traced layouts, and other kernels serve another layout, with other rounding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.convolution.default or out.ndim != 4:
            return out
        last = torch.channels_last in map(suggest_memory_format, args[:2])
        return torch.empty_like(out, memory_format=torch.channels_last) if last else out


def _hidden(graph: BlockGraph, known: HiddenStates, taken: TensorMeta, sources: Sources) -> Hidden:
    """Say which blocks hand on the hidden states ``taken``, which are made of ``sources``."""
    carriers = {}
    for block in graph.blocks:
        index = known.lists.get(block.name.rpartition(".")[0])
        if index is not None and index < len(block.outputs) and _holds(block.outputs[index].shape, taken.shape):
            carriers[block.name] = index
    return Hidden(known.block, known.argument, frozenset(graph.made_of(blocks_of(sources))), inputs_of(sources), carriers)


def _holds(shape: tuple[int, ...], states: tuple[int, ...]) -> bool:
    """Whether hidden states [B, T, ...] can be the last tokens of a tensor of this shape.

    >>> _holds((2, 77 + 1024, 64), (2, 1024, 64)), _holds((2, 1024, 128), (2, 1024, 64))
    (True, False)
    """
    return len(shape) == len(states) and shape[1] >= states[1] and (shape[0], *shape[2:]) == (states[0], *states[2:])


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for _, tensor in tensors_of(module))


def _to_meta(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, torch.Tensor) else leaf
