"""A model's parts as they lie in the ranks: blocks, weights, and the links between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from asyncdiff_nodes.engine.errors import PlanError, WeightsUnloadedError
from asyncdiff_nodes.engine.planning.placement import Placement
from asyncdiff_nodes.engine.rank.boot import Boot
from asyncdiff_nodes.engine.tensors import dense_on_cpu

from .rank_set import Message, RankSet
from .rank_shares import ranks_with, shares_of

Weights = Iterable[tuple[str, torch.Tensor]]  # names and values; each is read once, when it is sent


class PlacedModel:
    """Puts a model's blocks, weights and links into ranks, moves them there, and takes weights out again.

    What fails half-way closes the ranks: none may compute with a part of it.

    Attributes:
        placement: where the blocks are.
        unloaded: bytes, by name, of the weights that a rank was told to free.
        bandwidth: bytes per second of the slowest link between two machines, measured when it was opened; infinite on one.
        refusals: why links are not direct that could have been, by sender and receiver.
    """

    def __init__(self, ranks: RankSet, placement: Placement, names: Sequence[str], accept: Callable[[Message], None]) -> None:
        """``names`` are those of all weights; ``accept`` takes what ranks say of other things meanwhile."""
        self._ranks, self._names, self._accept = ranks, names, accept
        self.placement = placement
        self.unloaded: dict[int, dict[str, int]] = {}
        self.bandwidth = math.inf
        self.refusals: dict[tuple[int, int], str] = {}

    def boot(self, boots: Iterable[Boot], weights: Weights, greeting: Any, deadline: float) -> None:
        """Start every rank's model, send it ``greeting`` and its weights, and open the links."""
        for boot in boots:
            self._ranks.send(boot.share.rank, boot, deadline=deadline)
        self.send_all(greeting, deadline)
        self._send_weights(weights, deadline)
        self._connect(deadline)

    def update(self, weights: Weights, deadline: float) -> None:
        """Replace weights wherever they are."""
        with self._whole():
            self._send_weights(weights, deadline)

    def unload(self, ranks: Collection[int], least: int | None, deadline: float) -> None:
        """Have some ranks free their weights, or ``least`` bytes of them each; everything else stays as it is."""
        self.send(((rank, ("unload", least), ()) for rank in ranks), deadline)
        waiting = set(ranks)
        while waiting:
            message = self._ranks.next_message(deadline, f"ranks {sorted(waiting)} to free their weights")
            rank, header, _ = message
            if header[0] == "unloaded":
                waiting.remove(rank)
                self.unloaded.setdefault(rank, {}).update(header[1])
            else:
                self._accept(message)

    def reload(self, weights: Callable[[frozenset[str]], Weights], deadline: float) -> None:
        """Send the ranks the weights that they were told to free."""
        lacking: dict[str, set[int]] = {}
        for rank, names in self.unloaded.items():
            for name in names:
                lacking.setdefault(name, set()).add(rank)
        with self._whole():
            self._send_weights(weights(frozenset(lacking)), deadline, lacking)
        self.unloaded.clear()

    def check_loaded(self) -> None:
        """Raise WeightsUnloadedError where a rank lacks its weights."""
        if self.unloaded:
            raise WeightsUnloadedError(f"the weights of ranks {sorted(self.unloaded)} were unloaded: call reload() first")

    def move(self, placement: Placement, weights: Callable[[frozenset[str]], Weights], deadline: float) -> None:
        """Place the blocks anew, and send what a rank then lacks."""
        ours, theirs = self.placement.graph, placement.graph
        if placement.plan != self.placement.plan or (ours.names, ours.edges) != (theirs.names, theirs.edges):
            raise PlanError("move: the placement is for another model or plan than this group's")
        self.check_loaded()
        before = self._ranks_with_weights()
        with self._whole():
            self.placement = placement
            self.send(((own.rank, ("move", own), ()) for own in shares_of(placement)), deadline)
            lacking = {name: new for name, ranks in self._ranks_with_weights().items() if (new := ranks - before[name])}
            self._send_weights(weights(frozenset(lacking)), deadline, lacking)
            self._connect(deadline)

    def send_all(self, header: Any, deadline: float) -> None:
        """Send every rank the same header."""
        self.send(((rank, header, ()) for rank in range(self.placement.plan.world_size)), deadline)

    def send(self, messages: Iterable[tuple[int, Any, Sequence[torch.Tensor]]], deadline: float) -> None:
        """Send (rank, header, tensors) each. All or none: a call that only some ranks know of could never end."""
        with self._whole():
            for rank, header, tensors in messages:
                self._ranks.send(rank, header, tensors, deadline=deadline)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._ranks.close(grace=0)  # one of them does not listen, or a polite word would wait behind the weights
            raise

    def _ranks_with_weights(self) -> dict[str, set[int]]:
        """Find the ranks that compute with each weight."""
        return {name: ranks_with(self.placement, name) for name in self._names}

    def _send_weights(self, weights: Weights, deadline: float, lacking: Mapping[str, set[int]] | None = None) -> None:
        """Send one at a time, so that only a few are ever in memory twice; if ``lacking`` is given, to its ranks alone."""
        for name, tensor in weights:
            self._ranks.look(deadline, "the ranks to take all weights")
            ranks = ranks_with(self.placement, name) if lacking is None else lacking.get(name, set())
            tensor = dense_on_cpu(tensor)
            for rank in sorted(ranks):
                self._ranks.send(rank, ("weight", name), (tensor,), deadline=deadline)

    def _connect(self, deadline: float) -> None:
        world, shares = self.placement.plan.world_size, list(shares_of(self.placement))
        pairs = {(own.first + sender, own.rank) for own in shares for sender in own.sources.values()}
        pairs |= {(partner, own.rank) for own in shares for partner in own.partners if partner != own.rank}
        self.send_all(("connect", sorted(pairs)), deadline)
        ready: set[int] = set()
        while len(ready) < world:
            message = self._ranks.next_message(deadline, f"ranks {sorted(set(range(world)) - ready)} to start")
            rank, header, _ = message
            if header[0] == "ready":
                ready.add(rank)
                self.bandwidth = min(self.bandwidth, header[1])
                self.refusals.update(header[2])
            elif header[0] == "meet":
                self.send(((other, header, ()) for other in range(world) if other != rank), deadline)
            else:
                self._accept(message)
