"""Some of the faults that tools/measure/chaos.py injects by the hundred: see docs/reliability.md."""

import os

import pytest

from helpers import faults

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What breaks things."""
    found = faults.Chaos(tmp_path_factory.mktemp("chaos"))
    with found.ready():
        yield found


def cases():
    """Every kind in every phase; the fast one is that which takes least."""
    for fault in faults.drawn(len(faults.PAIRS), seed=1):
        if fault.kind == "disk_full" and os.geteuid():
            continue  # only root can make a full disk
        marks = () if (fault.kind, fault.phase) == ("exception", "asynchronous") else pytest.mark.slow
        yield pytest.param(fault, id=f"{fault.kind}-{fault.phase}", marks=marks)


@pytest.mark.parametrize("fault", list(cases()))
def test_one_prompt_may_suffer_and_nothing_is_left(broken, fault):
    outcome = broken.inject(fault)
    print(fault, outcome)
    assert not (outcome.wrong or outcome.late or outcome.orphans or outcome.leaked_files), outcome
