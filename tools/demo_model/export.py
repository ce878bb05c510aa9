"""Write a checkpoint of the demo model's training as the weights folder the package ships."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from asyncdiff_nodes.demo import DemoPipeline
from asyncdiff_nodes.demo.tokenizer import WordTokenizer
from card import model_card
from emoji_table import HELDOUT_PROMPTS, SHOWCASE_PROMPTS, emoji_prompts
from schedule import SCHEDULER_CONFIG


def export_checkpoint(checkpoint: dict, models: torch.nn.ModuleDict, folder: Path, limits: str) -> None:
    """Write weights (fp16), configs, prompts, loss curve, sample grids and model card to ``folder``.

    Args:
        checkpoint: as saved by the training: ``config``, ``words``, ``step``, ``seconds``, ``losses``, and ``command``.
        models: "denoiser" and, of the UNet, "text", with the EMA weights loaded. The transformer goes to a folder of its own.
        folder: created when missing; its files are overwritten.
        limits: Markdown for the card's "Limits", written by someone who has looked at the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models, name = models.half(), checkpoint["config"]["backbone"]
    models["denoiser"].save_pretrained(folder / name, safe_serialization=True)
    if name == "unet":
        _export_text(checkpoint, models["text"], folder)
    pipeline, pages = DemoPipeline.load(folder, denoiser=name), folder if name == "unet" else folder / name
    known = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    for prompts in ("showcase", "heldout") if name == "unet" else ("showcase",):
        labelled_grid(pipeline.sample(known[prompts]), known[prompts]).save(pages / f"{prompts}.png", optimize=True)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    (pages / "README.md").write_text(model_card(_facts(checkpoint, models["denoiser"], pipeline, limits)), encoding="utf-8")


def _export_text(checkpoint: dict, text: torch.nn.Module, folder: Path) -> None:
    """Text encoder, vocabulary, schedule, prompts and loss curve."""
    save_file({k: v.contiguous() for k, v in text.state_dict().items()}, folder / "text_encoder.safetensors")
    _write_json(folder / "text_encoder.json", text.config)
    WordTokenizer(checkpoint["words"], text.config["length"]).save(folder / "vocab.json")
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    training = [prompt for prompts in emoji_prompts().values() for prompt in prompts]
    prompts = {"showcase": list(SHOWCASE_PROMPTS), "heldout": list(HELDOUT_PROMPTS), "training": training}
    _write_json(folder / "prompts.json", prompts)
    loss_curve(checkpoint["losses"]).save(folder / "loss.png", optimize=True)


def _facts(checkpoint: dict, denoiser: torch.nn.Module, pipeline: DemoPipeline, limits: str) -> dict:
    """Numbers of the model card."""
    config, shape = checkpoint["config"], denoiser.config
    count = len(emoji_prompts())
    seen = checkpoint["step"] * config["batch"]
    return {
        **config,
        "channels": "/".join(map(str, config["channels"])),
        "half": config["size"] // 2,
        "emoji": count,
        "words": len(checkpoint["words"]),
        "length": pipeline.tokenizer.length,
        "denoiser": sum(p.numel() for p in denoiser.parameters()),
        "text": sum(p.numel() for p in pipeline.text_encoder.parameters()),
        "layers": shape.get("num_layers"),
        "width": shape.get("cross_attention_dim"),
        "tokens": (config["size"] // 4) ** 2,
        "command": checkpoint["command"],
        "step": checkpoint["step"],
        "seen": seen,
        "epochs": round(seen / count),
        "minutes": round(checkpoint["seconds"] / 60),
        "losses": checkpoint["losses"],
        "limits": limits,
    }


def labelled_grid(images: np.ndarray, labels: list[str], columns: int = 8, scale: int = 4) -> Image.Image:
    """Pictures [N, H, W, 3] uint8, enlarged without smoothing, each above its label."""
    side = images.shape[1] * scale
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 20)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = index % columns * (side + 8) + 4, index // columns * (side + 20) + 2
        sheet.paste(Image.fromarray(image).resize((side, side), Image.NEAREST), (x, y))
        draw.text((x, y + side + 2), label, fill="black")
    return sheet


def loss_curve(losses: list[list[float]], width: int = 640, height: int = 320) -> Image.Image:
    """Line chart of (step, loss) pairs with a logarithmic loss axis."""
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left, top, right, bottom = 56, 24, width - 16, height - 32
    draw.text((left, 6), "weighted v-prediction loss (mean of 50 steps, log scale) by step", fill="black")
    draw.rectangle((left, top, right, bottom), outline="gray")
    if not losses:
        return sheet
    last = losses[-1][0]
    low, high = (f(math.log10(loss) for _, loss in losses) for f in (min, max))
    low, high = low - 0.02, high + 0.02

    def place(step: float, log: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * (log - low) / (high - low)

    for tick in range(5):
        log = low + (high - low) * tick / 4
        y = place(0, log)[1]
        draw.line((left, y, right, y), fill="lightgray")
        draw.text((6, y - 6), f"{10**log:.3f}", fill="black")
        draw.text((place(last * tick / 4, low)[0] - 14, bottom + 6), str(round(last * tick / 4)), fill="black")
    draw.line([place(step, math.log10(loss)) for step, loss in losses], fill="blue", width=2)
    return sheet


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
