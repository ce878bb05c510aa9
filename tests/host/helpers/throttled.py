"""A rank that is half as fast. Imports nothing of the host: a rank must first be told its flags."""

import multiprocessing
import time

SECONDS = 0.03


class Throttled:
    """What a rank does first: as ``settings`` say, and: each larger block takes ``SECONDS``, on rank 1 twice that."""

    def __init__(self, settings):
        self.settings = settings

    def __call__(self):
        self.settings()
        from comfy.ldm.modules.attention import SpatialTransformer
        from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

        seconds = SECONDS * (1 + (multiprocessing.current_process().name == "asyncdiff-rank-1"))
        for cls in (ResBlock, SpatialTransformer):
            cls.forward = until(cls.forward, seconds)


def until(forward, seconds):
    def slow(*args, **kwargs):
        end = time.monotonic() + seconds
        output = forward(*args, **kwargs)
        time.sleep(max(0.0, end - time.monotonic()))
        return output

    return slow
