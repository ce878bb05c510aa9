"""What GPUs with NCCL between them may do at worst, on CPUs: every rank is a card that is synchronised before each module.

A link is a stream on which one transfer follows the other and waits for its counterpart, as NCCL's kernels do.
"""

import queue
import threading

from torch.nn.modules.module import register_module_forward_pre_hook

LINKS = []


class Link:
    def __init__(self, gloo):
        self._gloo, self._jobs, self.posted = gloo, queue.SimpleQueue(), []
        threading.Thread(target=self._run, daemon=True).start()
        LINKS.append(self)

    def _run(self):
        while True:
            verb, arguments, done = self._jobs.get()
            getattr(self._gloo, verb)(*arguments).wait()
            done.set()

    def _post(self, verb, arguments):
        done = threading.Event()
        self.posted.append(done)
        self._jobs.put((verb, arguments, done))
        return done

    def send(self, *arguments):
        return self._post("send", arguments)

    def recv(self, *arguments):
        return self._post("recv", arguments)


def synchronize(*_):
    for link in LINKS:
        while link.posted:
            link.posted.pop().wait()


def prepare():
    """In a rank, before its links are there."""
    from asyncdiff_nodes.engine.rank import transport

    if not LINKS:  # else the process has been a rank before
        open_link = transport._open_link
        transport._open_link = lambda store, side, _, timeout: Link(open_link(store, side, transport.LOOPBACK, timeout))
        transport.uses_nccl = lambda a, b: a is not b
        register_module_forward_pre_hook(synchronize)
    LINKS.clear()
