"""Training pictures of the demo model: fetch the npm package, read the chosen emoji as image tensors."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from emoji_table import emoji_prompts

PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"


def archive_path(folder: Path, fetch: bool = False) -> Path:
    """Path of the npm archive inside ``folder``; ``fetch`` downloads it with ``npm pack`` when missing.

    Raises:
        FileNotFoundError: the archive is not there and ``fetch`` is false.
    """
    path = folder / ARCHIVE
    if path.exists():
        return path
    if not fetch:
        raise FileNotFoundError(f"{path} not found: pass --fetch, or run `npm pack {PACKAGE}@{VERSION}` in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "pack", f"{PACKAGE}@{VERSION}"], cwd=folder, check=True)
    return path


def load_images(archive: Path, size: int = 32) -> tuple[torch.Tensor, list[list[str]]]:
    """Read the emoji of the table, on white, resized to ``size`` x ``size``.

    Returns:
        Float images [N, 3, size, size] in [-1, 1], and the N lists of prompts.

    Raises:
        ValueError: an emoji of the table is not in the archive.
    """
    with tarfile.open(archive) as tar:
        records = json.load(tar.extractfile("package/emoji.json"))
        files = {name: record["image"] for record in records for name in record["short_names"]}
        images, prompts = [], []
        for name, names in emoji_prompts().items():
            if name not in files:
                raise ValueError(f"emoji {name!r} is not in {archive.name}: correct tools/demo_model/emoji_table.py")
            data = tar.extractfile(f"package/img/google/64/{files[name]}").read()
            images.append(_on_white(Image.open(io.BytesIO(data)), size))
            prompts.append(names)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), prompts


def _on_white(picture: Image.Image, size: int) -> np.ndarray:
    """One picture, composited on white, as a float32 array [size, size, 3] in [-1, 1]."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, picture).convert("RGB")
    if flat.size != (size, size):
        flat = flat.resize((size, size), Image.LANCZOS)
    return np.asarray(flat, dtype=np.float32) / 127.5 - 1.0
