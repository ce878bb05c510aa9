"""How two ends of a link find each other without a file or a port: by messages that somebody hands on."""

import os
import queue
import threading
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from asyncdiff_nodes.engine import wire
from asyncdiff_nodes.engine.rank.links import RankLocation
from asyncdiff_nodes.engine.rank.transport import Transport
from asyncdiff_nodes.engine.rendezvous import PipeStore, open_store


def store():
    """One, what it has sent, and what it is to receive."""
    sent, given = [], queue.SimpleQueue()
    return PipeStore(sent.append, lambda: (given.get(timeout=10), [])), sent, given


def test_what_is_set_is_there_and_sent():
    own, sent, _ = store()
    dist.PrefixStore("0->1", own).set("key", b"value")
    assert sent == [("meet", "0->1/key", b"value")]
    assert own.get("0->1/key") == b"value"


def test_a_key_is_waited_for_and_what_comes_before_it_is_kept():
    own, sent, given = store()
    for key in ("later", "wanted"):
        given.put(("meet", f"0->1/{key}", key.encode()))
    link = dist.PrefixStore("0->1", own)
    assert not link.check(["later"]) and not own.check(["0->1/later"])
    link.wait(["wanted"], timedelta(seconds=1))
    assert link.check(["wanted", "later"]) and not link.check(["wanted", "another"])
    assert (link.get("wanted"), link.get("later")) == (b"wanted", b"later")
    assert sent == []


def test_another_message_ends_the_wait():
    own, _, given = store()
    given.put(("close",))
    with pytest.raises(EOFError):
        dist.PrefixStore("0->1", own).get("key")


def test_what_threads_of_nccl_set_stays_here():
    own, sent, _ = store()
    thread = threading.Thread(target=own.set, args=("exception_dump", b"0"))
    thread.start()
    thread.join()
    assert sent == []
    assert own.check(["exception_dump"])


def test_a_cluster_has_one_store_for_all():
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends = [open_store(("127.0.0.1", host.port), 10.0, None, None) for _ in range(2)]
    ends[0].set("key", b"value")
    assert ends[1].get("key") == b"value"


def one_end(rank, conn):
    own = PipeStore(partial(wire.send, conn), partial(wire.receive, conn))
    transport = Transport(rank, [RankLocation("cpu", "cpu"), RankLocation("cpu", "cpu")], own, timeout=20)
    transport.open([(0, 1)])
    transport.open([(0, 1), (1, 0)])  # later, by the same store
    os._exit(0)  # not by return: links with a dead peer would hang in their destructors


def test_links_are_opened_by_what_the_other_end_is_told():
    context = mp.get_context("spawn")
    ranks = [context.Process(target=one_end, args=end, daemon=True) for end in enumerate(context.Pipe())]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
