"""The methods that are compared, their flags, and the grid of their settings."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError


@dataclass(frozen=True)
class Method:
    """A row of the comparison: what computes, whether neurons are left out, and by which ranking."""

    compute: str
    partial: bool = False
    random: bool = False


METHODS: dict[str, Method] = {
    "dense": Method("dense"),
    "dense+partial": Method("dense", partial=True),
    "partinfer": Method("partinfer", partial=True),
    "coreinfer": Method("coreinfer"),
    "coreinfer+partial": Method("coreinfer", partial=True),
    "coreinfer_random_loading": Method("coreinfer", partial=True, random=True),
}
_ALIASES = {"coreinfer_random": "coreinfer_random_loading"}
# Fractions that take comma-separated lists, and the name each has in a label.
SWEPT = {
    "sparsity": "sparsity",
    "loaded_neurons_percent": "loaded",
    "base_neurons_percent": "base",
    "token_sparsity": "token",
}


@dataclass(frozen=True)
class Configuration:
    """One point of the grid: `label` names it in tables, `settings` is what the model is loaded with."""

    label: str
    method: str
    settings: PartInferConfig

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


def add_method_arguments(
    parser: argparse.ArgumentParser, default: str, also: tuple[str, ...] = (), *, model_required: bool = True
) -> None:
    """Add --model_name, --method, and every setting of PartInferConfig; the fractions of SWEPT take lists.

    also: methods that the script has besides those of METHODS.
    """
    parser.add_argument("--model_name", required=model_required, help="a checkpoint folder, short name or hub id")
    names = ", ".join((*METHODS, *also))
    parser.add_argument("--method", default=default, help=f"one or more of {names}, separated by commas ({default})")
    parser.add_argument("--task_type", help="task whose neuron file is looked up: QA, Summarize, translate_de_en")
    parser.add_argument(
        "--random_neurons_filepath", help="ranking of coreinfer_random_loading (looked up, else seeded with --seed)"
    )
    group = parser.add_argument_group("fractions; a list such as 0.2,0.3,0.4 runs the grid")
    fields = PartInferConfig.__dataclass_fields__
    for name in SWEPT:
        group.add_argument(f"--{name}", type=_fractions, help=fields[name].metadata["help"])
    PartInferConfig.add_arguments(parser, skip=("method", *SWEPT))


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
        if name not in ("method", "use_partial_loading", *SWEPT) and getattr(arguments, name) is not None
    }
    grid = []
    for name in names:
        method = METHODS[name]
        swept = {key: values for key in _relevant(method) if (values := getattr(arguments, key)) is not None}
        for point in itertools.product(*swept.values()):
            chosen = dict(zip(swept, point, strict=True))
            settings = PartInferConfig(
                method=method.compute, use_partial_loading=method.partial, **_fixed_for(method, fixed), **chosen
            )
            parts = [f"{SWEPT[key]}={value:g}" for key, value in chosen.items() if len(swept[key]) > 1]
            grid.append(Configuration(" ".join([name, *parts]), name, settings))
    return grid


def _relevant(method: Method) -> list[str]:
    """The fractions that change what a method loads or computes."""
    names = []
    if method.compute != "dense":
        names += ["sparsity", "token_sparsity"]
    if method.partial:
        names += ["loaded_neurons_percent", "base_neurons_percent"]
    return names


def _fixed_for(method: Method, fixed: dict) -> dict:
    if method.compute == "dense":  # dense has nothing to move between CPU and GPU
        return {key: value for key, value in fixed.items() if key != "memory_limit"}
    return fixed
