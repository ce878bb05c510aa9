"""What ``auto`` stands for, and which devices ranks can use at all."""

import os
from types import SimpleNamespace

import pytest
import sim
import torch

from asyncdiff_nodes.engine import DeviceError, accelerator
from asyncdiff_nodes.engine.devices import parse_devices

GIB = 2**30


@pytest.fixture
def cards(monkeypatch):
    """Have the simulated devices be others: memory in GiB, whether integrated, and compute capability."""

    def install(*known):
        def properties(_, device=None):
            memory, integrated, _ = known[sim._index(device)]
            return SimpleNamespace(name=f"NVIDIA GeForce {memory}", total_memory=memory * GIB, is_integrated=integrated)

        monkeypatch.setattr(sim._Module, "get_device_properties", properties)
        monkeypatch.setattr(accelerator, "_capability", lambda device: known[sim._index(device)][2])

    return install


def test_equal_devices_are_all_used():
    assert accelerator.own_kind() == "sim" and accelerator.all_devices("sim") == ["sim:0", "sim:1", "sim:2"]
    assert accelerator.like_the_first("sim") == (["sim:0", "sim:1", "sim:2"], [])
    assert (accelerator.title("sim:1"), accelerator.total_memory("sim:1")) == ("Simulated 1", sim.BUDGET)


@pytest.mark.parametrize(
    ("known", "kept", "whys"),
    [
        ([(24, 0, 8), (24, 0, 8), (12, 0, 8)], [0, 1, 2], []),
        ([(24, 0, 8), (2, 0, 8), (24, 0, 8)], [0, 2], ["it has 2.0 GiB of memory, the largest one 24.0 GiB"]),
        ([(24, 0, 8), (24, 0, 8), (16, 1, None)], [0, 1], ["it is integrated into the processor"]),
        (
            [(24, 0, 8), (24, 0, 6), (32, 0, 12)],
            [0, 2],
            ["it cannot compute in bfloat16 (compute capability 6.x), which sim:0 can"],
        ),
        ([(11, 0, 7), (11, 0, 6), (24, 0, 8)], [0, 1, 2], []),  # dtypes are chosen for the first
        ([(16, 1, None), (16, 1, None), (16, 1, None)], [0], ["it is integrated into the processor"] * 2),
    ],
)
def test_devices_that_would_hold_up_the_first_are_left_out_by_name(cards, known, kept, whys):
    cards(*known)
    used, left_out = accelerator.like_the_first("sim")
    assert used == [f"sim:{index}" for index in kept]
    assert [each.why for each in left_out] == whys
    assert all(each.title == str(known[int(each.device[-1])][0]) for each in left_out)


@pytest.mark.parametrize("kind", ["mps", "meta", "vulkan", "sim"])
def test_a_kind_without_streams_is_refused_by_name(kind, monkeypatch):
    if kind == "sim":
        monkeypatch.delattr(sim._Module, "current_stream")
        assert accelerator.own_kind() is None
    with pytest.raises(DeviceError, match=rf"{kind}.* cannot be used: .*lacks .*current_stream"):
        parse_devices([kind])
    assert accelerator.all_devices(kind) == []


def test_a_number_too_large_is_named():
    with pytest.raises(DeviceError, match="the last one is sim:2"):
        parse_devices(["sim:3"])
    assert parse_devices(["sim", "sim:2", "cpu"]) == [torch.device("sim:0"), torch.device("sim:2"), torch.device("cpu")]


@pytest.mark.parametrize(("hip", "expected"), [(None, 8), ("6.4", None)])
def test_compute_capability_is_nvidias(hip, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert accelerator._capability("cuda:0") == expected and accelerator._capability("sim:0") is None


@pytest.mark.parametrize("one_machine", [True, False])
def test_direct_links_find_each_other_on_loopback_where_one_machine_has_them_all(one_machine, monkeypatch):
    monkeypatch.setattr("os.environ", {"CUDA_LAUNCH_BLOCKING": "1"})
    accelerator.before_direct_links(one_machine)
    assert os.environ.get("NCCL_SOCKET_IFNAME") == ("=lo" if one_machine else None)
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ and os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"


def test_there_is_nothing_to_wait_for_on_a_cpu():
    for wait in (accelerator.synchronize, accelerator.synchronize_stream, accelerator.empty_cache, accelerator.enter):
        wait(torch.device("cpu"))
