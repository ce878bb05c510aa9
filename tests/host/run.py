"""Run the host tests under an installed ComfyUI's own Python, or say loudly that there is none.

python tests/host/run.py [pytest arguments]: all of this folder, or the files and tests that are named

python tests/host/run.py --screenshots [modules of tools/screenshots]
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from asyncdiff_nodes.cli.comfyui import find_comfyui, find_python

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "playwright>=1.49"]


def main() -> int:
    """Exit status of pytest; 0 where there is no host."""
    comfyui = find_comfyui()
    python = find_python(comfyui) if comfyui else None
    if python is None:
        what = f"no Python in {comfyui}: set COMFYUI_PYTHON" if comfyui else "no ComfyUI: set COMFYUI_PATH"
        print(f"{'!' * 79}\nALL HOST TESTS SKIPPED ({what})\n{'!' * 79}")
        return 0
    # beside this project's own environment: nothing is installed into the host's
    tools = Path(sys.prefix) / "host-tools"
    if not all((tools / name).exists() for name in ("pytest", "hypothesis", "playwright")):
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", str(tools), *TOOLS], check=True)
    print(f"Host tests: {comfyui}, {python}")
    environment = {
        **os.environ,
        "ASYNCDIFF_HOST_UNDER_TEST": str(comfyui),
        "PYTHONPATH": os.pathsep.join([str(tools), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    arguments = sys.argv[1:]
    if arguments[:1] == ["--screenshots"]:
        command = [python, str(ROOT / "tools" / "screenshots"), *arguments[1:]]
    else:
        if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
            print(f"{'!' * 79}\nALL BROWSER TESTS SKIPPED (no Chromium)\n{'!' * 79}")
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-o", "testpaths=tests/host"]
        command += arguments or ["-m", "not slow"]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
