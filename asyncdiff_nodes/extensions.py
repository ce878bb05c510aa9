"""Extensions of the engine by packages that stand on it: tables of model families, and clusters of devices.

The engine asks here and imports none of them. ``asyncdiff_nodes/__init__.py`` registers those of this pack, by functions that
import them when they are first asked for; a program may register more. This file imports nothing: a rank's process has it before
PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from asyncdiff_nodes.engine.parent.rank_set import RankSet
    from asyncdiff_nodes.engine.planning.family import Family


class Cluster(Protocol):
    """Devices of other machines."""

    def resolve(self, names: Sequence[str]) -> tuple[str, ...]:
        """Check names, at least one of which is of this cluster, and return one per rank.

        Raises:
            DeviceError: no such devices, or a cluster that cannot be reached.
        """

    def start(self, devices: Sequence[str], poll: Callable[[], None] | None) -> RankSet:
        """Start one rank for each of ``devices``, as :meth:`resolve` named them; see :class:`~.rank_set.RankSet` for ``poll``."""


_tables: list[Callable[[], Mapping[str, Family]]] = []
_clusters: dict[str, Callable[[], Cluster]] = {}


def register_families(table: Callable[[], Mapping[str, Family]]) -> None:
    """Have :func:`families` look into one more table.

    Args:
        table: returns family by ``package.Class``; called each time that a family is looked for.
    """
    _tables.append(table)


def register_cluster(prefix: str, cluster: Callable[[], Cluster]) -> None:
    """Have device names that begin with ``prefix``, such as ``ray:``, stand for devices of a cluster.

    Args:
        cluster: returns it; called when one of its devices is named.
    """
    _clusters[prefix] = cluster


def families() -> dict[str, Family]:
    """Merge all tables: ``package.Class`` -> family; of two that name the same class the later one counts."""
    return {name: family for table in _tables for name, family in table().items()}


def cluster_of(name: str) -> Cluster | None:
    """Return the cluster whose device this is; None for a device of this machine."""
    return next((cluster() for prefix, cluster in _clusters.items() if name.startswith(prefix)), None)
