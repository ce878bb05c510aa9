"""The model card that goes with the exported weights."""

from __future__ import annotations

CARD = """# Demo model: text to emoji

A small text-conditioned diffusion model, trained from scratch on {emoji} emoji. It is the package's yardstick: small
enough to run anywhere, real enough that a change in the sampling shows up in the picture. It is not a general
text-to-image model.

## Samples

20 DDIM steps, guidance 3, seed 0, not selected. Prompts of the training set:

![showcase](showcase.png)

Prompts whose word combination never occurs in training (`heldout` in `prompts.json`):

![held out](heldout.png)

## Limits

{limits}

## Architecture

- diffusers `UNet2DConditionModel` with the block layout of Stable Diffusion 1.5 (three cross-attention levels and a
  plain one, two layers per block): {denoiser:,} parameters, channels {channels}, {heads} attention heads.
- {size}x{size} RGB pictures in [-1, 1], folded with `pixel_unshuffle(2)` to 12 channels of {half}x{half}.
- Text encoder: word-level vocabulary of {words} entries, {length} tokens, two transformer layers, {dim} wide:
  {text:,} parameters, trained along with the UNet.
- v-prediction, Stable Diffusion's betas (scaled linear 0.00085 to 0.012, 1000 steps).
- Weights: EMA, fp16, safetensors.

## Training

- Command: `{command}`
- Steps done: {step:,} of batch {batch} ({seen:,} pictures, about {epochs} epochs), {minutes} minutes; an interrupted
  training resumes from its checkpoint.
- AdamW, peak learning rate {lr}, warm-up, cosine decay over the larger of the used share of the steps and of the time;
  EMA {ema}; min-SNR weighting, gamma {gamma}; 10 % of the prompts dropped for guidance.
- Loss (weighted mean over 50 steps):

| step | loss |
| ---: | ---: |
{losses}

![loss](loss.png)

A larger model from a GPU replaces this one; the command is in `tools/demo_model/train.py`. Export:
`python tools/demo_model/train.py --export`.

## Data, credit and licences

- Pictures: Noto Emoji by Google, licensed under the Apache License 2.0 (the font: SIL Open Font License 1.1), taken as
  64x64 PNGs from the npm package `emoji-datasource-google` 16.0.0 by Cal Henderson (package: MIT). The selection and
  the prompts are in `tools/demo_model/emoji_table.py`. The pictures themselves are not part of this repository, though a model
  this small reproduces many of its training pictures closely.
- These weights: under the licence of this repository.
"""


TRANSFORMER_CARD = """# Demo transformer: text to emoji

A small diffusion transformer, trained from scratch on the same {emoji} emoji as [the demo model](../README.md) and on its
text encoder, as it is. It is there to measure with: what is so in a UNet need not be so in a transformer. The nodes do not
use it.

## Samples

20 DDIM steps, guidance 3, seed 0, not selected. Prompts of the training set:

![showcase](showcase.png)

{limits}

## Architecture

- diffusers `PixArtTransformer2DModel`: {denoiser:,} parameters, {layers} blocks of self-attention, cross-attention and
  MLP, {width} wide, {tokens} patches of 2 x 2.
- Pictures, noise schedule and v-prediction as in the demo model. Weights: EMA, fp16, safetensors.

## Training

- Command: `{command}`
- Steps done: {step:,} of batch {batch} ({seen:,} pictures, about {epochs} epochs), {minutes} minutes.
- AdamW, peak learning rate {lr}, and the rest as in the demo model.
- Loss (weighted mean over 50 steps):

| step | loss |
| ---: | ---: |
{losses}

Data, credit and licences as in the demo model.
"""


def model_card(facts: dict) -> str:
    """Markdown of the card; ``facts`` fills the fields of the card, ``losses`` being (step, loss) pairs."""
    pairs = facts["losses"]
    stride = max(1, len(pairs) // 10)
    shown = pairs[stride - 1 :: stride]
    if pairs and shown[-1] != pairs[-1]:
        shown.append(pairs[-1])
    rows = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in shown)
    return (TRANSFORMER_CARD if facts["backbone"] == "transformer" else CARD).format(**{**facts, "losses": rows})
