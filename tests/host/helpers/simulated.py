"""The engine's simulator in place of a model's network, driven by the host's own samplers."""

import inspect

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from asyncdiff_nodes.engine import NoiseLevels, Simulator
from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.host.controlnet.calls import ControlNets, take
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.patches.obstacles import shippable
from asyncdiff_nodes.host.patches.protocol import RoutedCall
from asyncdiff_nodes.host.patches.registry import begun, models_of
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.rehearsal import rehearse
from asyncdiff_nodes.host.workers.quantised import operations_of
from asyncdiff_nodes.host.workers.skeleton import family_of, skeleton_of
from asyncdiff_nodes.host.workers.weights import weights_of


def loaded(skeleton, model, nets=()):
    """``skeleton`` with the weights that ranks are sent."""
    whole = skeleton.to_empty(device="cpu")
    tensors = dict(tensors_of(whole))
    for name, value in weights_of(model, skeleton, nets=nets):
        tensors[name].data.copy_(value)
    return whole


def simulated(model, plan, sampler, size=(16, 16), control=None, batch=2):
    """``model`` with its network replaced by the simulator, once per sampling.

    Args:
        batch: of the calls that it is planned for.
        control: the outermost ControlNet of the prompts, which the simulator is then to compute, too; it is changed for good.
    """
    clone = model.clone()
    network = whole = model.model.diffusion_model
    patches = begun(model)
    for patch in patches:
        patch.prepare()
    nets = ControlNets({"positive": [{"control": control}]}, model, {}) if control else None
    skeleton = skeleton_of(model, nets.networks if nets else ())
    family = family_of(skeleton, model)
    inputs = family.example_inputs(skeleton, size, batch)
    if type(skeleton) is not type(network) or skeleton._forward_hooks or models_of(model) or operations_of(model):
        whole = loaded(skeleton, model, nets.networks if nets else ())
    if nets:
        clone.recording = nets.recorded()  # for as long as there is this model
        clone.recording.__enter__()
    simulator = Simulator(whole, plan, family=family, example_inputs=inputs)

    forward = inspect.signature(network.forward)

    def call(*args, **kwargs):
        del network.forward  # which the simulator may need
        given = forward.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        options, x = given["transformer_options"], given["x"]
        if not simulator._streams:
            sampling = model.get_model_object("model_sampling")
            sigmas = rehearse(comfy.samplers.sampler_object(sampler), options["sample_sigmas"], model)
            levels = NoiseLevels(
                tuple(sigmas.tolist()), tuple(sampling.calculate_input(sigmas, torch.ones_like(sigmas)).tolist())
            )
            simulator.begin(sampling.timestep(sigmas), levels)
        if calls := take(given.get("control")):
            given["nets"] = {call.net: call.to_send(plan.microbatches > 1) for call in calls}
        stream = tuple(options["uuids"]), tuple(x.shape), len(calls)
        routed = RoutedCall(network, given | {"transformer_options": {"sample_sigmas": None, **shippable(options)}}, options, x)
        for patch in patches:
            assert patch.before(routed) is None
        result = simulator(stream=stream, **routed.arguments)
        for patch in patches:
            result = patch.after(routed, result)
        return result

    def apply(executor, *args, **kwargs):
        network.forward = call  # not every network calls wrappers of its own
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "simulator", apply)
    return clone, simulator


def assert_simulated(model, options, sample, **kwargs):
    """What the ranks compute of ``model`` with asynchronous calls is what the simulator does, and not what the host does.

    Args:
        sample: takes a model; samples with Euler's method.
        kwargs: of :func:`simulated`.
    """
    stock, found = sample(model), sample(attach(model, options))
    plan = options.resolve(items=2)[0]
    assert last_run().plan == plan and not last_run().notes
    oracle, simulator = simulated(model, plan, "euler", **kwargs)
    with simulator:
        expected = sample(oracle)
    assert (found - expected).abs().max() <= 1e-5
    assert (found - stock).abs().max() > 3e-5, "or this test proves nothing"
