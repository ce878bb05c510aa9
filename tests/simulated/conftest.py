"""Tests on simulated accelerators, in a process of their own, since PyTorch takes one such backend for good:

python -m pytest tests/simulated
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))
