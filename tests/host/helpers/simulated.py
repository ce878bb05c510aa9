"""The engine's simulator in place of a model's network, driven by the host's own samplers."""

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from asyncdiff_nodes.engine import NoiseLevels, Simulator
from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.host.controlnet.calls import ControlNets, take
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.patches.obstacles import READ_BY_NETWORKS, shippable
from asyncdiff_nodes.host.patches.protocol import RoutedCall
from asyncdiff_nodes.host.patches.registry import begun, models_of
from asyncdiff_nodes.host.routing.announced import Evaluation
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.network_call import NetworkCall, has_hook
from asyncdiff_nodes.host.routing.rehearsal import rehearse
from asyncdiff_nodes.host.workers.found import family_of, options_read
from asyncdiff_nodes.host.workers.quantised import operations_of
from asyncdiff_nodes.host.workers.skeleton import fingerprint_of, skeleton_of
from asyncdiff_nodes.host.workers.weights import weights_of


def loaded(skeleton, model, nets=()):
    """``skeleton`` with the weights that ranks are sent."""
    whole = skeleton.to_empty(device="cpu")
    tensors = dict(tensors_of(whole))
    for name, value in weights_of(model, skeleton, nets=nets):
        tensors[name].data.copy_(value)
    return whole


class Oracle:
    """The simulator of a model's network, from its first call on: that says how the network is split."""

    def __init__(self, model, plan, skeleton, whole):
        self._model, self._plan, self._skeleton, self._whole = model, plan, skeleton, whole
        self._simulator, self._fingerprint = None, fingerprint_of(model)  # before others inject into it

    @property
    def options_read(self):
        known = options_read(self._fingerprint)
        return READ_BY_NETWORKS if known is None else known

    def begun(self, call, arguments, timesteps, levels):
        """The simulator, in a run that has begun."""
        if self._simulator is None:
            inputs = (), arguments
            family = family_of(self._skeleton, self._model, self._fingerprint, call.entry, call.places, inputs)
            self._simulator = Simulator(self._whole, self._plan, family=family, example_inputs=inputs)
        if not self._simulator._streams:
            self._simulator.begin(timesteps, levels)
        return self._simulator

    @property
    def placement(self):
        return self._simulator.placement

    @property
    def family(self):
        return self._simulator.family

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._simulator is not None:
            self._simulator.close()


def simulated(model, plan, sampler, control=None):
    """``model`` with its network replaced by the simulator, once per sampling.

    Args:
        control: the outermost ControlNet of the prompts, which the simulator is then to compute, too; it is changed for good.
    """
    clone = model.clone()
    network = whole = model.model.diffusion_model
    patches = begun(model)
    for patch in patches:
        patch.prepare()
    nets = ControlNets({"positive": [{"control": control}]}, model, {}) if control else None
    skeleton = skeleton_of(model, nets.networks if nets else ())
    if type(skeleton) is not type(network) or skeleton._forward_hooks or models_of(model) or operations_of(model):
        whole = loaded(skeleton, model, nets.networks if nets else ())
    if nets:
        clone.recording = nets.recorded()  # for as long as there is this model
        clone.recording.__enter__()
    oracle, evaluations = Oracle(model, plan, skeleton, whole), []

    def computed(called):
        given, x, options = called.given, called.x, called.given["transformer_options"]
        sampling = model.get_model_object("model_sampling")
        sigmas = rehearse(comfy.samplers.sampler_object(sampler), options["sample_sigmas"], model).sigmas
        levels = NoiseLevels(tuple(sigmas.tolist()), tuple(sampling.calculate_input(sigmas, torch.ones_like(sigmas)).tolist()))
        if calls := take(given.get("control")):
            given["nets"] = {call.net: call.to_send(plan.microbatches > 1) for call in calls}
        window = getattr(options.get("context_window"), "index_list", None)
        stream = tuple(options["uuids"]), tuple(x.shape), len(calls), repr(window)
        shipped = {"sample_sigmas": None, **shippable(options, oracle.options_read)}
        routed = RoutedCall(network, given | {"transformer_options": shipped}, options, x)
        for patch in patches:
            assert patch.before(routed) is None
        timesteps = evaluations[-1].as_network_sees(sampling.timestep(sigmas))
        result = oracle.begun(called, routed.arguments, timesteps, levels)(stream=stream, **routed.arguments)
        for patch in patches:
            result = patch.after(routed, result)
        return result

    def diffusion_model(executor, *args, **kwargs):
        return computed(NetworkCall.of(network, executor.original, args, kwargs))

    def forward(*args, **kwargs):
        del network.forward  # which the simulator needs
        return computed(NetworkCall.of(network, network.forward, args, kwargs))

    def apply(executor, *args, **kwargs):
        evaluations.append(Evaluation.of(model.model, args, kwargs))
        if not has_hook(type(network)):
            network.forward = forward
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "simulator", apply)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "simulator", diffusion_model)
    return clone, oracle


def assert_simulated(model, options, sample):
    """What the ranks compute of ``model`` with asynchronous calls is what the simulator does, and not what the host does.

    Args:
        sample: takes a model; samples with Euler's method.
    """
    stock, found = sample(model), sample(attach(model, options))
    plan = options.resolve(items=2)[0]
    assert last_run().plan == plan and not last_run().notes
    oracle, simulator = simulated(model, plan, "euler")
    with simulator:
        expected = sample(oracle)
    assert (found - expected).abs().max() <= 1e-5
    assert (found - stock).abs().max() > 3e-5, "or this test proves nothing"
