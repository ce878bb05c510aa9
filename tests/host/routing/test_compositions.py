"""Law 1, of whatever is put together: with preset Exact, the latent is the stock sampler's, bit by bit."""

import gc

import comfy.model_management
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as drawn_by

from asyncdiff_nodes.host.routing.options import Options
from helpers import compositions
from helpers.sampling import EXACT

ANY = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def check(composition, options):
    outcome, found = compositions.run(composition, options)
    if options.preset == "Exact":
        assert outcome.same, outcome
    else:
        assert outcome.error or found.isfinite().all(), outcome


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """The models, afterwards, also by the host."""
    yield
    compositions.base.cache_clear()
    gc.collect()
    comfy.model_management.cleanup_models()


@drawn_by(1)
@settings(max_examples=5, **ANY)
@given(compositions.strategy())
def test_exact_is_the_stock_sampler(composition):
    check(composition, EXACT)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@drawn_by(2)
@settings(max_examples=2000, **ANY)
@given(compositions.strategy())
def test_exact_is_the_stock_sampler_in_thousands(composition):
    check(composition, EXACT)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@drawn_by(3)
@settings(max_examples=300, **ANY)
@given(compositions.strategy())
def test_asynchronous_latents_are_finite(composition):
    check(composition, Options("Fast", "cpu,cpu"))
