"""Values that reach another rank through host memory, sent by a thread that nobody looks at."""

import pytest
import sim  # noqa: F401  (registers the devices)
import torch

from asyncdiff_nodes.engine.rank.staging import Stager
from asyncdiff_nodes.engine.tensors import TensorMeta

VALUE = torch.arange(6.0, device="sim:0").view(2, 3)
META = TensorMeta.of(VALUE)


class Broken:
    def send(self, *_):
        raise RuntimeError("the other end is gone")


class Kept(list):
    """A link that keeps what it is to send."""

    def send(self, tensors, *_):
        self.append(tensors[0].clone())
        return self

    def wait(self):
        pass


def test_values_are_sent_in_their_order_and_as_they_were():
    stager, link = Stager(VALUE.device), Kept()
    value = VALUE.clone()
    for _ in range(3):
        stager.send([link], value, META)
        value.add_(10)
    stager.flush()
    assert [sent.tolist() for sent in link] == [(VALUE.cpu() + 10 * k).flatten().tolist() for k in range(3)]
    stager.send([link], VALUE, META)
    stager.flush()
    assert len(link) == 4, "also after it was flushed"


@pytest.mark.parametrize("then", ["send", "check", "flush"])
def test_what_fails_in_the_thread_is_raised_by_what_is_called_next(then):
    stager = Stager(VALUE.device)
    stager.send([Broken()], VALUE, META)
    stager._thread.join()
    with pytest.raises(RuntimeError, match="the other end is gone"):
        stager.send([Kept()], VALUE, META) if then == "send" else getattr(stager, then)()
