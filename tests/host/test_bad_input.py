"""Whatever is asked for: what KSampler does, or an error that names the value and what to do."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncdiff_nodes.engine import AsyncDiffError
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from helpers.sampling import EXACT, ksampler

DEVICES = st.lists(st.sampled_from(["cpu", "cuda:0", "cuda:99", "cpu:1", "meta", "auto", "mps", "-1", "ü", ""]), max_size=4)
WIDGETS = {
    "preset": st.sampled_from(["Exact", "Balanced", "Fast", "Turbo", "Custom", "", "exact"]),
    "devices": st.one_of(DEVICES.map(", ".join), st.text(max_size=12), st.just("cpu,cpu,cpu,cpu")),
    "cuts": st.one_of(st.just(""), st.text(max_size=12), st.just("input_blocks.4, output_blocks.3")),
    "segments": st.integers(-2, 6),
    "stride": st.integers(-1, 5),
    "warmup": st.integers(-1, 30),
    "time_shift": st.booleans(),
    "forecast": st.booleans(),
    "cooldown": st.integers(-1, 30),
    "speedup": st.one_of(st.floats(), st.just(0.0)),
    "branches": st.integers(-1, 5),
    "control_nets": st.sampled_from(["shared", "fresh", "stale"]),
    "on_failure": st.sampled_from(["restart", "finish", "panic"]),
    "compression": st.sampled_from(["none", "half", "int8", "zip"]),
}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(widgets=st.fixed_dictionaries({}, optional=WIDGETS), items=st.integers(1, 8))
def test_options_are_a_plan_for_their_devices_or_an_error_that_names_the_value(widgets, items):
    try:
        plan, devices = Options(**{"devices": "cpu,cpu", **widgets}).resolve(items)
    except AsyncDiffError as error:
        said = str(error)
        assert any(f"{name}=" in said for name in WIDGETS) or "device" in said or "GPU" in said, said
        assert any(word in said for word in ("choose", "name", "needs", "use", "take", "start")), said
    else:
        assert len(devices) == plan.world_size >= 2


def outcome(model, prompts, latent, **how):
    """The latent, or what was raised."""
    try:
        return ksampler(model, prompts, {"samples": latent}, **{"steps": 3} | how)
    except Exception as error:
        return error


NORMAL, NORMAL_SIZE = torch.zeros(1, 4, 16, 16), 100.0  # a latent, and how large its numbers become
ASKED = {
    "one step": {"steps": 1},
    "no step": {"steps": 0},
    "less than a step": {"steps": 1, "denoise": 0.4},
    "no denoising": {"denoise": 0.0},
    "infinite CFG": {"cfg": float("inf")},
    "CFG that is not a number": {"cfg": float("nan")},
    "unknown sampler": {"sampler": "none"},
    "unknown scheduler": {"scheduler": "none"},
    "odd size": {"latent": torch.zeros(1, 4, 9, 7)},
    "one pixel": {"latent": torch.zeros(1, 4, 1, 1)},
    "no pixel": {"latent": torch.zeros(1, 4, 0, 8)},
    "no picture": {"latent": torch.zeros(0, 4, 16, 16)},
    "three channels": {"latent": torch.zeros(1, 3, 16, 16)},
    "a dimension too many": {"latent": torch.zeros(1, 4, 1, 16, 16)},
    "infinite latent": {"latent": torch.full((1, 4, 16, 16), torch.inf)},
    "half precision": {"latent": torch.zeros(1, 4, 16, 16, dtype=torch.float16)},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("preset", ["Exact", pytest.param("Balanced", marks=pytest.mark.slow)])
def test_a_strange_request_ends_as_with_ksampler_and_the_next_is_right(sd15, prompts, preset, asked):
    model = attach(sd15, Options(preset, "cpu,cpu"))
    expected, found = (outcome(it, prompts, **{"latent": NORMAL, **asked}) for it in (sd15, model))
    if isinstance(expected, Exception):
        assert isinstance(found, Exception), found
    else:
        assert not isinstance(found, Exception), found
        assert found.shape == expected.shape
        near = 0.0 if preset == "Exact" else 1e-3  # two branches, so that only rounding differs
        assert torch.allclose(found, expected, rtol=near, atol=near * NORMAL_SIZE, equal_nan=True)
    assert torch.equal(outcome(attach(sd15, EXACT), prompts, NORMAL), outcome(sd15, prompts, NORMAL))
