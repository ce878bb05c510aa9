"""What of a call's arguments is sent."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from asyncdiff_nodes.engine.inputs import Inputs
from asyncdiff_nodes.engine.tensors import TensorMeta, copied, dense_on_cpu

LONG = torch.arange(100_000.0).view(2, -1)


def changed(tensor):
    other = tensor.clone()
    other.view(-1)[-1] += 1
    return other


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (LONG, LONG.clone(), True),
        (LONG, changed(LONG), False),
        (LONG, LONG.view(-1, 2), False),
        (LONG.T, LONG.T.contiguous(), True),
        (LONG.T, changed(LONG).T, False),
        (LONG[:, ::2], LONG[:, ::2].clone(), True),
        (torch.tensor(1), torch.tensor(1), True),
        (torch.zeros(0, 3), torch.zeros(0, 3), True),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), False),
        (nn.Parameter(LONG), nn.Parameter(LONG), False),  # constant: one of its own
    ],
)
def test_what_has_the_same_values_is_not_sent_again(before, now, same):
    def take(tensor):
        return Inputs.take((torch.zeros(1), 10, tensor), {}, (1, "timestep"))

    _, tensors, known = take(before).pack(None, always=[0])
    assert len(tensors) == 2
    packed, tensors, _ = take(now).pack(known, always=[0])
    assert packed[1] == (("same", None) if same else ("tensor", 1)) and len(tensors) == 2 - same


@pytest.mark.parametrize(
    "tensor",
    [
        LONG,
        LONG.T,
        LONG[:, ::2],
        torch.ones(3, 1).expand(3, 4),
        torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.zeros(0, 4),
        torch.zeros(3, requires_grad=True),
    ],
)
def test_a_copy_is_dense_and_has_memory_of_its_own(tensor):
    copy = copied(tensor)
    assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype and not copy.requires_grad
    assert copy.stride() == TensorMeta.of(tensor).stride
    assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("make", [copied, dense_on_cpu])
@pytest.mark.parametrize("lazy", [torch.Tensor.conj, torch._neg_view, lambda tensor: tensor.conj().imag])
def test_what_pytorch_conjugates_or_negates_as_it_reads_is_so_in_memory(make, lazy):
    tensor = lazy(torch.tensor([1 + 2j, 3 - 4j]))
    assert tensor.is_conj() or tensor.is_neg()
    made = make(tensor)
    assert torch.equal(made, tensor) and not made.is_conj() and not made.is_neg()


def test_the_caller_wakes_no_threads():
    """Those of the ranks may be at work on the same cores. PyTorch starts its threads when it first needs them."""
    program = """
        import psutil
        import torch
        from asyncdiff_nodes.engine.inputs import Inputs

        def threads():
            return psutil.Process().num_threads()

        tensors = torch.frombuffer(bytearray(2**22), dtype=torch.float32), torch.frombuffer(bytearray(2**22), dtype=torch.float32)
        before = threads()
        calls = [Inputs.take((torch.zeros(1), 10, tensor), {}, (1, "timestep")) for tensor in tensors]
        _, _, known = calls[0].pack(None, always=[0])
        packed, _, _ = calls[1].pack(known, always=[0])
        assert packed[1] == ("same", None)
        alone = threads()
        torch.equal(*tensors)
        print(alone - before, threads() - before)
    """
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.split() == ["0", "1"]
