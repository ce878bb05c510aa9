"""Plan of the user: how a model is to be split, and how stale its parts may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from asyncdiff_nodes.engine.compression import COMPRESSIONS
from asyncdiff_nodes.engine.errors import PlanError

from .lookahead import NoiseLevels

MAX_STRIDE = 4
# what any run of a group may have otherwise than the group
PER_RUN = ("warmup", "cooldown", "time_shift", "microbatches", "compression")


@dataclass(frozen=True)
class Plan:
    """Wishes of the user: how a model is split, and how stale its parts may be (paper section 3).

    Attributes:
        segments: N, the number of parts that the network is cut into, 2 up to the number of blocks; 1 with several branches or
            bands.
        stride: S, denoising steps served by one parallel call, 1 to 4. Each branch needs ``N + S - 1`` devices.
        warmup: W >= 1, leading synchronous calls. The last one fills the caches. With S > 1 choose W = 1 + a multiple of S:
            otherwise the calls before the first full batch repeat the result of call W - 1.
        time_shift: every rank uses the previous timestep in asynchronous calls.
        forecast: 0 hands back the last value received (the published method); 1 works ahead: a segment computes for the call
            in which its values will be read, on the input that is expected there (see :mod:`.lookahead`). Where the schedule is
            not known, 1 extrapolates the last two values instead.
        cuts: block-name prefixes where the segments begin, in execution order on the circle of blocks. Blocks before the first
            cut are the last segment's; working ahead, they are the first one's, and others that read them compute them again.
            ``None`` searches for the best cuts.
        fresh_skips: how automatic cuts are chosen with ``forecast=1``. The last segment computes the first, full-size blocks anew
            on this call's own input, if that makes the slowest segment at most a third slower: the picture is nearer to the
            sequential one, by far so with samplers that add noise in every step. False for speed alone.
        cooldown: C, synchronous calls at the end of runs whose schedule is known. Later calls make up for much of what was wrong
            in a call, but nothing does for the one that leaps to a clean picture: an exact call is worth more there than
            anywhere else. Schedules that fade out without a leap have no cool-down (:attr:`~.lookahead.NoiseLevels.leap`).
        branches: parts of a call's batch, such as the two halves of CFG, that are computed side by side, each by N segments of
            its own. With one segment each nothing is stale: the result is the model's for each part by itself.
        microbatches: M, parts of the batch of a synchronous call that follow each other through the segments, so that these work
            at the same time there, too (GPipe, arXiv 1811.06965). The result is the model's for each part by itself: bit by bit
            that for the whole batch only with 1.
        compression: of the values that cross in asynchronous calls: none, half or int8; see :mod:`.compression`.
        bands: R, ranks of a branch that compute a call together, each of them a part of the picture's tokens or rows; see
            :mod:`.bands`. Every rank then has the whole network's weights. With one segment these are all calls: nothing is
            stale, and the result is the model's up to rounding, at any number of steps and with any sampler. With more segments
            they are the synchronous calls, of all ranks of the branch; a model that cannot be computed so does without.
    """

    segments: int = 2
    stride: int = 1
    warmup: int = 1
    time_shift: bool = False
    forecast: int = 1
    cuts: tuple[str, ...] | None = None
    fresh_skips: bool = True
    cooldown: int = 0
    branches: int = 1
    microbatches: int = 1
    compression: str = "none"
    bands: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (
            ("branches", 1, None),
            ("bands", 1, None),
            ("segments", 1 if self.branches != 1 or self.bands != 1 else 2, None),
            ("stride", 1, MAX_STRIDE),
            ("warmup", 1, None),
            ("forecast", 0, 1),
            ("cooldown", 0, None),
            ("microbatches", 1, None),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise PlanError(f"{name} must be a whole number, not {value!r}")
            if value < low or (high is not None and value > high):
                raise PlanError(f"{name}={value} is out of range: choose {low} " + ("or more" if high is None else f"to {high}"))
        if self.segments == 1 and self.stride > 1:
            raise PlanError(f"stride={self.stride} with segments=1: take 2 segments or more, or stride 1")
        if self.segments > 1 and 1 < self.bands < self.segments + self.stride - 1:
            raise PlanError(
                f"bands={self.bands} with segments={self.segments} and stride={self.stride}: all ranks of a branch share a "
                f"synchronous call: choose {self.segments + self.stride - 1} or more, or 1"
            )
        if self.compression not in COMPRESSIONS:
            raise PlanError(f"compression={self.compression!r}: choose one of {', '.join(COMPRESSIONS)}")
        for name in ("time_shift", "fresh_skips"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.cuts is not None:
            sequence = isinstance(self.cuts, Sequence) and not isinstance(self.cuts, str)
            if not sequence or not all(isinstance(cut, str) and cut for cut in self.cuts):
                raise PlanError(f"cuts must be a sequence of block names, not {self.cuts!r}")
            object.__setattr__(self, "cuts", tuple(self.cuts))
            if len(self.cuts) != self.segments:
                raise PlanError(
                    f"cuts={', '.join(self.cuts)!r}: {len(self.cuts)} cuts for {self.segments} segments: name one cut per "
                    "segment, the block that it begins with"
                )

    def at(self, levels: NoiseLevels | None) -> Plan:
        """Fit this plan to a run with these noise levels: ``cooldown`` is then the number of calls from the leap to the end."""
        if not self.cooldown or levels is None:
            return self
        return replace(self, cooldown=self.cooldown + levels.leap - 1 if levels.leap else 0)

    @property
    def weight_parts(self) -> int:
        """Number of parts that the network's weights are divided into: with bands, every rank has all of them."""
        return self.segments if self.bands == 1 else 1

    @property
    def branch_size(self) -> int:
        """Number of ranks of one branch: N + S - 1, or as many as there are bands."""
        return max(self.segments + self.stride - 1, self.bands)

    @property
    def world_size(self) -> int:
        """Number of ranks, and of devices, those of one branch after those of another."""
        return self.branches * self.branch_size

    def segment_of_rank(self, rank: int) -> int:
        """Ranks N and above of a branch replicate the last segment."""
        return min(rank % self.branch_size, self.segments - 1)
