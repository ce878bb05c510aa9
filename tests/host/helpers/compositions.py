"""Samplings put together at random of what people do with a MODEL: samplers, wrappers, patches, second models, changed weights.

Each is sampled by the stock sampler and by ours, of models that live on from one to the next, as they do in a host.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_freelunch, nodes_pag, nodes_perpneg
from hypothesis import strategies

from asyncdiff_nodes.host import OURS
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from helpers import small
from helpers.sampling import EXACT

Model = Any
KINDS = ("sd15", "flux")
SIZE = 16


@dataclass(frozen=True)
class Composition:
    """One sampling; each field names one of the functions or values below."""

    kind: str
    sampler: str
    scheduler: str
    steps: int
    cfg: float
    denoise: float
    batch: int
    mask: bool
    prompt: str
    lora: str
    patches: str
    wrapper: str
    code: str
    weights: str
    guider: str
    seed: int


def strategy() -> strategies.SearchStrategy[Composition]:
    """Compositions, the plain choice first in each field, so that what is found shrinks to what matters."""
    one_of = strategies.sampled_from

    def mostly_plain(table: Any, times: int) -> Any:
        """The first of ``table`` more often: what only the host can compute would hide all else."""
        plain, *others = table
        return one_of([plain] * times + others)

    return strategies.builds(
        Composition,
        kind=one_of(KINDS),
        sampler=one_of(list(SAMPLERS)),
        scheduler=one_of(["normal", "karras", "simple", "beta"]),
        steps=strategies.integers(2, 5),
        cfg=one_of([1.0, 4.0]),
        denoise=one_of([1.0, 0.6]),
        batch=one_of([1, 2]),
        mask=strategies.booleans(),
        prompt=one_of(list(PROMPTS)),
        lora=mostly_plain(LORAS, 4),
        patches=mostly_plain(PATCHES, 4),
        wrapper=mostly_plain(WRAPPERS, 4),
        code=mostly_plain(CODE, 36),
        weights=mostly_plain(WEIGHTS, 4),
        guider=mostly_plain(GUIDERS, 4),
        seed=strategies.integers(0, 3),
    )


@functools.cache
def base(kind: str, seed: int) -> Model:
    """One of the models that live on; weights of the first are changed in place now and then."""
    with torch.inference_mode(kind == "flux"):  # as in a host, which makes tensors without a count of their changes; and with one
        return small.model(kind, seed=seed, channels=32)


# -- what changes weights, for good ----------------------------------------------------------------------------------


def _some(net: torch.nn.Module, rng: random.Random) -> torch.Tensor:
    return rng.choice([weight for weight in net.parameters() if weight.numel() > 1])


def _turned(net: torch.nn.Module, rng: random.Random) -> None:
    weight = _some(net, rng)
    weight.copy_(weight.flip(0).clone())


def _loaded(net: torch.nn.Module, rng: random.Random) -> None:
    name, weight = rng.choice(list(net.named_parameters()))
    net.load_state_dict(
        {name: torch.randn(weight.shape, generator=torch.Generator().manual_seed(rng.randrange(99))) * 0.05}, strict=False
    )


def _behind_the_count(net: torch.nn.Module, rng: random.Random) -> None:
    weight = _some(net, rng)
    weight.data[rng.randrange(len(weight))] *= -1


def _another_tensor(net: torch.nn.Module, rng: random.Random) -> None:
    weight = _some(net, rng)
    weight.data = weight.data.roll(1, 0)


WEIGHTS: dict[str, Callable[..., None]] = {
    "same": lambda *_: None,
    "turned": _turned,
    "loaded": _loaded,
    "behind the count": _behind_the_count,
    "another tensor": _another_tensor,
}


# -- what hangs on the model -----------------------------------------------------------------------------------------


def _lora(model: Model, seed: int, strength: float) -> Model:
    return comfy.sd.load_lora_for_models(model, None, small.lora(model, seed), strength, 0)[0]


def _widened(model: Model) -> Model:
    """FLUX.1's control LoRAs bring inputs of their own."""
    net, found = model.model.diffusion_model, small.lora(model)
    if not hasattr(net, "img_in"):
        return model
    rows, columns = net.img_in.weight.shape[0], SIZE * 4  # as it was made, whatever is loaded
    generator = torch.Generator().manual_seed(3)
    found["diffusion_model.img_in.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    found["diffusion_model.img_in.lora_down.weight"] = torch.randn(4, columns * 2, generator=generator) * 0.2
    found["diffusion_model.img_in.reshape_weight"] = torch.tensor([rows, columns * 2])
    return comfy.sd.load_lora_for_models(model, None, found, 1.0, 0)[0]


LORAS: dict[str, Callable[[Model], Model]] = {
    "none": lambda model: model,
    "weak": lambda model: _lora(model, 4, 0.3),
    "strong": lambda model: _lora(model, 5, 1.0),
    "two": lambda model: _lora(_lora(model, 4, 0.5), 5, 0.5),
    "widening": _widened,
}


def _of_unets(apply: Callable[[Model], Model]) -> Callable[[Model], Model]:
    return lambda model: apply(model) if hasattr(model.model.diffusion_model, "input_blocks") else model


def _foreign_patch(model: Model) -> Model:
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, extra_options: (q * 1.1, k, v))
    return model


def _watching(model: Model) -> Model:
    """A wrapper that changes nothing."""
    model = model.clone()
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL, WrappersMP.PREDICT_NOISE):
        model.add_wrapper_with_key(kind, "watching", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    return model


def _calls_another(model: Model) -> Model:
    """A guidance that evaluates another model of the same build within each call, as autoguidance does."""
    other, model = base(_kind(model), 10), model.clone()

    def also(
        executor: Any, x: torch.Tensor, t: torch.Tensor, concat: Any, cross: Any, control: Any, options: Any, **more: Any
    ) -> Any:
        rest = {
            kind: {key: each for key, each in hooks.items() if key != "autoguidance"}
            for kind, hooks in options["wrappers"].items()
        }
        found = other.model.apply_model(x, t, concat, cross, control, {**options, "wrappers": rest}, **more)
        return executor(x, t, concat, cross, control, options, **more) * 1.5 - found * 0.5

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "autoguidance", also)
    return model


PATCHES: dict[str, Callable[[Model], Model]] = {
    "none": lambda model: model,
    "freeu": _of_unets(lambda model: small.node(nodes_freelunch.FreeU_V2, model, 1.3, 1.4, 0.9, 0.2)),
    "pag": _of_unets(lambda model: small.node(nodes_pag.PerturbedAttentionGuidance, model, 2.0)),
    "foreign": _of_unets(_foreign_patch),
    "watching": _watching,
    "another model": _calls_another,
}


# -- what is around its calls ----------------------------------------------------------------------------------------


def _tiles(order: Callable[[list[int], random.Random, int], list[int]]) -> Callable[[random.Random], Any]:
    def make(rng: random.Random) -> Any:
        steps = [0]

        def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
            x = given["input"]
            out, count = torch.zeros_like(x), torch.zeros_like(x)
            width = x.shape[-1] // 2
            steps[0] += 1
            for left in order([0, width // 2, width], rng, steps[0]):
                tile = (..., slice(left, left + width))
                out[tile] += apply(x[tile], given["timestep"], **given["c"])
                count[tile] += 1
            return out / count.clamp_min(1)

        return wrapper

    return make


def _shifted(rng: random.Random) -> Any:
    def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
        by = rng.choice((0, 2, 4))
        return apply(given["input"].roll(by, -1), given["timestep"], **given["c"]).roll(-by, -1)

    return wrapper


def _passes(rng: random.Random) -> Any:
    """With the prompt as it is, and without a part of it, in either order."""

    def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
        c = given["c"]
        less = {**c, "c_crossattn": c["c_crossattn"][:, : rng.choice((20, 77))] * 0.5}
        order = [c, less] if rng.random() < 0.5 else [less, c]
        results = {
            id(each): apply(given["input"], given["timestep"], **{**each, "transformer_options": dict(c["transformer_options"])})
            for each in order
        }
        return results[id(c)] * 1.5 - results[id(less)] * 0.5

    return wrapper


def _cropped(rng: random.Random) -> Any:
    """Some of the latent once more, enlarged, in some steps."""

    def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
        x, out = given["input"], apply(given["input"], given["timestep"], **given["c"])
        if rng.random() < 0.7:
            left = rng.choice((0, 4, 8))
            crop = x[..., left : left + 8].repeat_interleave(x.shape[-1] // 8, -1)
            seen = apply(crop, given["timestep"], **given["c"])
            out[..., left : left + 8] = out[..., left : left + 8] * 0.5 + seen[..., :: x.shape[-1] // 8] * 0.5
        return out

    return wrapper


def _every_other(rng: random.Random) -> Any:
    """A cache that replaces a method of the network for the time of each call."""
    state: dict[str, Any] = {"calls": 0}

    def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
        net = apply.__self__.diffusion_model
        name = "forward_orig" if hasattr(net, "forward_orig") else "_forward"
        original = getattr(type(net), name)

        def cached(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            state["calls"] += 1
            key = args[0].shape
            if key not in state or state["calls"] % 2:
                state[key] = original(self, *args, **kwargs)
            return state[key]

        with patch.multiple(net, **{name: cached.__get__(net, type(net))}):
            return apply(given["input"], given["timestep"], **given["c"])

    return wrapper


def _class_for_a_call(rng: random.Random) -> Any:
    """A method of the blocks' class, replaced for the time of some calls."""

    def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
        net = apply.__self__.diffusion_model
        cls = DoubleStreamBlock if hasattr(net, "img_in") else BasicTransformerBlock
        original = cls.forward

        def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(self, *args, **kwargs)
            return tuple(each * 1.02 for each in found) if isinstance(found, tuple) else found * 1.02

        with patch.object(cls, "forward", louder) if rng.random() < 0.7 else contextlib.nullcontext():
            return apply(given["input"], given["timestep"], **given["c"])

    return wrapper


WRAPPERS: dict[str, Callable[[random.Random], Any] | None] = {
    "none": None,
    "tiles": _tiles(lambda places, rng, step: places),
    "tiles back and forth": _tiles(lambda places, rng, step: places[:: 1 if step % 2 else -1]),
    "tiles shuffled": _tiles(lambda places, rng, step: rng.sample(places, 3)),
    "some tiles": _tiles(lambda places, rng, step: rng.sample(places, 2)),
    "shifted": _shifted,
    "passes": _passes,
    "cropped": _cropped,
    "cache": _every_other,
    "class": _class_for_a_call,
}


# -- what is done to the code of the network -------------------------------------------------------------------------


@contextlib.contextmanager
def _hook(net: torch.nn.Module, rng: random.Random, pre: bool = False) -> Iterator[None]:
    module = rng.choice([each for each in net.modules() if isinstance(each, torch.nn.Linear)])
    if pre:
        handle = module.register_forward_pre_hook(lambda module, args: (args[0] * 1.01, *args[1:]))
    else:
        handle = module.register_forward_hook(lambda module, args, output: output * 1.01)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _method(net: torch.nn.Module, rng: random.Random) -> Iterator[None]:
    module = rng.choice([net, *(each for each in net.modules() if isinstance(each, torch.nn.Linear))])
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.01
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def _of_class(net: torch.nn.Module, rng: random.Random) -> Iterator[None]:
    cls = rng.choice(sorted({type(each) for each in net.modules() if type(each).__module__.startswith("comfy.ldm")}, key=str))
    name = rng.choice(["forward", "extra_repr"])
    original = getattr(cls, name)
    with patch.object(cls, name, lambda self, *args, **kwargs: original(self, *args, **kwargs)):
        yield


@contextlib.contextmanager
def _wrapped(net: torch.nn.Module, rng: random.Random) -> Iterator[None]:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs) * 1.01

    owner = net.time_embed if hasattr(net, "time_embed") else net.time_in
    name, inner = next((name, each) for name, each in owner.named_children() if isinstance(each, torch.nn.Linear))
    setattr(owner, name, Wrapped(inner))
    try:
        yield
    finally:
        setattr(owner, name, inner)


@contextlib.contextmanager
def _setting(net: torch.nn.Module, rng: random.Random) -> Iterator[None]:
    norms = [each for each in net.modules() if isinstance(getattr(each, "eps", None), float)]
    norm = rng.choice(norms)
    eps, norm.eps = norm.eps, 0.1
    try:
        yield
    finally:
        norm.eps = eps


CODE: dict[str, Callable[..., contextlib.AbstractContextManager[None]]] = {
    "own": lambda *_: contextlib.nullcontext(),
    "hook": _hook,
    "pre-hook": functools.partial(_hook, pre=True),
    "method": _method,
    "class": _of_class,
    "wrapped": _wrapped,
    "setting": _setting,
}


# -- samplers, guiders, prompts --------------------------------------------------------------------------------------


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for now, then in itertools.pairwise(sigmas):
        denoised = model(x, now * x.new_ones([len(x)]), **(extra_args or {}))
        x = x + (x - denoised) / now * (then - now)
    return x


def guided(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """By the gradient of a loss, where the network has one."""
    if _kind(model.inner_model.model_patcher) == "flux":  # by kernels that have none
        return euler(model, x, sigmas, extra_args)
    for now, then in itertools.pairwise(sigmas):
        with torch.inference_mode(False), torch.enable_grad():
            start = x.clone().detach().requires_grad_(True)
            denoised = model(start, (now * torch.ones(len(x))).clone(), **(extra_args or {}))
            (gradient,) = torch.autograd.grad(denoised[..., :8].square().mean(), start)
        x = x + (x - denoised.detach()) / now * (then - now) - gradient * now
    return x


def _nesting(another: bool) -> Callable[..., torch.Tensor]:
    """Samples once more within, after the first step: the same MODEL, or another one that has the same attached to it."""

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        inner = outer = model.inner_model.model_patcher
        if another:
            inner = base(_kind(outer), 10)
            inner = attach(inner, EXACT) if OURS in outer.wrappers.get(WrappersMP.OUTER_SAMPLE, {}) else inner
        for step, (now, then) in enumerate(itertools.pairwise(sigmas)):
            denoised = model(x, now * x.new_ones([len(x)]), **(extra_args or {}))
            if step == 0:
                denoised = denoised + 0.01 * _sampled(inner).mean()
                outer.pre_run()  # which the end of the other sampling has undone
            x = x + (x - denoised) / now * (then - now)
        return x

    return sampler


def _sampled(model: Model) -> torch.Tensor:
    kind = _kind(model)
    prompts = small.conditioning(kind, 3), small.conditioning(kind, 4)
    return small.custom_sample(model, prompts, "euler", 2, "simple", small.latent(1, SIZE, SIZE, kind=kind))


def _kind(model: Model) -> str:
    return "flux" if hasattr(model.model.diffusion_model, "img_in") else "sd15"


SAMPLERS: dict[str, Any] = {
    **dict.fromkeys(
        ["euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "dpmpp_2m_sde", "lcm", "ddim", "uni_pc", "dpmpp_sde"]
    ),
    "foreign": euler,
    "gradient": guided,
    "nesting": _nesting(another=False),
    "nesting another": _nesting(another=True),
}


def _masked(prompt: list, rng: random.Random) -> list:
    return [[each, {**more, "area": (8, 16, 0, 0), "strength": 1.0}] for each, more in prompt] + prompt


def _in_time(prompt: list, rng: random.Random) -> list:
    return [[each, {**more, "start_percent": 0.0, "end_percent": 0.5}] for each, more in prompt] + [
        [each * 0.5, {**more, "start_percent": 0.5, "end_percent": 1.0}] for each, more in prompt
    ]


PROMPTS: dict[str, Callable[[list, random.Random], list]] = {
    "plain": lambda prompt, _: prompt,
    "area": _masked,
    "in time": _in_time,
}


def _cfg(model: Model, positive: list, negative: list, cfg: float, kind: str) -> Any:
    return small.node(custom.CFGGuider, model, positive, negative, cfg)


def _dual_model(model: Model, positive: list, negative: list, cfg: float, kind: str) -> Any:
    if not hasattr(custom, "DualModelGuider"):
        return _cfg(model, positive, negative, cfg, kind)
    return small.node(custom.DualModelGuider, model, positive, cfg, base(kind, 10), negative)


def _perp_neg(model: Model, positive: list, negative: list, cfg: float, kind: str) -> Any:
    return small.node(nodes_perpneg.PerpNegGuider, model, positive, negative, small.conditioning(kind, 5), cfg, 0.5)


def _dual_cfg(model: Model, positive: list, negative: list, cfg: float, kind: str) -> Any:
    return small.node(custom.DualCFGGuider, model, positive, small.conditioning(kind, 5), negative, cfg, 2.0, "regular")


GUIDERS: dict[str, Callable[..., Any]] = {"cfg": _cfg, "two models": _dual_model, "perp-neg": _perp_neg, "dual cfg": _dual_cfg}


# -- all together ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of a composition.

    Attributes:
        error: of the stock sampler's, where the composition makes no sense to it.
        same: whether ours gave the same latent, or failed alike.
        routed: whether ranks computed some of its calls.
        notes: of the run.
    """

    error: str
    same: bool
    routed: bool
    notes: tuple[str, ...]


def sample(composition: Composition, model: Model) -> torch.Tensor:
    """The latent that ``model``, with all else that there is to the composition, is sampled to."""
    c, rng = composition, random.Random(composition.seed)
    if (make := WRAPPERS[c.wrapper]) is not None:
        model = model.clone()
        model.set_model_unet_function_wrapper(make(rng))
    positive = PROMPTS[c.prompt](small.conditioning(c.kind, 1), rng)
    guider = GUIDERS[c.guider](model, positive, small.conditioning(c.kind, 2), c.cfg, c.kind)
    function = SAMPLERS[c.sampler]
    sampler = comfy.samplers.KSAMPLER(function) if function else comfy.samplers.sampler_object(c.sampler)
    sigmas = small.node(custom.BasicScheduler, model, c.scheduler, c.steps, c.denoise)
    latent = small.latent(c.batch, SIZE, SIZE, kind=c.kind)
    if c.mask:
        latent["noise_mask"] = torch.zeros(1, SIZE, SIZE)
        latent["noise_mask"][:, 4:12, 4:12] = 1.0
    noise = small.node(custom.RandomNoise, c.seed)
    torch.manual_seed(c.seed)
    return small.node(custom.SamplerCustomAdvanced, noise, guider, sampler, sigmas, latent)["samples"]


def run(composition: Composition, options: Options) -> tuple[Outcome, torch.Tensor | None]:
    """Sample it with the stock sampler and with ours; what came of it, and our latent."""
    c, rng = composition, random.Random(composition.seed)
    plain = base(c.kind, 9)
    net = plain.model.diffusion_model
    WEIGHTS[c.weights](net, rng)
    model = PATCHES[c.patches](LORAS[c.lora](plain))
    place = rng.random()
    with CODE[c.code](net, random.Random(place)):
        expected, error = _tried(composition, model)
        found, ours = _tried(composition, attach(model, options))
    record = last_run()
    routed = record is not None and record.stats is not None and bool(record.stats.records)
    same = error == ours and (expected is None or torch.equal(expected, found))
    return Outcome(error, same, routed, record.notes if record else ()), found


def _tried(composition: Composition, model: Model) -> tuple[torch.Tensor | None, str]:
    try:
        return sample(composition, model), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
