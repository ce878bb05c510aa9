"""Find the stream of a call of the network: that of the earlier call for the same thing, on whose values it may build.

Usually a prompt is one stream. But nodes may call the network several times for it at one noise level: for tiles of the latent,
for shifted or cropped latents, or in several passes, in an order that may change from step to step. The purpose of a call follows
from where its latent lies in the sampler's, bit for bit, and from its other arguments; failing that, from the earlier latent that
it resembles.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from asyncdiff_nodes.engine.trees import flatten
from asyncdiff_nodes.host.patches.packs import around, of_host

_ALIKE = 0.5  # least correlation of a latent with the same one a step before; for other places it is about 0 under much noise
_SKETCH = 4096  # elements that are compared
_PLACES = 16  # how many places that begin like a tile are compared with it
_LATE = 3  # steps in which a known prompt may have calls for something new
_PER_CALL = frozenset({"transformer_options", "control"})  # arguments that change from step to step, beside further timesteps


class Streams:
    """The streams of one sampling.

    Args:
        sampling: the host's model_sampling.
        shape: the shape of the sampler's latent.
        guider, sampler, model_options: the host's objects. Code of others among them may change the latent in any way.
    """

    def __init__(self, sampling: Any, shape: Sequence[int], guider: Any, sampler: Any, model_options: dict[str, Any]) -> None:
        self._sampling, self._shape = sampling, tuple(shape)
        self._own_sampler = of_host(getattr(sampler, "sampler_function", sampler), "comfy")
        self._own_calls = all(map(of_host, (type(guider), *around(model_options))))
        self._level: float | None = None
        self._levels = self._evaluations = 0
        self._x: torch.Tensor | None = None
        self._sigma: torch.Tensor | None = None
        self._frame: Hashable | None = 0  # which of several latents the sampler evaluates; None where that is unknown
        self._frames = _Resembling(first=1)
        self._unplaced: dict[Hashable, _Resembling] = {}
        self._timestep: float | None = None  # the timestep of the call before
        self._expected = False  # the sampler has evaluated the model since
        self._rests: dict[Hashable, list[list[Any]]] = {}
        self._counts: Counter[Hashable] = Counter()  # calls in this evaluation
        self._first: dict[Hashable, int] = {}  # when a prompt was first called
        self._names: dict[Hashable, dict[Hashable, list[int]]] = {}  # prompt -> stream -> how often it began, and its last level
        self._late: set[int] = set()

    def evaluate(self, x: torch.Tensor, sigma: torch.Tensor) -> None:
        """Note that the sampler evaluates the model at its latent ``x`` [B, C, ...] with noise ``sigma`` [B]."""
        level = float(sigma.flatten()[0])
        first = level != self._level
        self._level, self._x, self._sigma, self._expected = level, x, sigma, True
        self._begin(first)
        if self._own_sampler:
            return
        if first and x.shape == self._shape and len(self._frames) < 2:
            self._frame = self._frames.take(x)  # it may have new noise in every step
        else:
            self._frame = self._frames.match(x, self._levels, alone=self._levels > 1)

    def _begin(self, level: bool) -> None:
        """Begin an evaluation of the model; ``level``: at a new level of noise."""
        self._evaluations, self._levels = self._evaluations + 1, self._levels + level
        self._counts.clear()

    def of(self, uuids: Hashable, prompt: Hashable, x: torch.Tensor | None, timestep: float, rest: list[Any]) -> Hashable | None:
        """The name of the stream of a call for ``prompt`` at ``x``; None if it is unknown.

        Args:
            x: None where it is several latents: nobody cuts these into tiles, and the network may scale one of them.
            uuids: the host's names of the prompts in it.
            prompt: these prompts, and everything else that is known to make it another stream.
            rest: see :func:`rest_of`.
        """
        if timestep != self._timestep and not self._expected:
            self._begin(level=True)  # a guider calls the network without the sampler
        self._timestep, self._expected = timestep, False
        if self._frame is None:
            return None
        what = prompt, self._frame, self._rest(prompt, rest)
        place = "" if x is None else self._place(x)
        if place is None and x is not None and not self._own_calls:
            place = self._unplaced.setdefault(what, _Resembling(self._evaluations)).match(x, self._evaluations)
            if place is None:
                return None
        name = (*what, place, self._counts[what, place])
        self._counts[what, place] += 1
        began = self._began(uuids, name)
        return None if len(self._late) > _LATE else (*name, began)

    def _began(self, uuids: Hashable, name: Hashable) -> int:
        """How often the stream ``name`` has begun. One of several begins again after a step without it: its values are old."""
        names = self._names.setdefault(uuids, {})
        state = names.setdefault(name, [0, -1])
        if state[1] < 0 or (len(names) > 1 and state[1] < self._levels - 1):
            state[0] += 1
            if self._first.setdefault(uuids, self._evaluations) < self._evaluations:
                self._late.add(self._evaluations)
        state[1] = self._levels
        return state[0]

    def _rest(self, prompt: Hashable, leaves: list[Any]) -> int:
        """A number for these arguments: equal for equal values."""
        known = self._rests.setdefault(prompt, [])
        known_as = next((number for number, other in enumerate(known) if _equal(leaves, other)), None)
        if known_as is None:
            known.append(leaves)
            known_as = len(known) - 1
        return known_as

    def _place(self, x: torch.Tensor) -> Hashable | None:
        """Positions of the items of ``x`` in the sampler's latent; "" for all of it, None if they are not in it."""
        if self._x is None:
            return None
        whole = self._sampling.calculate_input(self._sigma, self._x).to(x.dtype)
        if x.dim() != whole.dim() or x.shape[1] < whole.shape[1]:
            return None
        latent = x[:, : whole.shape[1]]  # the other channels are an inpainting model's
        if latent.shape[2:] == whole.shape[2:] and all(torch.equal(part, whole) for part in latent.split(len(whole))):
            return ""
        places = [_find(item, whole) for item in latent]
        return None if None in places else tuple(places)


class _Resembling:
    """Distinguish latents by what they look like: each changes little from step to step."""

    def __init__(self, first: int) -> None:
        """Begin without latents; in the round ``first`` every latent is new."""
        self._sketches: list[tuple[Any, torch.Tensor]] = []
        self._taken: dict[int, int] = {}  # number -> round in which it was matched last
        self._first = first

    def __len__(self) -> int:
        return len(self._sketches)

    def take(self, x: torch.Tensor) -> int:
        """Note what the only latent looks like now, and return its number."""
        self._sketches[:] = [(x.shape, _sketch(x))]
        return 0

    def match(self, x: torch.Tensor, round: int, alone: bool = False) -> int | None:
        """The number of the latent that ``x`` continues; a new number in the first round or for a new shape; None if none fits.

        Args:
            round: each latent is matched once in a round, unless ``alone``.
        """
        sketch = _sketch(x)
        likeness = {
            number: float(before @ sketch)
            for number, (shape, before) in enumerate(self._sketches)
            if shape == x.shape and (alone or self._taken.get(number) != round)
        }
        if round == self._first or all(shape != x.shape for shape, _ in self._sketches):
            self._sketches.append((x.shape, sketch))
            best = len(self._sketches) - 1
        else:
            best = max(likeness, key=likeness.get, default=None)
            if best is None or not likeness[best] >= _ALIKE:
                return None
            self._sketches[best] = x.shape, sketch
        self._taken[best] = round
        return best


def rest_of(given: dict[str, Any]) -> list[Any]:
    """The leaves of those arguments that are the same in all calls for a prompt."""
    names = [name for name in itertools.islice(given, 2, None) if name not in _PER_CALL and "timestep" not in name]
    return flatten([(name, given[name]) for name in names])[0]


def outline_of(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """An outline of the arguments that cannot change within a stream."""
    return tuple((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves)


def _equal(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(_same, these, those))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return type(a) is type(b) and a == b


def _sketch(x: torch.Tensor) -> torch.Tensor:
    """Some elements of ``x``, minus their mean and scaled to length 1, on the CPU."""
    flat = x.detach().reshape(-1)
    some = flat[:: len(flat) // _SKETCH | 1].float().cpu()
    some = some - some.mean()
    return some / some.norm().clamp_min(1e-12)


def _find(item: torch.Tensor, whole: torch.Tensor) -> tuple[int, ...] | None:
    """Batch item and position of ``item`` [C, ...] in ``whole`` [B, C, ...], which wraps around at its edges."""
    corner = item[(slice(1), *[0] * (item.dim() - 1))]
    starts = (whole[:, 0] == corner).nonzero()
    for batch, *at in starts[:_PLACES].tolist():
        window = whole[batch]
        for axis, (begin, size) in enumerate(zip(at, item.shape[1:], strict=True), start=1):
            length = window.shape[axis]
            window = window.index_select(axis, torch.arange(begin, begin + size, device=window.device) % length)
        if torch.equal(window, item):
            return batch, *at
    return None
