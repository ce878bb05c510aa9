"""The engine's simulator in place of a model's network, driven by the host's own samplers."""

import inspect

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from asyncdiff_nodes.engine import NoiseLevels, Simulator
from asyncdiff_nodes.host.rehearsal import rehearse
from asyncdiff_nodes.host.skeleton import family_of, skeleton_of


def simulated(model, plan, sampler, size=(16, 16)):
    """``model`` with its network replaced by the simulator, once per sampling."""
    clone = model.clone()
    skeleton = skeleton_of(model)
    family = family_of(skeleton)
    simulator = Simulator(
        model.model.diffusion_model, plan, family=family, example_inputs=family.example_inputs(skeleton, size, 2)
    )

    network = model.model.diffusion_model
    forward = inspect.signature(network.forward)

    def call(*args, **kwargs):
        del network.forward  # which the simulator needs
        given = forward.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        options, x = given["transformer_options"], given["x"]
        if not simulator._streams:
            sampling = model.get_model_object("model_sampling")
            sigmas = rehearse(comfy.samplers.sampler_object(sampler), options["sample_sigmas"], model)
            levels = NoiseLevels(
                tuple(sigmas.tolist()), tuple(sampling.calculate_input(sigmas, torch.ones(len(sigmas))).tolist())
            )
            simulator.begin(sampling.timestep(sigmas), levels)
        stream = tuple(options["uuids"]), tuple(x.shape)
        return simulator(stream=stream, **given | {"transformer_options": {"sample_sigmas": None}})

    def apply(executor, *args, **kwargs):
        network.forward = call  # not every network calls wrappers of its own
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "simulator", apply)
    return clone, simulator
