"""The methods that are compared, their flags, and the grid of their settings."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, replace

from evaluation.published.settings import NAMES as PUBLISHED
from evaluation.published.settings import PublishedSettings, add_published_arguments, published_points
from transformers_patches import flags
from transformers_patches.config import PartInferConfig, check_given, chooses_nothing
from transformers_patches.errors import PartInferError


@dataclass(frozen=True)
class Method:
    """A method of the comparison."""

    compute: str  # PartInferConfig's `method`
    partial: bool = False  # whether only a part of the neurons is loaded
    random: bool = False  # whether a random ranking chooses that part
    preset: tuple[tuple[str, str], ...] = ()  # settings that define the method


# PartInfer as it was published.
ORIGINAL = (("selection", "core"), ("compensation", "none"), ("budget", "uniform"))
METHODS: dict[str, Method] = {
    "dense": Method("dense"),
    "dense+partial": Method("dense", partial=True),
    "partinfer": Method("partinfer", partial=True),
    "original": Method("partinfer", partial=True, preset=ORIGINAL),
    "griffin": Method("coreinfer", preset=(("selection", "griffin"), ("compensation", "none"))),
    "griffin+partial": Method("coreinfer", partial=True, preset=(("selection", "griffin"), ("compensation", "none"))),
    "coreinfer": Method("coreinfer"),
    "coreinfer+partial": Method("coreinfer", partial=True),
    "coreinfer_random_loading": Method("coreinfer", partial=True, random=True),
    **{name: Method("dense") for name in PUBLISHED},  # hooks over the dense model
}
_ALIASES = {"coreinfer_random": "coreinfer_random_loading"}
# Fractions that take comma-separated lists, and the name each has in a label.
SWEPT = {
    "sparsity": "sparsity",
    "loaded_neurons_percent": "loaded",
    "base_neurons_percent": "base",
    "token_sparsity": "token",
}
# Names that take such lists, and what each is called in a label.
SWEPT_NAMES = {"selection": "selection", "compensation": "compensation"}


@dataclass(frozen=True)
class Configuration:
    """One point of the grid."""

    label: str  # its name in tables
    method: str  # one of METHODS
    settings: PartInferConfig  # what the model is loaded with
    by_default: bool = False  # whether what is loaded and computed was left to the program
    published: PublishedSettings | None = None  # of a published baseline
    given: frozenset[str] = frozenset()  # the settings that were given, by name

    @property
    def folder_name(self) -> str:
        """The label as a folder name."""
        return self.label.replace(" ", "_").replace("=", "")


def parse_methods(text: str, use_partial_loading: bool = False) -> list[str]:
    """Method names of a comma-separated list; with use_partial_loading, those that have a partial form take it.

    Raises PartInferError for unknown names.
    """
    names = []
    for given in text.split(","):
        name = _ALIASES.get(given.strip(), given.strip())
        if use_partial_loading and f"{name}+partial" in METHODS:
            name = f"{name}+partial"
        if name not in METHODS:
            raise PartInferError(f"unknown method {given.strip()!r}: expected some of {', '.join(METHODS)}")
        if name not in names:
            names.append(name)
    return names


def add_method_arguments(parser: argparse.ArgumentParser, default: str, also: tuple[str, ...] = ()) -> None:
    """Add the flags of the model, --method, and every setting of PartInferConfig; SWEPT and SWEPT_NAMES take lists.

    also: methods that the script has in addition to METHODS.
    """
    flags.add_computing(flags.add_model(parser, default=None))
    names = ", ".join((*METHODS, *also))
    parser.add_argument("--method", default=default, help=f"one or more of {names}, separated by commas ({default})")
    parser.add_argument("--task_type", help="task whose neuron file is looked up: QA, Summarize, translate_de_en")
    parser.add_argument(
        "--random_neurons_filepath", help="ranking of coreinfer_random_loading (looked up, else seeded with --seed)"
    )
    group = parser.add_argument_group("a list such as 0.2,0.3,0.4 or up,core runs the grid")
    fields = PartInferConfig.__dataclass_fields__
    for name in SWEPT:
        group.add_argument(f"--{name}", type=_fractions, help=fields[name].metadata["help"])
    for name in SWEPT_NAMES:
        group.add_argument(f"--{name}", type=lambda text: text.split(","), help=fields[name].metadata["help"])
    add_published_arguments(parser)
    PartInferConfig.add_arguments(parser, skip=("method", *SWEPT, *SWEPT_NAMES))


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or numbers separated by commas, got {text!r}") from None


def build_grid(arguments: argparse.Namespace) -> list[Configuration]:
    """Every method with every combination of the swept fractions that makes a difference to it.

    Raises PartInferError for combinations that contradict each other.
    """
    names = parse_methods(arguments.method, bool(arguments.use_partial_loading))
    fixed = {
        name: getattr(arguments, name)
        for name in PartInferConfig.__dataclass_fields__
        if name not in ("method", "use_partial_loading", *SWEPT, *SWEPT_NAMES) and getattr(arguments, name) is not None
    }
    grid = []
    for name in names:
        method = METHODS[name]
        swept = {key: values for key in _relevant(method) if (values := getattr(arguments, key)) is not None}
        for point in itertools.product(*swept.values()):
            chosen = dict(zip(swept, point, strict=True))
            options = _fixed_for(method, fixed) | chosen | dict(method.preset)
            check_given(options)
            settings = PartInferConfig(method=method.compute, use_partial_loading=method.partial, **options)
            parts = [_label(key, value) for key, value in chosen.items() if len(swept[key]) > 1]
            by_default = name == "partinfer" and chooses_nothing(options)
            label = " ".join([name, *parts])
            made = Configuration(label, name, settings, by_default, given=frozenset(options))
            grid += _with_published(made, arguments)
    return grid


def _with_published(configuration: Configuration, arguments: argparse.Namespace) -> list[Configuration]:
    """A configuration with every --paper_sparsity if its method is a published baseline, else itself."""
    if configuration.method not in PUBLISHED:
        return [configuration]
    points = published_points(configuration.method, arguments)
    labels = [f"{configuration.label} left_out={point.sparsity:g}" for point in points]
    if len(points) == 1:
        labels = [configuration.label]
    return [replace(configuration, label=label, published=p) for label, p in zip(labels, points, strict=True)]


def check_speed_means_something(grid: list[Configuration]) -> None:
    """Raise PartInferError if a method is computed in a way that says nothing about its speed."""
    masked = next((configuration.method for configuration in grid if configuration.published), None)
    if masked is not None:
        raise PartInferError(
            f"{masked} is computed as a masked dense product here, so its speed would be wrong: measure its loss and bytes "
            "with evaluate_perplexity.py or evaluate_task.py"
        )


def add_dtypes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtypes", metavar="LIST", help="several types of weights in one run, such as bfloat16,int8,int4, for --dtype"
    )


def build_typed_grid(arguments: argparse.Namespace) -> list[Configuration]:
    """`build_grid`, once for each of --dtypes, which then ends the labels."""
    if arguments.dtypes is None:
        return build_grid(arguments)
    if arguments.dtype is not None:
        raise PartInferError("give --dtype or --dtypes")
    grid = []
    for dtype in arguments.dtypes.split(","):
        points = build_grid(argparse.Namespace(**{**vars(arguments), "dtype": dtype.strip()}))
        grid += [replace(point, label=f"{point.label} {dtype.strip()}") for point in points]
    return grid


def _label(key: str, value: float | str) -> str:
    return f"{SWEPT[key]}={value:g}" if key in SWEPT else f"{SWEPT_NAMES[key]}={value}"


def _relevant(method: Method) -> list[str]:
    """The swept settings that change what a method loads or computes."""
    names = []
    if _is_open(method):
        names += SWEPT_NAMES
    if method.compute != "dense":
        names += ["sparsity", "token_sparsity"]
    if method.partial:
        names += ["loaded_neurons_percent", "base_neurons_percent"]
    return names


def _fixed_for(method: Method, fixed: dict) -> dict:
    """The settings without those that mean nothing to a method, so that baselines stay what they are."""
    left_out = set() if _is_open(method) else {"budget", "fit_filepath", "token_count", "max_loss", "block_bytes"}
    if method.compute == "dense":  # nothing to move between CPU and GPU
        left_out |= {"memory_limit"}
    return {key: value for key, value in fixed.items() if key not in left_out}


def _is_open(method: Method) -> bool:
    """Whether a method takes selections, compensations and the like."""
    return method.compute == "partinfer" and not method.preset
