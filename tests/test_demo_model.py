"""The shipped demo model: the weights folder, sampling, and its prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools" / "demo_model"))

import emoji_table  # noqa: E402
from asyncdiff_nodes.demo import DemoPipeline  # noqa: E402
from asyncdiff_nodes.demo.features import features, kernel_distance, training_features  # noqa: E402
from asyncdiff_nodes.demo.pipeline import WEIGHTS  # noqa: E402
from asyncdiff_nodes.diffusers import SCHEDULERS  # noqa: E402


@pytest.fixture(scope="module")
def pipeline() -> DemoPipeline:
    return DemoPipeline.load()


def test_weights_folder_is_small_and_holds_no_pickle():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png"}
    assert sum(path.stat().st_size for path in files) < 25e6


def test_loads_in_the_dtype_asked_for(pipeline):
    assert {p.dtype for p in pipeline.denoiser.parameters()} == {torch.float32}
    half = DemoPipeline.load(dtype=torch.float16)
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.float16}
    assert half.encode(["red heart"]).dtype == torch.float16


def test_encode_shape(pipeline):
    context = pipeline.encode(["red heart", ""])
    assert context.shape == (2, pipeline.tokenizer.length, pipeline.denoiser.config.cross_attention_dim)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_same_seed_same_picture_whatever_the_batch(pipeline, scheduler):
    def draw(*prompts):
        return pipeline.sample(list(prompts), steps=3, scheduler=scheduler, seed=5, output="float")

    pair = draw("red heart", "dog face")
    assert pair.shape == (2, 32, 32, 3) and pair.dtype == np.float32
    assert np.array_equal(pair, draw("red heart", "dog face"))
    # Another batch size may change the order of float additions, and guided steps amplify that: 1e-3 of the range.
    np.testing.assert_allclose(draw("red heart")[0], pair[0], atol=1e-3)
    np.testing.assert_allclose(draw("pizza", "dog face", "")[1], pair[1], atol=1e-3)


def test_seed_and_position_change_the_picture(pipeline):
    pair = pipeline.sample(["pizza", "pizza"], steps=2)
    assert pair.dtype == np.uint8
    assert not np.array_equal(pair[0], pair[1])
    assert not np.array_equal(pair, pipeline.sample(["pizza", "pizza"], steps=2, seed=1))


def test_own_denoiser_and_callbacks_are_called(pipeline):
    calls, started, progress = [], [], []

    def denoiser(sample, timestep, encoder_hidden_states, return_dict):
        calls.append((tuple(sample.shape), timestep.ndim, tuple(encoder_hidden_states.shape[:2]), return_dict))
        return (torch.zeros_like(sample),)

    pipeline.sample(
        ["red heart", "pizza"],
        steps=3,
        denoiser=denoiser,
        on_start=lambda timesteps, levels: started.append((timesteps, levels)),
        callback=lambda i, n: progress.append((i, n)),
    )
    side = pipeline.denoiser.config.sample_size
    assert calls == [((4, 12, side, side), 1, (4, pipeline.tokenizer.length), False)] * 3
    ((timesteps, levels),) = started
    assert len(timesteps) == len(levels.sigmas) == len(levels.scales) == 3
    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_colour_words_reach_the_picture(pipeline):
    red, blue = pipeline.sample(["red square", "blue square"], steps=10, output="float")[:, 12:20, 12:20].mean((1, 2))
    assert red[0] > red[2] + 0.2 and blue[2] > blue[0] + 0.2


def test_unknown_words_are_reported(pipeline):
    assert pipeline.unknown_words(["Red heart!", "zeppelin dog quokka"]) == ["zeppelin", "quokka"]


def test_heldout_prompts_are_new_combinations_of_known_words(pipeline):
    seen = {frozenset(prompt.split()) for prompt in emoji_table.training_prompts()}
    assert not [prompt for prompt in emoji_table.HELDOUT_PROMPTS if frozenset(prompt.split()) in seen]
    assert pipeline.unknown_words(emoji_table.HELDOUT_PROMPTS) == []
    assert set(emoji_table.SHOWCASE_PROMPTS) <= set(emoji_table.training_prompts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": "pizza"}, "prompts"),
        ({"prompts": ["pizza"], "steps": 0}, "steps: 0"),
        ({"prompts": ["pizza"], "scheduler": "heun9"}, "heun9"),
        ({"prompts": ["pizza"], "output": "jpeg"}, "jpeg"),
    ],
)
def test_bad_input_is_named(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.sample(**options)


def test_incomplete_weights_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.json"):
        DemoPipeline.load(tmp_path)


def test_kernel_distance_from_the_training_set_grows_as_pictures_get_worse(pipeline):
    reference = training_features()
    assert reference.shape == (295, 96)
    prompts = json.loads((WEIGHTS / "prompts.json").read_text())["training"][::12]
    pictures = pipeline.sample(prompts, steps=4, output="float")
    noise = np.random.default_rng(0).normal(size=pictures.shape).astype(np.float32)
    distances = [kernel_distance(features(pictures + sigma * noise), reference) for sigma in (0, 0.3, 0.6)]
    assert distances == sorted(distances) and distances[-1] > distances[0] + 10, distances
    assert kernel_distance(reference[::2], reference[1::2]) < 10 < distances[-1], "two halves of one set are near"
