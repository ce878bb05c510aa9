"""``compare`` and ``similarity`` on models other than the demo's UNet."""

import json
import shutil
import string

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from asyncdiff_nodes.cli import main
from asyncdiff_nodes.cli.subjects import even_cuts, find_subject, graph_of
from asyncdiff_nodes.engine import Plan, PlanError, place


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole Stable Diffusion pipeline as diffusers saves it, small and random."""
    path = tmp_path_factory.mktemp("pipeline")
    letters = string.ascii_lowercase + ",."
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=64),
        unet=UNet2DConditionModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(path / "sd")
    return path / "sd"


def run(tmp_path, *argv):
    path = tmp_path / "result.json"
    assert main([*argv, "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
def test_compare_of_a_folder(folder, tmp_path):
    result = run(
        tmp_path, "compare", "--model", str(folder), "--runs", "dpmpp_2m:7:2", "--plans", "2,1,2,1",
        "--html", str(tmp_path / "page.html"),
    )  # fmt: skip
    assert result["model"] == str(folder)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["sequential", "published", "ours", "ours-fast", "fewer-steps"]
    assert rows["sequential"]["psnr"] == 100 and rows["ours"]["psnr"] > rows["published"]["psnr"] > 20
    assert {row["kernel_distance"] for row in result["rows"]} == {None}


def test_a_folder_s_pictures_are_its_pipeline_s_own(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    subject = find_subject(str(folder))
    (prompt,) = subject.prompts(1)
    drawn = subject.draw([prompt], steps=3, scheduler="ddim", seed=4, cfg=5.0)
    own = pipe(
        prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(4), guidance_scale=5.0, output_type="np"
    ).images  # fmt: skip
    assert drawn.shape == (1, 32, 32, 3) and np.array_equal(drawn, own)


def test_similarity_of_a_folder(folder, tmp_path):
    result = run(
        tmp_path, "similarity", "--model", str(folder), "--steps", "4", "--pairs", "2", "--picture", str(tmp_path / "map.png")
    )
    rows = {row["block"]: row for row in result["rows"]}
    assert {"conv_in", "mid_block.attentions.0", "conv_out", "result after CFG"} < set(rows)
    assert all(len(row["cosine"]) == 3 for row in result["rows"])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_named(break_it, message, folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    break_it(broken)
    assert main(["compare", "--model", str(broken)]) == 2
    error = capsys.readouterr().err
    assert f"--model {broken}" in error and message in error


@pytest.mark.parametrize("segments", [2, 3, 4])
def test_fresh_hidden_states_are_had_without_asking_since_they_cost_nothing(segments):
    graph = graph_of(find_subject("demo-transformer").denoiser)
    fast = place(graph, Plan(segments, fresh_skips=False))
    assert fast.hidden and fast.starts == place(graph, Plan(segments)).starts and sum(fast.shares) == pytest.approx(1)


def test_even_cuts_are_linear_and_even():
    subject = find_subject("demo-transformer")
    graph = graph_of(subject.denoiser)
    assert even_cuts(graph, 2) == ("transformer_blocks.0", "transformer_blocks.6")
    assert even_cuts(graph, 4) == tuple(f"transformer_blocks.{i}" for i in (0, 3, 6, 9))
    assert even_cuts(graph, len(graph.blocks)) == graph.names
    with pytest.raises(PlanError, match="only 12 blocks"):
        even_cuts(graph, 13)
