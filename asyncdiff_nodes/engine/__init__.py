"""The engine: any model with a block list, split over a process group. Needs torch and the standard library only.

>>> plan = Plan(segments=2, stride=1, warmup=1)
>>> with WorkerGroup(unet, plan, devices=["cuda:0", "cuda:1"]) as group:
...     group.begin(timesteps)
...     noise = group(sample, t, encoder_hidden_states=emb, return_dict=False)[0]
"""

from .balance import BlockTimes, better, pause, slowest
from .errors import (
    AsyncDiffError,
    DeadlineError,
    DeviceError,
    GroupClosedError,
    InputChangedError,
    PlanError,
    ScheduleError,
    UnsupportedModelError,
    WorkerError,
)
from .family import Family, find_family
from .graph import Block, BlockGraph, meta_copy, trace
from .group import WorkerGroup
from .lookahead import NoiseLevels
from .plan import Placement, Plan, place
from .profile import block_seconds
from .schedule import Call, Kind, call_at
from .simulator import Simulator
from .spawning import IdleWorkers
from .telemetry import CallRecord, RankReport, RunStats

__all__ = [
    "AsyncDiffError",
    "Block",
    "BlockGraph",
    "BlockTimes",
    "Call",
    "CallRecord",
    "DeadlineError",
    "DeviceError",
    "Family",
    "GroupClosedError",
    "IdleWorkers",
    "InputChangedError",
    "Kind",
    "NoiseLevels",
    "Placement",
    "Plan",
    "PlanError",
    "RankReport",
    "RunStats",
    "ScheduleError",
    "Simulator",
    "UnsupportedModelError",
    "WorkerError",
    "WorkerGroup",
    "better",
    "block_seconds",
    "call_at",
    "find_family",
    "meta_copy",
    "pause",
    "place",
    "slowest",
    "trace",
]
