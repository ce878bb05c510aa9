"""The model node, for every other sampler, and the options that all nodes share."""

from __future__ import annotations

import contextlib
from typing import Any

from comfy_api.latest import io

from asyncdiff_nodes.host.choices import CHOICES, OptionValues

OptionsType = io.Custom("ASYNCDIFF_OPTIONS")


def advanced(widget: io.Input) -> io.Input:
    """``widget`` among those that the page hides at first; only recent hosts have a keyword for it."""
    widget.extra_dict = {**widget.extra_dict, "advanced": True}
    return widget


def options_input() -> io.Input:
    """The optional input that the samplers and the model node have last."""
    tip = "Connect AsyncDiff Options here. Without it, the AsyncDiff settings of ComfyUI apply."
    return OptionsType.Input("options", optional=True, tooltip=tip)


class ReadsSettings(io.ComfyNode):
    """A node whose result depends on the settings, too."""

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Another one after a change of the settings: the host then runs the node again."""
        from asyncdiff_nodes.host.page.settings import fingerprint

        return fingerprint()


class AsyncDiffModel(ReadsSettings):
    """MODEL in, MODEL out, denoised by all devices wherever it is sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Model and options."""
        return io.Schema(
            node_id="AsyncDiffModel",
            display_name="AsyncDiff Model",
            category="AsyncDiff",
            description=(
                "Has all of your GPUs denoise one picture together, with any sampler node: SamplerCustom, SamplerCustomAdvanced "
                "and others. Place it last, after LoRAs and other model nodes."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model whose network is split over your devices."),
                options_input(),
            ],
            outputs=[io.Model.Output(tooltip="The same model. All of your devices compute it together.")],
        )

    @classmethod
    def execute(cls, model: Any, options: Any = None) -> io.NodeOutput:
        """Attach the hooks to a clone."""
        from asyncdiff_nodes.host.checks import checked
        from asyncdiff_nodes.host.routing.hooks import attach

        checked(cls, model=model, options=options)
        return io.NodeOutput(attach(model, options))


def _option_widgets() -> list[io.Input]:
    """The widgets of AsyncDiff Options. Saved workflows store them by position: new ones go last."""
    custom = "Only for the preset Custom. "
    return [
        io.Combo.Input(
            "preset",
            options=list(CHOICES["preset"]),
            default=OptionValues.preset,
            tooltip=(
                "How fast, and how close to KSampler's picture. In a synchronous step the devices wait for each other; in an "
                "asynchronous step they all compute at once. dB say how close two pictures are: more is closer, and above 40 "
                "hardly anybody sees a difference. With CFG above 1 and 2, 4, 6 ... equal GPUs, one half of them computes the "
                "prompt and the other half the negative prompt (not in Exact, nor in Turbo with 4); with 2 GPUs the picture is "
                "then KSampler's up to rounding. In all other cases: Balanced: three synchronous steps first, then asynchronous "
                "ones, and a synchronous one at the end. The picture stays very close (demo model, 20 steps: 1.4x and 58 dB with "
                "2 devices, 2.0x and 43 dB with 4). Fast: two synchronous steps first, and hardly any work is done twice; small "
                "details change. Turbo: like Balanced, but three or more devices do two steps per round; details change (2.2x "
                "and 44 dB with 3, 2.5x and 36 dB with 4). Exact: KSampler's picture bit for bit; the devices share the weights, "
                "but it is no faster. Custom: the widgets below decide."
            ),
        ),
        io.String.Input(
            "devices",
            default=OptionValues.devices,
            tooltip="auto: the devices of the AsyncDiff settings. By default these are all GPUs that ComfyUI sees, except much "
            "weaker ones. Or a list, such as cuda:0, cuda:2 (cpu, cpu to try it without a GPU). ray:auto: all GPUs of this "
            "machine's Ray cluster, see docs/ray.md.",
        ),
        io.Int.Input(
            "segments",
            default=OptionValues.segments,
            min=0,
            max=16,
            tooltip=custom + "Segments are the parts that the network is cut into, one per device. 0: as many as the devices "
            "allow. More segments are faster, but each must then look further ahead.",
        ),
        io.Int.Input(
            "stride",
            default=OptionValues.stride,
            min=1,
            max=4,
            tooltip=custom + "The number of steps that the devices do in one round. 2 is nearly twice as fast again, needs one "
            "more device (segments + stride - 1), and changes the picture more.",
        ),
        io.Int.Input(
            "warmup",
            default=OptionValues.warmup,
            min=1,
            max=10000,
            tooltip=custom + "The warm-up: how many steps at the beginning are synchronous (the devices wait for each other). "
            "The composition is decided in them. They are slower than later steps; more of them keep the picture closer.",
        ),
        advanced(
            io.Boolean.Input(
                "time_shift",
                default=OptionValues.time_shift,
                tooltip=custom + "In asynchronous steps (all devices compute at once), the network is told the noise level of "
                "the step before. The AsyncDiff paper suggests this for some models. It does not change the speed.",
            )
        ),
        advanced(
            io.Boolean.Input(
                "forecast",
                default=OptionValues.forecast,
                tooltip=custom
                + "On: each device works ahead, on the latent that is expected when its result will be needed. The picture is "
                "much closer to KSampler's, and a part of the network is computed twice. Off: each device hands on its results "
                "of an earlier step, as in the AsyncDiff paper.",
            )
        ),
        advanced(
            io.String.Input(
                "cuts",
                default=OptionValues.cuts,
                tooltip="Where the segments (the parts of the network) begin: one block name per segment, separated by commas, "
                "such as input_blocks.4, output_blocks.3. Empty: they are balanced automatically.",
            )
        ),
        io.Int.Input(
            "cooldown",
            default=OptionValues.cooldown,
            min=0,
            max=10000,
            tooltip=custom + "The cool-down: how many steps at the end are synchronous (the devices wait for each other). It is "
            "used where the schedule leaps to a clean picture. For the time that it takes, nothing keeps the picture closer than "
            "one such step. Schedules that fade out (karras) do without.",
        ),
        io.Float.Input(
            "speedup",
            default=OptionValues.speedup,
            min=0.0,
            max=16.0,
            step=0.1,
            tooltip=custom + "How many times as fast the whole run should be, at least. The warm-up is then as long as this "
            "allows, and warmup above is ignored. 0: no target. Compared with the fastest device alone, as far as the speeds "
            "are known.",
        ),
        io.Int.Input(
            "branches",
            default=OptionValues.branches,
            min=0,
            max=8,
            tooltip=custom + "Branches are groups of devices. Each computes its own part of the batch, such as the prompt or the "
            "negative prompt. 1: all devices work on the whole batch. 0: two branches where that helps, if segments is 0 and "
            "bands is 0 or 1, as with the other presets.",
        ),
        io.Combo.Input(
            "control_nets",
            options=list(CHOICES["control_nets"]),
            default=OptionValues.control_nets,
            tooltip="shared: the devices compute ControlNets together with the network, so that these are faster, too. "
            "fresh: ComfyUI computes ControlNets before each step, on one device. Their guidance is then never computed ahead.",
        ),
        io.Combo.Input(
            "on_failure",
            options=list(CHOICES["on_failure"]),
            default=OptionValues.on_failure,
            tooltip="What to do when a worker process dies, runs out of memory or hangs. restart: new processes go on from that "
            "step, with a new warm-up; if they fail, too, ComfyUI does the rest. finish: ComfyUI does the rest, on one device.",
        ),
        advanced(
            io.Combo.Input(
                "compression",
                options=list(CHOICES["compression"]),
                default=OptionValues.compression,
                tooltip="The devices send fewer bytes to each other in asynchronous steps. This is for slow connections (between "
                "machines, or old PCIe). half: 16 bits per number, useful if the model computes in 32 bits. int8: 8 bits, for "
                "what changed since the step before. Synchronous steps are never compressed.",
            )
        ),
        advanced(
            io.Combo.Input(
                "verify",
                options=list(CHOICES["verify"]),
                default=OptionValues.verify,
                tooltip="ComfyUI computes some calls of the network once more by itself, and compares. first: one call of each "
                "kind, in the first picture of a model and what is attached to it. always: in every picture. auto: as the "
                "AsyncDiff settings say; by default as first if code of another pack is attached to the model. If the results "
                "differ, you are told, and ComfyUI samples that model by itself from then on.",
            )
        ),
        advanced(
            io.Int.Input(
                "bands",
                default=OptionValues.bands,
                min=0,
                max=16,
                tooltip="Bands are parts of the picture: some of its rows, or of a transformer's tokens. In a step in bands "
                "all devices compute together; each has the whole network. The picture is KSampler's up to rounding. 0: presets "
                "choose between bands and working ahead. 1: no bands, so that each device holds its part of the network only. "
                "More, with the preset Custom: so many bands in every step, or with segments in the synchronous ones.",
            )
        ),
    ]


class AsyncDiffOptions(ReadsSettings):
    """Everything that one may want to set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Only widgets, none of them required: prompts that programs saved with an older version lack those that came later."""
        widgets = _option_widgets()
        for widget in widgets:
            widget.optional = True
        return io.Schema(
            node_id="AsyncDiffOptions",
            display_name="AsyncDiff Options",
            category="AsyncDiff",
            description="Sets how the model is split over your devices, and how close the picture stays to KSampler's.",
            inputs=widgets,
            outputs=[OptionsType.Output(display_name="options")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Check them here, so that an error points to this node."""
        from asyncdiff_nodes.host.routing.options import OneDeviceError, Options

        options = Options(**widgets)
        with contextlib.suppress(OneDeviceError):  # the sampler says so, and is the host's own
            options.resolve()
        return io.NodeOutput(options)
