"""Train the demo text-to-image model on emoji, and export it into the package.

The shipped weights were made on a CPU with one thread, started 57 minutes before the given UTC time::

    OMP_NUM_THREADS=1 python tools/demo_model/train.py --fresh --steps 5500 --until 06:10

The transformer that ships beside it, which reads the same text encoder::

    OMP_NUM_THREADS=1 python tools/demo_model/train.py --backbone transformer --work .cache/demo-transformer \
        --fresh --steps 8000 --until HH:MM

A larger model on a GPU, replacing the shipped one::

    python tools/demo_model/train.py --fetch --fresh --device cuda --size 64 --steps 100000 --batch 64 \\
        --channels 96 192 256 256 && python tools/demo_model/train.py --export

Training resumes from the newest checkpoint of the work folder; ``--fresh`` starts anew.
``--export`` turns the newest checkpoint (its EMA weights) into ``asyncdiff_nodes/demo/weights`` at any time.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffusers import PixArtTransformer2DModel, UNet2DConditionModel  # noqa: E402

from asyncdiff_nodes.demo import DemoPipeline  # noqa: E402
from asyncdiff_nodes.demo.text_encoder import TextEncoder  # noqa: E402
from asyncdiff_nodes.demo.tokenizer import PAD, UNK, WordTokenizer  # noqa: E402
from emoji_data import archive_path, load_images  # noqa: E402
from emoji_table import vocabulary  # noqa: E402
from export import export_checkpoint  # noqa: E402
from schedule import DiffusionTable, cosine_lr, wall_fraction  # noqa: E402

CONTEXT_LENGTH = 8
NOT_JUDGED = "Not judged yet: look at the sample grids above."
CROSS = "CrossAttnDownBlock2D"
CROSS_UP = "CrossAttnUpBlock2D"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "demo-train", help="checkpoints, data, log")
    parser.add_argument("--fetch", action="store_true", help="download the emoji with `npm pack` when missing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--backbone", choices=("unet", "transformer"), default="unet", help="what denoises")
    parser.add_argument("--size", type=int, default=32, help="picture size in pixels")
    parser.add_argument("--channels", type=int, nargs=4, default=[48, 64, 96, 96])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=96, help="context dimension")
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--until", help="UTC time HH:MM at which training has to be over; the LR decays to meet it")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--gamma", type=float, default=5.0, help="min-SNR-gamma; 0 turns the weighting off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    parser.add_argument("--export", action="store_true", help="write the weights folder from the newest checkpoint")
    parser.add_argument("--limits", help="with --export: the model card's limits, from looking at the grids (Markdown)")
    return parser.parse_args()


def build_models(config: dict, words: list[str]) -> torch.nn.ModuleDict:
    """Denoiser and, with the UNet, its text encoder, for the settings saved with a checkpoint."""
    if config["backbone"] == "transformer":
        return torch.nn.ModuleDict({"denoiser": _transformer(config)})
    unet = UNet2DConditionModel(
        sample_size=config["size"] // 2,
        in_channels=12,
        out_channels=12,
        down_block_types=(CROSS, CROSS, CROSS, "DownBlock2D"),
        up_block_types=("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
        block_out_channels=tuple(config["channels"]),
        layers_per_block=2,
        cross_attention_dim=config["dim"],
        attention_head_dim=config["heads"],  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )
    text = TextEncoder(len(words), CONTEXT_LENGTH, config["dim"])
    return torch.nn.ModuleDict({"denoiser": unet, "text": text})


def _transformer(config: dict) -> PixArtTransformer2DModel:
    """12 blocks of self-attention, cross-attention and MLP on patches of 2 x 2 folded pixels."""
    return PixArtTransformer2DModel(
        sample_size=config["size"] // 2,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        num_layers=12,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=config["dim"],
        use_additional_conditions=False,
    )


def train(args: argparse.Namespace) -> None:
    """Run or resume training until the step budget or the wall-clock limit is used up."""
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "pid").write_text(f"{os.getpid()}\n")
    pictures, prompts = load_images(archive_path(args.work, args.fetch), args.size)
    pictures = torch.nn.functional.pixel_unshuffle(pictures, 2).to(args.device)
    words = [PAD, UNK, *vocabulary()]
    tokenizer = WordTokenizer(words, CONTEXT_LENGTH)
    flat = [(index, prompt) for index, names in enumerate(prompts) for prompt in names]
    ids = tokenizer([prompt for _, prompt in flat]).to(args.device)
    aliases = [[row for row, (index, _) in enumerate(flat) if index == image] for image in range(len(prompts))]

    command = "python " + shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    config = {
        key: getattr(args, key)
        for key in ("backbone", "size", "channels", "dim", "heads", "batch", "lr", "steps", "ema", "gamma", "seed")
    }
    checkpoint_path = args.work / "checkpoint.pt"
    state = None
    if checkpoint_path.exists() and not args.fresh:
        state = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        for key in ("backbone", "size", "channels", "dim", "heads"):
            if config[key] != state["config"][key]:
                raise ValueError(
                    f"--{key}: {config[key]} differs from the checkpoint's {state['config'][key]}; "
                    "give the same value to resume, or --fresh to start anew"
                )
    torch.manual_seed(config["seed"])
    models = build_models(config, words).to(args.device)
    # the transformer is trained on the shipped text encoder, as it is
    encoder = models["text"] if "text" in models else DemoPipeline.load().text_encoder.to(args.device).requires_grad_(False)
    ema = copy.deepcopy(models).requires_grad_(False)
    optimizer = torch.optim.AdamW(models.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step, seconds, losses = 0, 0.0, []
    if state is not None:
        models.load_state_dict(state["models"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, losses = state["step"], state["seconds"], state["losses"]
    generator = torch.Generator().manual_seed(config["seed"] + 1 + step)
    table = DiffusionTable(config["gamma"], args.device)
    started = time.time()
    deadline = _deadline(args.until)
    origin = started - seconds  # the clock's share of the schedule counts training time before a resume too
    order: list[int] = []

    def save() -> None:
        state = {
            "config": config,
            "command": command,
            "words": words,
            "step": step,
            "seconds": seconds + time.time() - started,
            "losses": losses,
            "models": models.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        temporary = checkpoint_path.with_suffix(".tmp")  # a kill while writing leaves the old checkpoint whole
        torch.save(state, temporary)
        temporary.replace(checkpoint_path)

    saved = time.time()
    mean, count = 0.0, 0
    while True:
        fraction = max(step / args.steps, wall_fraction(origin, deadline))
        if fraction >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(args.lr, fraction, min(1.0, (step + 1) / args.warmup))
        while len(order) < config["batch"]:  # every picture once per epoch
            order += torch.randperm(len(prompts), generator=generator).tolist()
        batch, order = order[: config["batch"]], order[config["batch"] :]
        rows = [aliases[image][int(torch.randint(len(aliases[image]), (1,), generator=generator))] for image in batch]
        tokens = ids[rows].clone()
        tokens[(torch.rand(len(rows), generator=generator) < 0.1).to(args.device)] = 0  # CFG: drop the prompt
        clean = pictures[batch]
        noise = torch.randn(clean.shape, generator=generator).to(args.device)
        timesteps = torch.randint(0, 1000, (len(rows),), generator=generator).to(args.device)
        noisy, target, weight = table.corrupt(clean, noise, timesteps)
        predicted = models["denoiser"](noisy, timestep=timesteps, encoder_hidden_states=encoder(tokens), return_dict=False)[0]
        loss = ((predicted - target).square().mean(dim=(1, 2, 3)) * weight).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0, foreach=True)
        optimizer.step()
        step += 1
        decay = min(config["ema"], (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(models.parameters()), 1.0 - decay)
        mean, count = mean + float(loss.detach()), count + 1
        if count == 50:
            losses.append([step, mean / count])
            print(
                f"step {step} loss {mean / count:.4f} lr {optimizer.param_groups[0]['lr']:.2e} "
                f"{seconds + time.time() - started:.0f}s",
                flush=True,
            )
            mean, count = 0.0, 0
        if time.time() - saved > args.save_every:
            save()
            saved = time.time()
    save()
    print(f"finished at step {step}", flush=True)


def _deadline(until: str | None) -> float | None:
    """Next moment the UTC clock shows ``until`` (HH:MM), in seconds since the epoch."""
    if until is None:
        return None
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
        hour, minute = map(int, until.split(":"))
    except ValueError:
        raise ValueError(f"--until: {until!r} is not a time; give UTC hours and minutes as HH:MM") from None
    moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (moment if moment > now else moment + datetime.timedelta(days=1)).timestamp()


def main() -> None:
    args = parse_args()
    if not args.export:
        train(args)
        return
    if not (args.work / "checkpoint.pt").exists():
        raise FileNotFoundError(f"--work: {args.work} has no checkpoint.pt; train first, or name the work folder")
    checkpoint = torch.load(args.work / "checkpoint.pt", map_location="cpu", weights_only=True)
    models = build_models(checkpoint["config"], checkpoint["words"])
    models.load_state_dict(checkpoint["ema"])
    folder = ROOT / "asyncdiff_nodes" / "demo" / "weights"
    export_checkpoint(checkpoint, models, folder, args.limits or NOT_JUDGED)
    print(json.dumps({"step": checkpoint["step"], "folder": str(folder.relative_to(ROOT))}))


if __name__ == "__main__":
    main()
