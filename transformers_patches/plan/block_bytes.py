"""How many bytes of all decoder layers a decoded token reads, where the neuron file has a byte ladder for that."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.families import Family
from transformers_patches.neurons.byte_ladder import ByteLadder, LayerChoice
from transformers_patches.neurons.neuron_file import NeuronFile
from transformers_patches.plan.decision import GIVEN, Decision
from transformers_patches.plan.max_loss import everything_loaded

OFF = "off"  # the decision's value where FFNs alone are sparse


def decide_block_bytes(
    settings: PartInferConfig, base: NeuronFile | None, unfit: str | None
) -> tuple[float | None, Decision]:
    """The share of the decoder layers' weight bytes that a decoded token reads; None if the FFNs alone are sparse.

    base: the neuron file whose ladder counts. unfit: why weights can't be stored by input; None if they can.
    Raises PartInferError if a share is asked for that can't be had.
    """
    if settings.block_bytes is None:
        return None, Decision(
            OFF, "not asked for: FFNs alone leave prompts faster, and on some processors decoding (docs/whole_model.md)"
        )
    return settings.block_bytes, Decision(f"{settings.block_bytes:g}", _checked(settings, base, unfit))


def why_not_by_input(config: PretrainedConfig, family: Family, group: int, *, packed: bool) -> str | None:
    """Why the weights of a model can't be stored by input; None if they can.

    group: outputs that share a scale; 1 for floats.
    """
    if packed:
        return "packs hold no weights by input"
    if group == 1:
        return None
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    if any(outputs % group for outputs in (heads * size, keys * size, family.intermediate_size(config))):
        return f"heads and neurons don't make up groups of {group}, which quantised weights by input need"
    return None


def _checked(settings: PartInferConfig, base: NeuronFile | None, unfit: str | None) -> str:
    """The reason for a share that is given; PartInferError if it can't be had."""
    if unfit is not None:
        raise PartInferError(f"--block_bytes can't be met, {unfit}: give --sparsity, or another --dtype or model")
    if settings.block_bytes >= 1:
        return GIVEN
    if base is None or base.ladder is None:
        name = "there is no neuron file" if base is None else f"{base.source} has none"
        raise PartInferError(
            f"--block_bytes needs a byte ladder, but {name}: make it with python -m profiler loss, or give --sparsity"
        )
    if settings.block_bytes < base.ladder.least - 1e-6:
        raise PartInferError(
            f"--block_bytes {settings.block_bytes:g} is less than {base.source} has settings for: give at least "
            f"{base.ladder.least:.2g}"
        )
    return GIVEN


def reading_blocks(settings: PartInferConfig, num_layers: int, share: float) -> PartInferConfig:
    """The same settings with everything loaded, of which a token reads a share of the decoder layers' bytes."""
    return replace(everything_loaded(settings, num_layers, share), block_bytes=share)


def predicted_share(share: float, ladder: ByteLadder | None) -> float | None:
    """Nats per decoded token over dense."""
    return 0.0 if share >= 1 or ladder is None else ladder.predict(share)


def layer_choices(share: float | None, ladder: ByteLadder | None, num_layers: int) -> list[LayerChoice] | None:
    """What a decoded token reads of every layer; None where no ladder is used, and where everything is read."""
    if share is None or ladder is None or share >= 1:
        return None
    return [ladder.layer(share, number) for number in range(num_layers)]
