"""The engine: any model, split over a process group. Needs torch and the standard library only.

>>> plan = Plan(segments=2, stride=1, warmup=1)
>>> with WorkerGroup(unet, plan, devices=["cuda:0", "cuda:1"]) as group:
...     group.begin(timesteps)
...     noise = group(sample, t, encoder_hidden_states=emb, return_dict=False)[0]
"""

from asyncdiff_nodes.engine.parent.group import WorkerGroup
from asyncdiff_nodes.engine.parent.rank_options import RankOptions
from asyncdiff_nodes.engine.parent.worker_processes import IdleWorkers
from asyncdiff_nodes.engine.planning.balance import BlockTimes, better, pause, slowest
from asyncdiff_nodes.engine.planning.discovery import family_of
from asyncdiff_nodes.engine.planning.family import Family, find_family
from asyncdiff_nodes.engine.planning.graph import Block, BlockGraph
from asyncdiff_nodes.engine.planning.lookahead import NoiseLevels
from asyncdiff_nodes.engine.planning.placement import Placement, place
from asyncdiff_nodes.engine.planning.plan import Plan
from asyncdiff_nodes.engine.planning.profile import block_seconds
from asyncdiff_nodes.engine.planning.schedule import Call, Kind, call_at
from asyncdiff_nodes.engine.planning.trace import trace

from .errors import (
    AsyncDiffError,
    DeadlineError,
    DeviceError,
    GroupClosedError,
    InputChangedError,
    OtherPathError,
    PlanError,
    RepeatedBlockError,
    ScheduleError,
    UnsupportedModelError,
    WeightsUnloadedError,
    WorkerError,
)
from .simulator import Simulator
from .telemetry import CallRecord, RankReport, RunStats
from .tensors import meta_copy

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
    "OtherPathError",
    "Placement",
    "Plan",
    "PlanError",
    "RankOptions",
    "RankReport",
    "RepeatedBlockError",
    "RunStats",
    "ScheduleError",
    "Simulator",
    "UnsupportedModelError",
    "WeightsUnloadedError",
    "WorkerError",
    "WorkerGroup",
    "better",
    "block_seconds",
    "call_at",
    "family_of",
    "find_family",
    "meta_copy",
    "pause",
    "place",
    "slowest",
    "trace",
]
