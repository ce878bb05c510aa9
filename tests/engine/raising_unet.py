"""A UNet for the fault tests; in a module of its own, so that worker processes can import it."""

import time

import torch
from diffusers import UNet2DConditionModel
from torch import nn


class Slow(nn.Module):
    """Wraps a block: sleeps, or raises when the latent says so (only where the block is computed)."""

    def __init__(self, block, seconds):
        super().__init__()
        self.block, self.seconds = block, seconds

    def forward(self, x, *args, **kwargs):
        if x.device.type != "meta":
            time.sleep(self.seconds)
            if bool(torch.isnan(x).any()):
                raise ValueError("not a number in conv_in")
        return self.block(x, *args, **kwargs)


def slow_unet(seconds):
    """A tiny UNet whose first convolution takes ``seconds``."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    unet.conv_in = Slow(unet.conv_in, seconds)
    return unet


def inputs(batch=2):
    """One call's arguments."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    return (sample, 10), {"encoder_hidden_states": torch.randn(batch, 5, 8, generator=generator), "return_dict": False}
