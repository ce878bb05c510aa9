"""A ComfyUI of its own that samples with ranks until somebody ends it; it says so before it starts the first."""

import comfy.options  # noqa: F401  (before the flags)
from comfy.cli_args import args

args.cpu = True


def main():
    """For ever."""
    import torch

    from asyncdiff_nodes.host.routing.hooks import attach
    from helpers import small
    from helpers.sampling import ksampler, prompts_for, segmented

    torch.set_num_threads(1)
    model, prompts = attach(small.model("sd15", seed=9), segmented()), prompts_for()
    print("sampling", flush=True)
    with torch.inference_mode():
        while True:
            ksampler(model, prompts, steps=6)


if __name__ == "__main__":
    main()
