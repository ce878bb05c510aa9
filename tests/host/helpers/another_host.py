"""A ComfyUI of its own that samples with ranks until somebody ends it; it says so before it starts the first."""

import comfy.options  # noqa: F401  (before the flags)
from comfy.cli_args import args

args.cpu = True


def main():
    """For ever."""
    import nodes
    import torch

    from asyncdiff_nodes.host.routing.hooks import attach
    from asyncdiff_nodes.host.routing.options import Options
    from helpers import small

    torch.set_num_threads(1)
    prompts = [small.conditioning("sd15", seed) for seed in (1, 2)]
    model = attach(small.model("sd15", seed=9), Options("Custom", "cpu,cpu", segments=2))
    print("sampling", flush=True)
    with torch.inference_mode():
        while True:
            nodes.KSampler().sample(model, 5, 6, 4.0, "euler", "normal", *prompts, small.latent())


if __name__ == "__main__":
    main()
