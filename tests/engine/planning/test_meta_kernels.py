"""Operations on meta: what is remembered of one gives the same tensors as PyTorch's own kernel."""

import pytest
import torch

from asyncdiff_nodes.engine.planning.meta_kernels import MetaKernels, run

aten = torch.ops.aten


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def last(*shape):
    return meta(*shape).to(memory_format=torch.channels_last)


def parameter(*shape):
    return torch.nn.Parameter(meta(*shape), requires_grad=False)


CONVOLVED = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
MAKE_NEW = {  # each twice, with other tensors of the same layout
    "sum": (aten.add.Tensor, lambda: (meta(2, 3), meta(3))),
    "sum of a transposed one": (aten.add.Tensor, lambda: (meta(3, 2).t(), meta(2, 1))),
    "product with an integer": (aten.mul.Tensor, lambda: (meta(4, dtype=torch.int64), 1)),
    "product with a fraction": (aten.mul.Tensor, lambda: (meta(4, dtype=torch.int64), 1.0)),
    "linear layer": (aten.addmm.default, lambda: (parameter(5), meta(2, 3), parameter(5, 3).t())),
    "joined": (aten.cat.default, lambda: ([meta(2, 3), meta(2, 4, dtype=torch.float16)], 1)),
    "several results": (aten.native_layer_norm.default, lambda: (meta(2, 3, 8), [8], parameter(8), None, 1e-5)),
    "convolution": (aten.convolution.default, lambda: (meta(1, 4, 8, 8), parameter(4, 4, 3, 3), None, *CONVOLVED)),
    "convolution, channels last": (aten.convolution.default, lambda: (last(1, 4, 8, 8), parameter(4, 4, 3, 3), None, *CONVOLVED)),
    "another type": (aten._to_copy.default, lambda: (meta(3, 2).t(),)),
}  # fmt: skip


def layouts(out):
    return [
        (type(leaf), leaf.device, leaf.shape, leaf.stride(), leaf.dtype) for leaf in ((out,) if torch.is_tensor(out) else out)
    ]


@pytest.fixture
def ran(monkeypatch):
    """The operations that PyTorch's kernels ran."""
    found = []
    monkeypatch.setattr(
        "asyncdiff_nodes.engine.planning.meta_kernels.run", lambda func, *given: found.append(func) or run(func, *given)
    )
    return found


@pytest.mark.parametrize("name", MAKE_NEW)
def test_the_second_one_of_a_layout_is_as_the_first(name, ran):
    func, given = MAKE_NEW[name]
    kwargs = {"dtype": torch.float16} if func is aten._to_copy.default else {}
    kernels, expected = MetaKernels(), layouts(run(func, given(), kwargs))
    outs = [kernels.run(func, given(), kwargs) for _ in range(3)]
    assert [layouts(out) for out in outs] == [expected] * 3 and ran == [func]
    assert [type(out) for out in outs] == [type(outs[0])] * 3


def test_other_layouts_types_and_numbers_are_other_operations(ran):
    kernels, integers, fractions = MetaKernels(), meta(4, dtype=torch.int64), meta(4)
    for left, right in ((integers, 1), (integers, 1.0), (integers, True), (fractions, 1), (meta(2, 2), 1), (meta(2, 2).t(), 1)):
        out, expected = (call(aten.mul.Tensor, (left, right), {}) for call in (kernels.run, run))
        assert layouts(out) == layouts(expected)
    assert len(ran) == 6


VIEWS = {
    "a view": (aten.view.default, lambda: (meta(4, 4), [16])),
    "a view that does not say so": (aten._unsafe_view.default, lambda: (meta(4, 4), [16])),
    "pieces": (aten.split.Tensor, lambda: (meta(4, 4), 2)),
    "in place": (aten.add_.Tensor, lambda: (meta(4, 4), 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_shares_memory_with_what_was_given_goes_on_doing_so(name):
    func, given = VIEWS[name]
    kernels = MetaKernels()
    for _ in range(2):
        args = given()
        for leaf in (out,) if torch.is_tensor(out := kernels.run(func, args, {})) else out:
            assert leaf.untyped_storage()._cdata == args[0].untyped_storage()._cdata
