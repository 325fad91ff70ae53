"""What a published baseline is run with, and the flags for that."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from transformers_patches.errors import PartInferError

CATS, TEAL, TEAL_UNIFORM = "cats", "teal", "teal_uniform"
WINA, WINA_UNIFORM, WINA_PLAIN = "wina", "wina_uniform", "wina_plain"
NAMES = (CATS, TEAL, TEAL_UNIFORM, WINA, WINA_UNIFORM, WINA_PLAIN)
CALIBRATED = (CATS, TEAL, TEAL_UNIFORM, WINA)  # take thresholds or shares from texts
ROTATED = (WINA, WINA_UNIFORM)  # change the basis of the weights
ALLOCATED = (TEAL, WINA)  # search for the share of each projection
PAPER_SPARSITY, CALIBRATION_TOKENS, TEAL_STEP = 0.5, 4096, 0.05


@dataclass(frozen=True)
class PublishedSettings:
    """Raises PartInferError for values outside their range, and for a method with thresholds but no texts for them."""

    name: str  # one of NAMES
    sparsity: float = PAPER_SPARSITY  # the share that a token leaves out: of neurons (cats), of inputs (teal, wina)
    calibration: str | None = None  # texts that thresholds and shares come from, as --dataset names texts
    tokens: int = CALIBRATION_TOKENS  # of those texts
    step: float = TEAL_STEP  # of the allocation of teal and wina, as a share of the query's weights

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise PartInferError(f"paper_sparsity must be at least 0 and below 1, got {self.sparsity}")
        if self.tokens < 1:
            raise PartInferError(f"calibration_tokens must be at least 1, got {self.tokens}")
        if not 0 < self.step <= 1:
            raise PartInferError(f"teal_step must be above 0 and at most 1, got {self.step}")
        if self.name in CALIBRATED and self.calibration is None:
            raise PartInferError(f"method {self.name} is calibrated on texts: give --calibration FILE")


def add_published_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(f"published baselines ({', '.join(NAMES)})")
    group.add_argument(
        "--paper_sparsity",
        type=_numbers,
        metavar="LIST",
        help="the share that a token leaves out, of the neurons (cats) or of the inputs of every projection (teal, wina); "
        f"a list runs the grid ({PAPER_SPARSITY})",
    )
    group.add_argument("--calibration", metavar="FILE", help="texts for cats, teal and wina, any text file")
    group.add_argument(
        "--calibration_tokens", type=int, help=f"how many tokens of them, drawn with --seed ({CALIBRATION_TOKENS})"
    )
    group.add_argument(
        "--teal_step",
        type=float,
        help=f"step of the search of teal and wina, a share of the query's weights: larger is faster and coarser ({TEAL_STEP})",
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or numbers separated by commas, got {text!r}") from None


def published_points(name: str, arguments: argparse.Namespace) -> list[PublishedSettings]:
    """The settings of one method for every --paper_sparsity. Raises PartInferError for bad ones."""
    given = {"tokens": arguments.calibration_tokens, "step": arguments.teal_step}
    options = {name: value for name, value in given.items() if value is not None}
    shares = arguments.paper_sparsity or [PAPER_SPARSITY]
    return [PublishedSettings(name, share, arguments.calibration, **options) for share in shares]
