"""Messages over a pipe."""

import threading

import pytest
import torch
import torch.multiprocessing as mp

from asyncdiff_nodes.engine import wire

TENSORS = [
    torch.arange(3_000_000, dtype=torch.float32),  # more than any pipe holds
    torch.zeros(0, 4),
    torch.tensor(1.5, dtype=torch.bfloat16),
    torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    torch.tensor([True, False]),
]


@pytest.fixture(params=[True, False], ids=["straight", "by the connection"])
def ends(request, monkeypatch):
    """Of a pipe, read and written as on POSIX, and as elsewhere."""
    monkeypatch.setattr(wire, "_POSIX", request.param)
    here, there = wire.pipe(mp.get_context("spawn"))
    yield here, there
    here.close()
    there.close()


def test_what_is_sent_arrives_with_its_layout(ends):
    here, there = ends
    sender = threading.Thread(target=lambda: [wire.send(here, ("header", i), TENSORS) for i in range(3)])
    sender.start()
    for i in range(3):
        header, found = wire.receive(there)
        assert header == ("header", i)
        for sent, got in zip(TENSORS, found, strict=True):
            assert torch.equal(sent, got) and (sent.dtype, sent.stride()) == (got.dtype, got.stride())
    sender.join()


def test_an_end_that_goes_in_mid_message_is_noticed(ends):
    here, there = ends
    errors = []

    def read():
        try:
            wire.receive(there)
        except (EOFError, OSError) as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    whole = torch.zeros(100)
    here.send_bytes(wire.pickle.dumps((("weight", "w"), [wire.TensorMeta.of(whole)])))
    here.close()
    reader.join(timeout=10)
    assert not reader.is_alive() and len(errors) == 1
    with pytest.raises(OSError, match="closed"):
        wire.send(here, ("call",))
