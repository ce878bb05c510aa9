"""Devices that are slower than others: ranks that sleep until their time is over, so on a busy machine, too."""

import multiprocessing
import time


def throttled(forward, seconds):
    """``forward`` that takes ``seconds``, on rank 1 twice that."""

    def slow(*args, **kwargs):
        end = time.monotonic() + seconds * (1 + (multiprocessing.current_process().name == "asyncdiff-rank-1"))
        output = forward(*args, **kwargs)
        time.sleep(max(0.0, end - time.monotonic()))
        return output

    return slow
