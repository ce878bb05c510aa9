"""What would make a network wrong if it were split, looked for in what its forward did on meta."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from asyncdiff_nodes.engine.stub import make_stub
from asyncdiff_nodes.engine.tensors import meta_copy
from asyncdiff_nodes.engine.trees import flatten, unflatten

from .choice import Chosen
from .provenance import memory_of
from .recording import Operation, Recording

_Tensor = type("_Tensor", (int,), {})  # the identity of one
State = dict[tuple[str, str], Any]  # (module, attribute) -> what is in it, in brief

_OWN = frozenset(vars(nn.Module()))  # attributes that every module has


def problems(recording: Recording, chosen: Chosen) -> Iterator[str]:
    """Yield what blocks do beyond reading their arguments and returning their results."""
    owner = owners(recording, chosen)
    home = {index: call.name for call in chosen.calls for index in range(call.begins, call.ends)}
    results = {(id(leaf), call.name) for call in chosen.calls for leaf in call.returned}
    handed_on = {leaf for leaf, _ in results}
    given = {memory_of(leaf) for leaf in recording.inputs if isinstance(leaf, torch.Tensor)}
    born: dict[int, str | None] = {}  # tensor -> the block in which it was made
    made: dict[int, str | None] = {}  # memory -> the block in which it was allocated
    written: dict[int, str] = {}  # another's memory -> the block that wrote to it
    ends = {call.ends: call for call in chosen.calls}
    if len(owner) < sum(len(list(call.module.parameters())) + len(list(call.module.buffers())) for call in chosen.calls):
        yield "blocks share weights"
    for index, operation in enumerate(recording.operations):
        if (ended := ends.get(index)) is not None:
            for leaf in ended.returned:
                written.pop(memory_of(leaf), None)
        here = home.get(index)
        if torch.Tag.nondeterministic_seeded in operation.func.tags and _draws(operation):
            yield f"random numbers are drawn within it ({operation.func._overloadpacket})"
        for tensor in operation.reads:
            block = owner.get(id(tensor))
            if block not in (None, here):
                yield f"weights of {like(block)} are used outside of it"
            block = born.get(id(tensor))
            if block not in (None, here) and (id(tensor), block) not in results:
                yield f"{like(block)} makes a value that it does not return, and that is used in {like(here)}"
            writer = written.get(memory_of(tensor))
            if writer not in (None, here) and id(tensor) not in handed_on:
                yield f"{like(writer)} writes to what it was given, which is used again in {like(here)}"
        for tensor in operation.writes:
            memory = memory_of(tensor)
            if memory in given and here is not None:  # what every rank does changes every rank's inputs
                yield f"{like(here)} writes to the network's own inputs"
            if here is not None and made.get(memory) != here:
                written[memory] = here
        for tensor in operation.makes:
            if not any(tensor is other for other in operation.writes):
                born[id(tensor)] = here
            made.setdefault(memory_of(tensor), here)


def owners(recording: Recording, chosen: Chosen) -> dict[int, str]:
    """Find the block that each weight is of, by the weight's id."""
    names, found = set(chosen.names), {}
    for weight, tensor in recording.weights.items():
        parent = weight.rpartition(".")[0]
        while parent and parent not in names:
            parent = parent.rpartition(".")[0]
        if parent:
            found[id(tensor)] = parent
    return found


def like(name: str | None) -> str:
    """Name a module without its numbers, so that alike findings are one; the glue where it is None.

    >>> like("blocks.3.attn"), like(None)
    ('blocks.*.attn', 'the rest of it')
    """
    return "the rest of it" if name is None else ".".join("*" if part.isdigit() else part for part in name.split("."))


def _draws(operation: Operation) -> bool:
    """Whether an operation that is said to draw random numbers does so, in evaluation mode, from a generator that others use."""
    name = str(operation.func)
    return "dropout" not in name and "attention" not in name and operation.kwargs.get("generator") is None


def kept_values(before: Recording, after: Recording, chosen: Chosen) -> Iterator[str]:
    """Yield what the second of two calls, ``after``, uses of the values of the first one."""
    tainted = {id(leaf) for leaf in before.inputs if isinstance(leaf, torch.Tensor)}
    home = {index: call.name for call in chosen.calls for index in range(call.begins, call.ends)}
    made: dict[int, str | None] = {}
    for index, operation in enumerate(before.operations):
        if any(id(tensor) in tainted for tensor in operation.reads):
            tainted.update(id(tensor) for tensor in (*operation.makes, *operation.writes))
        made.update((id(tensor), home.get(index)) for tensor in operation.makes)
    second = {call.name: call for call in after.calls}
    home = {i: name for name in chosen.names if (call := second.get(name)) for i in range(call.begins, call.ends)}
    for index, operation in enumerate(after.operations):
        for tensor in operation.reads:
            if id(tensor) not in made:
                continue
            elsewhere = made[id(tensor)] is not None and made[id(tensor)] != home.get(index)
            if id(tensor) in tainted or elsewhere:
                yield f"a call uses what the call before it has kept in {like(made[id(tensor)] or operation.call.name or None)}"


def state_of(module: nn.Module) -> State:
    """Describe everything that a network keeps between calls."""
    return {
        (name, key): _brief(value)
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if key not in _OWN
    }


def changed_state(before: State, after: State) -> Iterator[str]:
    """Yield which attributes differ, but for tensors: whether these are used, :func:`kept_values` says."""
    for name, key in sorted(before.keys() | after.keys()):
        old, new = before.get((name, key)), after.get((name, key))
        if old != new and _without_tensors(old) != _without_tensors(new):
            yield f"each call changes {'.'.join(filter(None, (like(name) if name else '', key)))}"


def _brief(value: Any, depth: int = 0) -> Any:
    """Reduce an attribute to what can be compared: plain values, and the sizes of containers."""
    if isinstance(value, int | float | str | bool | complex | type(None)):
        return value
    if isinstance(value, torch.Tensor):
        return _Tensor(id(value))
    if isinstance(value, dict) and depth < 2:
        return len(value), tuple((str(key), _brief(item, depth + 1)) for key, item in value.items())
    if isinstance(value, list | tuple | set) and depth < 2:
        return len(value), tuple(_brief(item, depth + 1) for item in value)
    return type(value).__name__


def _without_tensors(brief: Any) -> Any:
    if isinstance(brief, tuple):
        return tuple(map(_without_tensors, brief))
    return None if isinstance(brief, _Tensor) else brief


def arguments_of(args: Any, kwargs: Any) -> Any:
    """Describe the containers and plain values of a call's arguments, without options, in which a forward notes where it is."""
    return _brief((args, {key: value for key, value in kwargs.items() if key != "transformer_options"}), -4)


def stub_fault(module: nn.Module, chosen: Chosen, run: Any) -> tuple[str | None, str] | None:
    """Run the network with a stub in place of every block.

    Args:
        run: runs a network.

    Returns:
        None if it runs; else the block that is looked into, if it is known, and the error.
    """
    stubs = meta_copy(module, [module.get_submodule(call.name) for call in chosen.calls])  # most of it is in blocks
    for call in chosen.calls:
        leaves, structure = flatten(call.output)
        make_stub(stubs.get_submodule(call.name), _handing_back(leaves, structure))
    try:
        run(stubs)
    except Exception as error:
        return _looked_into(error, stubs, chosen), f"{type(error).__name__}: {error}"
    return None


def _handing_back(leaves: list[Any], structure: Any) -> Any:
    return lambda: unflatten([torch.empty_like(leaf, device="meta") for leaf in leaves], structure)


def _looked_into(error: BaseException, stubs: nn.Module, chosen: Chosen) -> str | None:
    """Find the stub that an error is about: it lacks what was asked of it."""
    blocks = {id(stubs.get_submodule(name)): name for name in chosen.names}
    trace, found = error.__traceback__, None
    while trace is not None:
        found = blocks.get(id(trace.tb_frame.f_locals.get("self"))) or found
        trace = trace.tb_next
    return found
