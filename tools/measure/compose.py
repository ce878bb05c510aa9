"""Sample thousands of compositions (tests/host/helpers/compositions.py) with the stock sampler and with preset Exact.

python tools/measure/compose.py [--compositions 2000] [--seed 1] [FILE]

Every latent must be the stock sampler's, bit for bit, and no process may be left.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import within_host

SLOW = 60.0  # seconds after which a composition counts as hanging
PART = 125  # compositions of one seed
JOBS = 2  # hosts side by side


def main() -> None:
    """Write the file."""
    from asyncdiff_nodes.cli.report import write_json

    asked = within_host.asked(__doc__.splitlines()[0], "compositions", 2000, "compositions.json")
    parts = [(seed, min(PART, asked.count - begin)) for seed, begin in enumerate(range(0, asked.count, PART), asked.seed)]
    rows: list[Any] = []

    def run(asked_for: tuple[int, int]) -> None:
        rows.append(within_host.found_by(__file__, *map(str, asked_for)))
        told = {"rows": sorted(rows, key=lambda row: row["seed"])}
        write_json(asked.file, told, f"python tools/measure/compose.py --compositions {asked.count} --seed {asked.seed}")

    with ThreadPoolExecutor(JOBS) as pool:  # exact steps keep one core busy each
        list(pool.map(run, parts))
    print(f"written: {asked.file}")


def inside(file: str, seed: int, count: int) -> None:
    """Within a host: one part, with a seed of its own."""
    within_host.on_cpu()
    Path(file).write_text(json.dumps(part(seed, count)), encoding="utf-8")


def part(seed: int, count: int) -> dict[str, Any]:
    """What came of ``count`` compositions drawn by ``seed``."""
    import hypothesis
    import psutil
    import torch

    from asyncdiff_nodes.host.workers.pool import POOL
    from helpers import compositions
    from helpers.sampling import EXACT

    counts: Counter[str] = Counter(tried=0, routed=0, host=0, refused=0, different=0, slow=0)
    begin = time.monotonic()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(compositions.strategy())
    def draw(composition: compositions.Composition) -> None:
        start = time.monotonic()
        with torch.inference_mode():
            outcome, _ = compositions.run(composition, EXACT)
        counts["tried"] += 1
        counts["routed" if outcome.routed else "host"] += 1
        counts["refused"] += bool(outcome.error)
        counts["slow"] += time.monotonic() - start > SLOW
        if not outcome.same:
            counts["different"] += 1
            print(f"DIFFERENT: {composition} {outcome}", flush=True)

    draw()
    POOL.release()
    # Python's own helper ends with this process
    left = sum("resource_tracker" not in " ".join(each.cmdline()) for each in psutil.Process().children(recursive=True))
    row = {"seed": seed, **counts, "processes_left": left, "seconds": time.monotonic() - begin}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    inside(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])) if sys.argv[1:2] == ["--inside"] else main()
