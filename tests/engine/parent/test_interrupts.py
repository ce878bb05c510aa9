"""The caller's interrupt is looked at often enough, whatever the ranks say and however much is sent to them."""

import itertools
import threading
import time

import pytest
import torch
from test_faults import Interrupt

import toys
from asyncdiff_nodes.engine import DeadlineError, Plan, RankOptions, WorkerGroup
from asyncdiff_nodes.engine.parent.rank_set import POLL, RankSet
from asyncdiff_nodes.engine.tensors import tensors_of
from reuse import IDLE, running
from toys import TOY


class Talkative(RankSet):
    """Always has one more message, after ``seconds``."""

    def __init__(self, poll=None, seconds=0.0):
        super().__init__(poll)
        self.seconds = seconds

    pids = ()

    def meet(self, deadline):
        return (), None

    def close(self, grace=3.0):
        self._closing.set()

    def _post(self, rank, header, tensors):
        return True

    def _next(self):
        time.sleep(self.seconds)
        return 0, ("record",), []

    def _explain(self, rank, header):
        raise NotImplementedError


@pytest.mark.timing
@pytest.mark.parametrize("seconds", [0.0, 0.7 * POLL])
def test_the_interrupt_is_looked_at_while_messages_keep_coming(seconds):
    looks = []
    ranks, end = Talkative(lambda: looks.append(time.monotonic()), seconds), time.monotonic() + 1.0
    while time.monotonic() < end:
        assert ranks.next_message(end + 60, "the end")[1] == ("record",)
    assert 1.0 / (2 * POLL) - 1 <= len(looks) <= 1.0 / POLL + 1
    assert max(after - before for before, after in itertools.pairwise(looks)) < 0.5


@pytest.mark.timing
def test_the_deadline_is_looked_at_while_messages_keep_coming():
    ranks, begin = Talkative(), time.monotonic()
    with pytest.raises(DeadlineError, match="waited too long for the end"):
        while True:
            ranks.next_message(begin + 0.2, "the end")
    assert 0.2 <= time.monotonic() - begin < 1.0


def test_a_message_that_has_come_is_not_lost_by_an_interrupt():
    interrupt, numbers = Interrupt(), itertools.count()
    ranks = Talkative(interrupt.poll)
    ranks._next = lambda: (0, ("record", next(numbers)), [])
    taken = [ranks.next_message(time.monotonic() + 60, "the end")[1][1]]
    interrupt.set()
    with pytest.raises(KeyboardInterrupt):
        while True:
            taken.append(ranks.next_message(time.monotonic() + 60, "the end")[1][1])
    interrupt.clear()
    assert ranks.next_message(time.monotonic() + 60, "the end")[1][1] == len(taken)


class Weights:
    """Those of a network without end, one after the other, and an interrupt while they are sent."""

    def __init__(self, net, seconds, after=0.5):
        self.interrupt, self.interrupted, self.looks = Interrupt(), 0.0, []
        self._net, self._seconds, self._after = net, seconds, after

    def poll(self):
        self.looks.append(time.monotonic())
        self.interrupt.poll()

    def __iter__(self):
        timer = threading.Timer(self._after, self._strike)
        timer.start()
        for name, tensor in itertools.cycle(list(tensors_of(self._net))):
            assert time.monotonic() < self.interrupted + 10 or not self.interrupted, "nobody looks"
            time.sleep(self._seconds)
            yield name, tensor

    def _strike(self):
        self.interrupted = time.monotonic()
        self.interrupt.set()


#: Small ones, which a pipe takes as they come, and large ones, for which the ranks have to be waited for.
CHANNELS = pytest.mark.parametrize("channels", [4, 1024], ids=["small", "large"])


@pytest.mark.timing
@CHANNELS
@pytest.mark.parametrize("seconds", [0.0, pytest.param(0.02, marks=pytest.mark.slow)], ids=["at once", "one at a time"])
def test_new_weights_are_interrupted_within_half_a_second(channels, seconds):
    net = toys.chain(toys.ToyBlock, toys.ToyBlock, channels=channels)
    weights = Weights(net, seconds)
    with running(net, Plan(warmup=1), family=TOY, poll=weights.poll) as group:
        weights.looks.clear()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            group.load_weights(weights)
        assert time.monotonic() - weights.interrupted < 0.5
        assert max(after - before for before, after in itertools.pairwise([begin, *weights.looks])) < 0.5
        assert group.closed


@pytest.mark.timing
@CHANNELS
def test_a_start_is_interrupted_within_half_a_second_while_weights_are_sent(channels, folder):
    net = toys.chain(toys.ToyBlock, toys.ToyBlock, channels=channels)
    with running(net, Plan(warmup=1), family=TOY):
        pass  # so that there are processes that take weights at once
    weights = Weights(net, 0.0)
    with pytest.raises(KeyboardInterrupt):
        ranks = RankOptions(threads_per_rank=1, idle=IDLE, poll=weights.poll)
        WorkerGroup(net, Plan(warmup=1), family=TOY, weights=weights, ranks=ranks)
    assert time.monotonic() - weights.interrupted < 0.5


def test_the_messages_of_one_call_are_all_sent_before_the_interrupt_is_looked_at(folder):
    interrupt = Interrupt()
    net = toys.slow_net(0.1)
    x, kwargs = toys.inputs(0)
    with running(net, Plan(warmup=1, cuts=("blocks.0", "blocks.1")), family=TOY, poll=interrupt.poll) as group:
        group.begin()
        time.sleep(2 * POLL)
        interrupt.set()
        with pytest.raises(KeyboardInterrupt):
            group(x, 10, **kwargs)
        interrupt.clear()
        assert not group.closed
        group.begin()
        with torch.no_grad():
            assert torch.equal(group(x, 10, **kwargs), net(x, 10, **kwargs))
