"""Whether neurons that memory has no room for stay within reach, in the file of a pack."""

from __future__ import annotations

from dataclasses import replace

from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import Family
from transformers_patches.plan.decision import GIVEN, Decision


def decide_on_demand(
    settings: PartInferConfig, family: Family, *, native: bool, whole_pack: bool
) -> tuple[PartInferConfig, Decision, float | None]:
    """The settings with every neuron within reach, if that is decided, and the share of them that lies in memory.

    native: whether the native kernels decode. whole_pack: whether the weights are a pack that holds all neurons. Raises
    PartInferError if it is asked for and can't be.
    """
    resident = settings.loaded_neurons_percent
    if settings.on_demand == "off":
        return settings, Decision("off", GIVEN), None
    why_not = why_not_on_demand(settings, family, native=native, whole_pack=whole_pack)
    if settings.on_demand == "on" and why_not is not None:
        raise PartInferError(f"--on_demand on can't be: {why_not}")
    if why_not is not None or (settings.on_demand == "auto" and resident == 1):
        return settings, Decision("off", why_not or "everything is loaded"), None
    reachable = replace(settings, on_demand="on", loaded_neurons_percent=1.0, selection="up", compensation="none")
    reason = GIVEN if settings.on_demand == "on" else "the pack holds all neurons"
    return reachable, Decision("on", reason), resident


def why_not_on_demand(settings: PartInferConfig, family: Family, *, native: bool, whole_pack: bool) -> str | None:
    """Why neurons can't be read on demand; None if they can."""
    if settings.method != "partinfer":
        return f"method {settings.method} reads all that it has loaded"
    if not whole_pack:
        return (
            "it needs a pack of all neurons: --make_pack makes one beside the model, or write it with partinfer.py "
            "--function pack --loaded_neurons_percent 1 --sparsity 0.7 --start_num 0 --end_num LAST"
        )
    if settings.block_bytes is not None:
        return "with --block_bytes weights lie by input"
    if settings.selection not in ("auto", "up"):
        return f"selection {settings.selection} does not choose by up"
    if settings.compensation not in ("auto", "none") or settings.budget == "per_layer":
        return "compensation and budget are for neurons that are left out"
    if not native:
        return "only the native kernels read on demand, on CPUs"
    return None if family.gated else "a plain FFN has no up to choose by"
