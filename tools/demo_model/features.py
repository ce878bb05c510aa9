"""Features of the training pictures as the shipped demo model sees them, for the distance between sets of pictures.

python tools/demo_model/features.py --fetch
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from asyncdiff_nodes.demo import DemoPipeline  # noqa: E402
from asyncdiff_nodes.demo.features import TRAINING_SET, features  # noqa: E402
from emoji_data import archive_path, load_images  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "demo-train", help="where the emoji are")
    parser.add_argument("--fetch", action="store_true", help="download the emoji with `npm pack` when missing")
    args = parser.parse_args()
    size = 2 * DemoPipeline.load().denoiser.config.sample_size
    pictures, _ = load_images(archive_path(args.work, args.fetch), size)
    found = features(pictures.add(1).div(2).permute(0, 2, 3, 1).numpy())
    save_file({"features": torch.from_numpy(found).half()}, TRAINING_SET)
    TRAINING_SET.chmod(0o644)  # safetensors writes files that only their owner may read
    print(f"{len(found)} pictures, {found.shape[1]} features each: {TRAINING_SET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
