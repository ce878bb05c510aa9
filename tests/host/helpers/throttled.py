"""A rank that is half as fast. Imports nothing of the host: a rank must first be told its flags."""

from slowed import throttled

SECONDS = 0.03


class Throttled:
    """What a rank does first: as ``settings`` say, and: each larger block takes ``SECONDS``, on rank 1 twice that."""

    def __init__(self, settings):
        self.settings = settings

    def __call__(self):
        self.settings()
        from comfy.ldm.modules.attention import SpatialTransformer
        from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

        for cls in (ResBlock, SpatialTransformer):
            cls.forward = throttled(cls.forward, SECONDS)
