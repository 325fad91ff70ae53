"""PartInferConfig: the settings of one run, their argparse flags, and their validation."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, dataclass, field, fields

from transformers_patches.errors import PartInferError

METHODS = ("partinfer", "coreinfer", "dense")
BASE_NEURONS_TYPES = ("dataset", "model")
FLOAT_DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZED_DTYPES = ("int8", "int4")  # the names of kernels.FORMATS, which is not imported because that takes seconds
DTYPES = (*FLOAT_DTYPES, *QUANTIZED_DTYPES)
HEAD_DTYPE = "int8"  # default of a quantised output projection: 4 bits cost the most there
KERNELS = ("auto", "native", "triton", "torch")
SCREENING = ("auto", "on", "off")
PROMPT_SELECTIONS = (
    "core",
    "griffin",
    "blend",
    "glass",
    "similarity",
)  # once per prompt; formulas in prompt_evidence.py
TOKEN_SELECTIONS = ("up", "gate")  # for every token; formulas in token_selection.py
SELECTIONS = ("auto", *PROMPT_SELECTIONS, *TOKEN_SELECTIONS)
COMPENSATIONS = ("auto", "none", "mean", "refit")
BUDGETS = ("auto", "uniform", "per_layer")
TOKEN_COUNTS = ("auto", "exact", "average")
ON_DEMAND = ("auto", "on", "off")

DEFAULT_BASE, DEFAULT_LOADED = 0.3, 0.7
# settings that decide what is computed: where one of these is given, there is no default bound on the loss
OWN_CHOICE = (
    *("method", "use_partial_loading", "loaded_neurons_percent", "sparsity", "base_neurons_percent", "token_sparsity"),
    *("selection", "token_count", "compensation", "fit_filepath", "budget", "start_num", "end_num"),
    *("base_neurons_type", "memory_limit"),
)
# flags that few need: they have a group of their own in help texts
DETAILS = (
    *("base_neurons_percent", "token_sparsity", "selection", "token_count", "compensation", "fit_filepath", "budget"),
    *("start_num", "end_num", "base_neurons_type", "head_dtype", "screen_head", "kernels"),
)
# what a bound on the loss decides, so that both can't be given
DECIDED = ("loaded_neurons_percent", "sparsity", "selection", "token_count", "compensation", "budget")
# what a share of the decoder layers' bytes decides, or leaves no room for
REPLACED = ("max_loss", *(name for name in OWN_CHOICE if name not in ("method", "base_neurons_type")))
FIRST_LAYERS_KEPT, LAST_LAYERS_KEPT = 3, 2  # layers that stay whole when start_num and end_num are not given


def neuron_count(fraction: float, intermediate_size: int) -> int:
    """Neurons in a fraction of a layer: fraction * N, rounded half to even, at least 1. The only rule for this."""
    return max(1, round(fraction * intermediate_size))


def parse_bytes(text: str) -> int | None:
    """A number of bytes with K, M or G for their thousands, millions or billions behind it; None if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    if found is None:
        return None
    return round(float(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[found[2]])


def _option(default, help_text: str, **argparse_options):
    return field(default=default, metadata={"help": help_text, "argparse": argparse_options})


@dataclass
class PartInferConfig:
    """What to load and what to compute. Fractions are of N, the FFN neurons of one layer.

    Raises PartInferError from the constructor when values contradict each other; `resolve_layers` checks what
    depends on the model.
    """

    method: str = _option("partinfer", "what computes the FFNs", choices=METHODS)
    use_partial_loading: bool = _option(
        False, "read only --loaded_neurons_percent of the neurons (partinfer always does)", action="store_true"
    )
    loaded_neurons_percent: float | None = _option(
        None, "fraction of the neurons read from disk, gamma (0.7; --sparsity where that is larger)", type=float
    )
    sparsity: float = _option(
        0.4,
        "portion of the neurons computed in decoding, or with a selection per token of the FFN bytes read, phi",
        type=float,
    )
    max_loss: float | None = _option(
        None,
        "instead of the fractions: load everything, and read the fewest bytes of all layers' FFNs whose predicted loss, in "
        "nats per token over dense, is at most this (0.05 where neither is given and the neuron file has a loss curve)",
        type=float,
    )
    block_bytes: float | None = _option(
        None,
        "instead of the fractions: load everything, and read this share of the weight bytes of all decoder layers for a "
        "decoded token, attention and FFN together, as the neuron file's byte ladder spreads it",
        type=float,
    )
    base_neurons_percent: float | None = _option(
        None, "fraction of the neurons always computed, delta (0.3; --sparsity where that is smaller)", type=float
    )
    token_sparsity: float = _option(
        0.2, "share of a token's positive activations that count as its core neurons, alpha", type=float
    )
    selection: str = _option(
        "auto",
        "what chooses the neurons: per prompt by core-neuron count (core, CoreInfer's), sum of squares of h / ||h|| "
        "(griffin), mean |h| ||W_down|| of prompt and neuron file (blend), ranks of both (glass), core neurons of similar texts (similarity); per token by "
        "|up x| rms(gate) ||W_down|| (up) or |gate| rms(up x) ||W_down|| (gate); auto: up where the neuron file has "
        "statistics, else core",
        choices=SELECTIONS,
    )
    token_count: str = _option(
        "auto",
        "with up and gate: every token computes the same number of neurons (exact), or all above a threshold per layer, "
        "which are as many on average over the prompt and the fit file's texts (average); auto: average where the fit "
        "file has thresholds for these settings",
        choices=TOKEN_COUNTS,
    )
    compensation: str = _option(
        "auto",
        "what stands in for neurons that are left out: nothing (none), their mean output (mean), or down rows of the "
        "loaded ones refitted by least squares (refit); auto: refit with a fit file, else mean where the neuron file has "
        "statistics",
        choices=COMPENSATIONS,
    )
    fit_filepath: str | None = _option(None, "fit file of python -m profiler fit (the one beside the neuron file)")
    budget: str = _option(
        "auto",
        "the same gamma and phi for every sparse layer, or for the same bytes in all those of the fit file; auto: the "
        "fit file's if it has some for this --sparsity",
        choices=BUDGETS,
    )
    start_num: int | None = _option(None, "first sparse layer, 0-based, inclusive (3)", type=int)
    end_num: int | None = _option(None, "last sparse layer, inclusive (the third from the end)", type=int)
    base_neurons_type: str = _option("dataset", "which neuron file ranks the base neurons", choices=BASE_NEURONS_TYPES)
    dataset_neurons_filepath: str | None = _option(None, "neuron file of the task (looked up if not given)")
    model_neurons_filepath: str | None = _option(None, "neuron file of the model (looked up if not given)")
    memory_limit: bool = _option(
        False,
        "keep the FFN weights of the sparse layers on the CPU and move only active neurons to the GPU",
        action="store_true",
    )
    memory: str | None = _option(
        None,
        "bound on the memory of the whole process, such as 900M or 1.5G: what does not fit is read from the pack when a token "
        "needs it, or it is said how much would do",
        metavar="BYTES",
    )
    context: int = _option(
        1024, "with --memory, tokens of prompt and answer that the key-value cache has room for", type=int
    )
    on_demand: str = _option(
        "auto",
        "whether neurons beyond --loaded_neurons_percent stay within reach, in the pack's file, and are read when a token "
        "chooses them (CPUs, native kernels); auto: where a pack holds all of them; off: they are left out",
        choices=ON_DEMAND,
    )
    dtype: str = _option(
        "auto",
        f"weights and arithmetic; auto: as the checkpoint says; {', '.join(QUANTIZED_DTYPES)}: quantised weights",
        choices=DTYPES,
    )
    head_dtype: str = _option(
        "auto",
        "with int4 weights: type of output projection and embeddings; int4 reads fewer bytes for each token, and costs "
        f"more quality than elsewhere ({HEAD_DTYPE})",
        choices=("auto", *QUANTIZED_DTYPES),
    )
    screen_head: str = _option(
        "auto",
        "compute exactly only the logits that matter, after a coarse look at all of them (CPUs, native kernels); auto: "
        "where it costs no memory, heads of 8 bits; on: float heads too, with 0.56 bytes more for each of their weights",
        choices=SCREENING,
    )
    kernels: str = _option(
        "auto",
        "what decodes; auto: the native kernels on CPUs, but PyTorch in float32, and Triton's on GPUs",
        choices=KERNELS,
    )
    device: str = _option("auto", "cpu, cuda, cuda:1, …; auto: cuda if there is one")

    def __post_init__(self) -> None:
        self._check_choice("method", METHODS)
        self._check_choice("base_neurons_type", BASE_NEURONS_TYPES)
        self._check_choice("dtype", DTYPES)
        self._check_choice("head_dtype", DTYPES)  # a float type is what `auto` is decided to be without --dtype int4
        if self.head_dtype not in ("auto", HEAD_DTYPE) and self.dtype not in ("auto", self.head_dtype):
            raise PartInferError(
                f"head_dtype {self.head_dtype} belongs to dtype {self.head_dtype}, got dtype {self.dtype}: leave one of them out"
            )
        self._check_choice("screen_head", SCREENING)
        self._check_choice("kernels", KERNELS)
        self._check_choice("selection", SELECTIONS)
        self._check_choice("budget", BUDGETS)
        self._check_choice("token_count", TOKEN_COUNTS)
        self._check_choice("compensation", COMPENSATIONS)
        if self.loaded_neurons_percent is None:
            self.loaded_neurons_percent = max(DEFAULT_LOADED, self.sparsity)
        if self.base_neurons_percent is None:
            self.base_neurons_percent = min(DEFAULT_BASE, self.sparsity)
        for name in ("sparsity", "loaded_neurons_percent", "base_neurons_percent", "token_sparsity"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise PartInferError(f"{name} must be a fraction in [0, 1], got {value}")
        if self.max_loss is not None and not (self.max_loss >= 0 and self.method == "partinfer"):
            raise PartInferError(
                f"max_loss must be at least 0 nats, of method partinfer, got {self.max_loss} of {self.method}"
            )
        self._check_block_bytes()
        if self.method == "partinfer":
            self.use_partial_loading = True
            self._check_order("base_neurons_percent", "sparsity")
        self._check_choice("on_demand", ON_DEMAND)
        self._check_memory()
        leaves_out = self.use_partial_loading and self.on_demand != "on"
        if self.method != "dense" and leaves_out:
            self._check_order("sparsity", "loaded_neurons_percent")
        if leaves_out:
            self._check_order("base_neurons_percent", "loaded_neurons_percent")
        self._check_selection()
        if self.memory_limit and self.device == "cpu":
            raise PartInferError("memory_limit moves active neurons to a GPU, got device cpu: leave one of them out")
        if self.memory_limit and self.method == "dense":
            raise PartInferError("memory_limit needs a sparse method (partinfer or coreinfer), got method dense")

    def _check_block_bytes(self) -> None:
        if self.block_bytes is None:
            return
        if not 0 < self.block_bytes <= 1 or self.method != "partinfer":
            raise PartInferError(
                f"block_bytes must be a share above 0 and at most 1, of method partinfer, got {self.block_bytes} of "
                f"{self.method}"
            )
        if self.memory_limit:
            raise PartInferError("memory_limit moves FFN neurons only, got block_bytes too: leave one of them out")

    def _check_memory(self) -> None:
        if self.context < 1:
            raise PartInferError(f"context must be at least 1 token, got {self.context}")
        if self.memory is not None and parse_bytes(self.memory) is None:
            raise PartInferError(f"memory must be a number of bytes such as 900M or 1.5G, got {self.memory!r}")
        if self.memory is not None and self.on_demand == "on":
            raise PartInferError("memory decides what is read on demand, got on_demand on: leave one of them out")

    @property
    def memory_bytes(self) -> int | None:
        """The bound on the process's memory; None: there is none."""
        return None if self.memory is None else parse_bytes(self.memory)

    def _check_selection(self) -> None:
        if self.memory_limit and self.selects_per_token:
            raise PartInferError(
                f"memory_limit moves the neurons of a prompt to the GPU, but selection {self.selection} chooses for every "
                f"token: use one of {', '.join(PROMPT_SELECTIONS)}"
            )
        if self.token_count == "average" and self.selection not in ("auto", *TOKEN_SELECTIONS):
            raise PartInferError(f"token_count average belongs to selection up or gate, got selection {self.selection}")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise PartInferError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def _check_order(self, smaller: str, larger: str) -> None:
        low, high = getattr(self, smaller), getattr(self, larger)
        if low > high:
            raise PartInferError(f"{smaller} must be at most {larger}, got {low} > {high}: change one of them")

    @property
    def computes_sparsely(self) -> bool:
        """Whether decoding computes only a part of the loaded neurons."""
        return self.method != "dense"

    @property
    def selects_per_token(self) -> bool:
        return self.selection in TOKEN_SELECTIONS

    @property
    def needs_neuron_files(self) -> bool:
        """Whether nothing can be loaded without one."""
        return self.use_partial_loading and (
            self.loaded_neurons_percent < 1 or self.max_loss is not None or self.block_bytes is not None
        )

    def resolve_layers(self, num_layers: int) -> range:
        """The sparse layers of a model with num_layers layers.

        Raises PartInferError when a given end is outside the model or nothing is left between the two.
        """
        start = FIRST_LAYERS_KEPT if self.start_num is None else self.start_num
        end = num_layers - 1 - LAST_LAYERS_KEPT if self.end_num is None else self.end_num
        for name, value, given in (("start_num", start, self.start_num), ("end_num", end, self.end_num)):
            if given is not None and not 0 <= value < num_layers:
                raise PartInferError(f"{name} must be a layer of the model, 0 to {num_layers - 1}, got {value}")
        if start > end:
            raise PartInferError(
                f"no sparse layers: start_num {start} is after end_num {end} in a model of {num_layers} layers; "
                "give --start_num and --end_num"
            )
        return range(start, end + 1)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
        """Add one flag per field. The value of a flag that is not given is None."""
        plain = parser.add_argument_group("what is loaded and computed")
        details = parser.add_argument_group("details of the method, for experiments")
        for item in fields(cls):
            if item.name in skip:
                continue
            group = details if item.name in DETAILS else plain
            options = dict(item.metadata["argparse"])
            if item.default not in (None, False):
                options["help"] = f"{item.metadata['help']} ({item.default})"
            else:
                options["help"] = item.metadata["help"]
            group.add_argument(f"--{item.name}", default=None, **options)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> PartInferConfig:
        """The config of parsed arguments; None means not given."""
        return cls(**cls.given_in(arguments))

    @classmethod
    def given_in(cls, arguments: argparse.Namespace) -> dict:
        """The fields that were given among parsed arguments, by name."""
        names = {item.name for item in fields(cls)}
        return {name: value for name, value in vars(arguments).items() if name in names and value is not None}


def default_layers(num_layers: int) -> range:
    """The sparse layers of a model where none are given; empty for models that are not deep enough."""
    return range(FIRST_LAYERS_KEPT, max(FIRST_LAYERS_KEPT, num_layers - LAST_LAYERS_KEPT))


def check_given(given: dict) -> None:
    """Raise PartInferError if a bound on the loss, or a share of bytes, is given together with what it decides.

    given: fields of PartInferConfig.
    """
    both = [name for name in DECIDED if name in given]
    if given.get("max_loss") is not None and both:
        raise PartInferError(f"--max_loss decides about --{both[0]}: give one of them")
    both = [name for name in REPLACED if given.get(name) is not None]
    if given.get("block_bytes") is not None and both:
        raise PartInferError(f"--block_bytes decides about --{both[0]}: give one of them")


def chooses_nothing(given: dict) -> bool:
    """Whether the fields that were given leave the setting to the program."""
    chosen = {name: value for name, value in given.items() if (name, value) != ("method", "partinfer")}
    return not {"max_loss", "block_bytes", *OWN_CHOICE} & chosen.keys()
