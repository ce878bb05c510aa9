"""The model node, for every other sampler, and the options that all nodes share."""

from __future__ import annotations

import contextlib
from typing import Any

from comfy_api.latest import io

OptionsType = io.Custom("ASYNCDIFF_OPTIONS")


def advanced(widget: io.Input) -> io.Input:
    """``widget`` among those that the page hides at first; only recent hosts have a keyword for it."""
    widget.extra_dict = {**widget.extra_dict, "advanced": True}
    return widget


def options_input() -> io.Input:
    """The optional input that the samplers and the model node have last."""
    return OptionsType.Input("options", optional=True, tooltip="From AsyncDiff Options. Without it: what the settings say.")


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
                "A model that all GPUs denoise together, for SamplerCustom, SamplerCustomAdvanced and every other sampler node. "
                "Place it last, after LoRAs and other model nodes."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model whose network is split over the devices."),
                options_input(),
            ],
            outputs=[io.Model.Output(tooltip="The same model, computed by the worker group.")],
        )

    @classmethod
    def execute(cls, model: Any, options: Any = None) -> io.NodeOutput:
        """Attach the hooks to a clone."""
        from asyncdiff_nodes.host.checks import checked
        from asyncdiff_nodes.host.routing.hooks import attach

        checked(cls, model=model, options=options)
        return io.NodeOutput(attach(model, options))


def _option_widgets() -> list[io.Input]:
    """Of AsyncDiff Options. Saved workflows store widgets by position: new ones go last."""
    custom = "Used by the preset Custom. "
    return [
        io.Combo.Input(
            "preset",
            options=["Exact", "Balanced", "Fast", "Turbo", "Custom"],
            default="Balanced",
            tooltip=(
                "With CFG above 1 and 2, 4, 6 ... equal GPUs, one half of them computes the prompt and the other the "
                "negative prompt, but for Exact: with 2 the picture is then KSampler's. Else: "
                "Balanced: three exact steps, then all devices at once, and an exact last step; the picture stays "
                "very close (20 steps of the demo model: 1.4x and 58 dB with 2 devices, 2.0x and 43 dB with 4). "
                "Fast: two exact steps first, and hardly any work done twice; small details change. Turbo: like "
                "Balanced, but two steps per round with three or more devices; details change (2.2x and 44 dB with "
                "3, 2.5x and 36 dB with 4). Exact: KSampler's picture bit by bit, the weights shared out but no "
                "faster. Custom: the settings below."
            ),
        ),
        io.String.Input(
            "devices",
            default="auto",
            tooltip="auto: those of the settings, by default every CUDA GPU. Or a list, one per rank, such as cuda:0, "
            "cuda:2 (or cpu, cpu to try it). ray:auto: every GPU of this machine's Ray cluster, see docs/ray.md.",
        ),
        io.Int.Input(
            "segments",
            default=0,
            min=0,
            max=16,
            tooltip=custom + "Parts that the network is cut into; 0: as many as the devices allow. More are faster, but "
            "each part must then look further ahead.",
        ),
        io.Int.Input(
            "stride",
            default=1,
            min=1,
            max=4,
            tooltip=custom + "Steps done by one parallel round. 2 is nearly twice as fast again, needs one more device "
            "(segments + stride - 1), and changes the picture more.",
        ),
        io.Int.Input(
            "warmup",
            default=3,
            min=1,
            max=10000,
            tooltip=custom + "Exact steps at the beginning, where the composition is decided. Each costs a full step; "
            "more keep the picture closer.",
        ),
        advanced(
            io.Boolean.Input(
                "time_shift",
                default=False,
                tooltip=custom + "Tell the network the previous step's noise level in parallel steps, as the paper suggests "
                "for some models. No effect on speed.",
            )
        ),
        advanced(
            io.Boolean.Input(
                "forecast",
                default=True,
                tooltip=custom
                + "Let each device work ahead, on the latent that is expected when its result will be needed, instead of "
                "handing on old results. Much closer to the exact picture; a part of the network is computed twice.",
            )
        ),
        advanced(
            io.String.Input(
                "cuts",
                default="",
                tooltip="Where the segments begin: one block name per segment, separated by commas, such as "
                "input_blocks.4, output_blocks.3. Empty: balanced automatically.",
            )
        ),
        io.Int.Input(
            "cooldown",
            default=1,
            min=0,
            max=10000,
            tooltip=custom + "Exact steps at the end, where the schedule leaps to a clean picture. One of them keeps the picture "
            "closer than anything else for its time. Schedules that fade out (karras) do without.",
        ),
        io.Float.Input(
            "speedup",
            default=0.0,
            min=0.0,
            max=16.0,
            step=0.1,
            tooltip=custom + "How many times as fast the whole run should be, at least: the warm-up is then as long as that "
            "allows, whatever it says above. 0: no matter. Compared with the fastest device alone, as far as speeds are known.",
        ),
        io.Int.Input(
            "branches",
            default=0,
            min=0,
            max=8,
            tooltip=custom + "Parts of a batch, such as prompt and negative prompt, that devices of their own compute. "
            "1: all devices work on the whole batch. 0: 2 where that is of use and segments is 0, as with the other "
            "presets.",
        ),
        io.Combo.Input(
            "control_nets",
            options=["shared", "fresh"],
            default="shared",
            tooltip="shared: the devices compute ControlNets together with the network, so that these are faster, too. "
            "fresh: ComfyUI computes them before each step, on one device, for guidance that is never worked ahead.",
        ),
        io.Combo.Input(
            "on_failure",
            options=["restart", "finish"],
            default="restart",
            tooltip="When a worker process dies, runs out of memory or hangs. restart: others take over at that step, "
            "with a new warm-up, and if these fail, too, ComfyUI. finish: ComfyUI does the rest, on one device.",
        ),
        advanced(
            io.Combo.Input(
                "compression",
                options=["none", "half", "int8"],
                default="none",
                tooltip="Fewer bytes between devices in parallel steps, where links are slow (between machines, or old PCIe). "
                "half: 16 bits per number, of use where the model computes in 32. int8: 8 bits for what changed since the "
                "step before. Exact steps stay exact.",
            )
        ),
        advanced(
            io.Combo.Input(
                "verify",
                options=["auto", "off", "first", "always"],
                default="auto",
                tooltip="Have ComfyUI compute a call of each kind as well, and compare. first: of the first picture of a model "
                "and what hangs on it. always: of every picture. auto: as the settings say, by default as first where something "
                "of another pack hangs on the model. A difference is reported, and ComfyUI then samples that model itself.",
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
            description="How the model is split over the devices, and how much speed is traded for exactness.",
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
