"""Messages over a pipe."""

import os
import threading
import time

import pytest
import torch
import torch.multiprocessing as mp

from asyncdiff_nodes.engine import wire
from asyncdiff_nodes.engine.parent.outbox import Outbox

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
    message = wire.Outgoing(("weight", "w"), [torch.zeros(100)])
    message._left.pop()
    message.write(here)
    here.close()
    reader.join(timeout=10)
    assert not reader.is_alive() and len(errors) == 1
    with pytest.raises(OSError, match="closed"):
        wire.send(here, ("call",))


def test_a_message_is_taken_as_far_as_it_has_come(ends):
    """Nothing of it is lost, nor of the next one, and nobody waits."""
    here, there = ends
    messages = wire.incoming(here, wait=False)
    assert next(messages) is None
    for number in range(2):
        message = wire.Outgoing(("result", number), [torch.arange(10.0), torch.ones(3)])
        pieces = message._left
        halves = [half for piece in pieces for half in (piece[: len(piece) // 2], piece[len(piece) // 2 :])]
        for message._left in [[part] for part in (halves if wire._POSIX else pieces)]:
            assert next(messages) is None
            message.write(there)
        header, found = next(messages)
        assert header == ("result", number) and torch.equal(found[0], torch.arange(10.0)) and torch.equal(found[1], torch.ones(3))
    there.close()
    with pytest.raises((EOFError, OSError)):
        next(messages)


def test_many_tensors_in_one_message(ends):
    here, there = ends
    sender = threading.Thread(target=wire.send, args=(here, "many", [torch.tensor([float(i)]) for i in range(1500)]))
    sender.start()
    header, found = wire.receive(there)
    sender.join()
    assert header == "many" and [float(tensor) for tensor in found] == list(range(1500))


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a thread writes all")
def test_what_does_not_fit_is_left(ends):
    here, there = ends
    small, large = wire.Outgoing("small", TENSORS[1:]), wire.Outgoing("large", TENSORS)
    if not wire._POSIX:
        assert not small.write_what_fits(here)
        return
    assert small.write_what_fits(here) and not large.write_what_fits(here), "the pipe is full"
    writer = threading.Thread(target=large.write, args=(here,))
    writer.start()
    for name, tensors in (("small", TENSORS[1:]), ("large", TENSORS)):
        header, found = wire.receive(there)
        assert header == name and all(map(torch.equal, found, tensors))
    writer.join()


def test_an_outbox_keeps_the_order_and_never_waits(ends):
    here, there = ends
    outbox = Outbox(here)
    posted = 0
    while outbox.post(posted, TENSORS, timeout=0.0):
        posted += 1
    assert 0 < posted < 20, "nobody reads"
    began = time.monotonic()
    assert not outbox.post("late", (), timeout=0.05) and time.monotonic() - began < 5
    assert [wire.receive(there)[0] for _ in range(posted)] == list(range(posted))
    assert outbox.post("more", (), timeout=5) and wire.receive(there)[0] == "more"
    outbox.close()
    assert not outbox._thread.is_alive()


@pytest.mark.parametrize("full", [True, False])
def test_an_outbox_outlives_its_rank(ends, full):
    here, there = ends
    outbox = Outbox(here)
    while full and outbox.post("weight", TENSORS, timeout=0.0):
        pass
    there.close()
    deadline = time.monotonic() + 10
    while outbox.post("call", (), timeout=0.0):
        assert time.monotonic() < deadline
    outbox.close()
    assert not outbox._thread.is_alive()
    assert not outbox.post("call", (), timeout=0.0)
