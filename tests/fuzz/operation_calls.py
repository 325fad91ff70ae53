"""Calls of the native operations with arguments that don't fit, in a process of its own, because some might kill it.

`python -m tests.fuzz.operation_calls --seed 1 --count 300` makes so many calls of each kind and prints what came of them. A
kind is a registered operation, the decoder, or rows on disk, whose calls are made in sequences.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.rows_on_disk_calls import ROWS, UNIT, loaded_rows, rows_steps

HIDDEN, NEURONS, HEADS, KV_HEADS, HEAD_SIZE, CAPACITY, LENGTH, VOCABULARY = 64, 96, 4, 2, 16, 6, 3, 40
REFUSED = (ValueError, RuntimeError, TypeError)
DECODER = "decoder"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TYPES = (*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64)
INTEGERS = (0, 1, -1, 2, 3, -2, 7, 31, 33, 1000, 2**31, -(2**31), 2**40, 2**63 - 1, -(2**63))
REALS = (0.0, -1.0, 1e-30, 1e300, math.nan, math.inf, -math.inf)
TEXTS = ("", "relu", "silu", "gelu_tanh", "Silu", "unknown", "x" * 5000)
OTHERS = (None, 1, 1.5, "silu", [], [None], torch.zeros(3), object())


def operations() -> list[str]:
    """The names of all registered operations."""
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name[:11] == "partinfer::"
    }
    return sorted(names)


class Fitting:
    """Arguments that fit, made at random. `bits`: 0 for float weights."""

    def __init__(self, source: random.Random, quantised: bool) -> None:
        self.source = source
        self.dtype = source.choice(FLOATS)
        self.bits = source.choice((8, 4)) if quantised else 0
        self.tokens = source.choice((1, 1, 2, 9))

    def floats(self, *shape: int) -> Tensor:
        return (torch.randn(shape) / 8).to(self.dtype)

    def data(self, rows: int, columns: int) -> Tensor:
        if not self.bits:
            return self.floats(rows, columns)
        if self.bits == 8:
            return torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)

    def scales(self, rows: int, columns: int) -> Tensor:
        return torch.rand(rows, columns // 32).half() / 100

    def index(self) -> Tensor | None:
        chosen = 60 + torch.randperm(NEURONS - 60)[:20].int()
        return self.source.choice((None, chosen))

    def maybe(self, value):
        return self.source.choice((None, value))

    def linears(self, *shapes: tuple[int, int]) -> list:
        """Weights, scales, biases and bits, as the operations over several linear layers take them."""
        weights, scales = [self.data(*shape) for shape in shapes], [self.scales(*shape) for shape in shapes]
        return [weights, scales if self.bits else [], [self.maybe(self.floats(rows)) for rows, _ in shapes], self.bits]

    def attention(self) -> list:
        """Norms and projections of a layer."""
        q, k = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
        norms = [self.floats(HIDDEN), self.floats(HIDDEN)]
        if self.source.random() < 0.5:
            norms += [self.floats(HEAD_SIZE), self.floats(HEAD_SIZE)]
        biases = [torch.randn_like(norm) for norm in norms] if self.source.random() < 0.3 else []
        return [norms, biases, 1e-5, *self.linears((q, HIDDEN), (k, HIDDEN), (k, HIDDEN), (HIDDEN, q))]

    def threshold(self) -> float:
        return self.source.choice((-1.0, 0.0, 0.3))

    def attention_by_input(self) -> list:
        """Norms, and weights by input of q, k and v together and of o, for `add_layer_by_input`."""
        q = HEADS * HEAD_SIZE
        shapes = ((HIDDEN, q + 2 * KV_HEADS * HEAD_SIZE), (q, HIDDEN))
        weights, scales, columns = (
            [self.data(*shape) for shape in shapes],
            [self.scales(*shape) for shape in shapes],
            [torch.rand(outputs) for _, outputs in shapes],
        )
        packed = [scales, self.source.choice(([], columns))] if self.bits else [[], []]
        vectors = [part for shape in shapes for part in vectors_by_input(*shape)]
        return [*self.attention()[:3], weights, *packed, self.bits, vectors, [self.threshold(), self.threshold()]]

    def rope(self) -> list:
        angles = torch.rand(1, 1, HEAD_SIZE)
        return self.source.choice(([None, None], [angles.cos().to(self.dtype), angles.sin().to(self.dtype)]))

    def cache(self) -> Tensor:
        return self.floats(1, KV_HEADS, CAPACITY, HEAD_SIZE)


def vectors_by_input(inputs: int, outputs: int) -> list[Tensor]:
    """Mean, norm and constant of a layer by input."""
    return [torch.randn(inputs), torch.rand(inputs), torch.randn(outputs)]


def fitting_arguments(name: str, source: random.Random) -> list:
    """Arguments of an operation that fit. KeyError for an operation that is not known here."""
    make = Fitting(source, name.startswith("quant_") or name in ("quantize", "dequantize") or source.random() < 0.5)
    special = _special(make)
    if name in special:
        return special[name]()
    if not name.startswith("quant_"):
        make.bits = 0
    weight = make.data(NEURONS, HIDDEN)
    values = {
        **dict.fromkeys(("gate", "up", "down", "fc1", "fc2", "weight"), weight),
        **{f"{part}scales": make.scales(NEURONS, HIDDEN) for part in ("gate_", "up_", "down_", "fc1_", "fc2_", "")},
        **dict.fromkeys(("bias_gate", "bias_up", "bias1", "bias"), make.maybe(make.floats(NEURONS))),
        "x": make.floats(make.tokens, HIDDEN),
        "h": make.floats(make.tokens, NEURONS),
        "column_scales": make.maybe(torch.rand(HIDDEN)),
        "bits": make.bits,
        "prefix": source.choice((0, 40, 60)),
        "index": make.index(),
        "scale": torch.rand(NEURONS),
        "keep_count": source.choice((-1, 0, 10)),
        "threshold": 0.1,
        "activation": source.choice(("silu", "gelu", "gelu_tanh", "relu", "relu2")),
    }
    schema = getattr(torch.ops.partinfer, name).default._schema
    arguments = {argument.name: values[argument.name] for argument in schema.arguments}
    if arguments.get("keep_count", 0) > arguments.get("prefix", 0):
        arguments["keep_count"] = 0
    return list(arguments.values())


def _by_input(make: Fitting) -> list:
    scales = make.scales(HIDDEN, NEURONS) if make.bits else None
    columns = make.maybe(torch.rand(NEURONS)) if make.bits else None
    weight, vectors = make.data(HIDDEN, NEURONS), vectors_by_input(HIDDEN, NEURONS)
    return [make.floats(make.tokens, HIDDEN), weight, scales, columns, make.bits, vectors, make.threshold()]


def _special(make: Fitting) -> dict[str, Callable[[], list]]:
    """Operations whose arguments don't follow from their names."""
    planes = torch.randint(0, 256, (2, VOCABULARY, HIDDEN // 2), dtype=torch.uint8)
    eight, vector = torch.randint(-127, 128, (VOCABULARY, HIDDEN), dtype=torch.int8), make.floats(1, 1, HIDDEN)
    screened = ((planes, None), (planes[0], make.floats(VOCABULARY, HIDDEN)))

    def screened_linear() -> list:
        data, whole = make.source.choice(screened)
        parts = (data, make.scales(VOCABULARY, HIDDEN), torch.rand(HIDDEN // 32), whole)
        return [make.floats(make.tokens, HIDDEN), *parts, make.source.choice((0, 1, 5)), 1e-3, 1.0]

    def converted(out: bool) -> list:
        floats, data, scales = make.floats(NEURONS, HIDDEN), make.data(NEURONS, HIDDEN), make.scales(NEURONS, HIDDEN)
        return (
            [data, scales, make.bits, floats]
            if out
            else [floats, make.bits, make.maybe(torch.rand(HIDDEN)), data, scales]
        )

    def attention_step() -> list:
        delta, layer = make.maybe(make.floats(1, 1, HIDDEN)), make.attention()
        where = (*make.rope(), make.cache(), make.cache(), LENGTH)
        return [vector, delta, *layer, *where, make.source.choice((0, 2)), 0.25]

    def dense_ffn() -> list:
        return [vector, *make.linears((NEURONS, HIDDEN), (NEURONS, HIDDEN), (HIDDEN, NEURONS)), "silu"]

    counts, priority = torch.randint(0, 9, (NEURONS,)), torch.randperm(NEURONS)
    return {
        "screened_linear": screened_linear,
        "join_planes": lambda: [planes, eight],
        "split_planes": lambda: [eight, planes],
        "quantize": lambda: converted(False),
        "dequantize": lambda: converted(True),
        "attention_step": attention_step,
        "by_input": lambda: _by_input(make),
        "dense_ffn": dense_ffn,
        "add_norm": lambda: [
            vector,
            make.floats(1, 1, HIDDEN),
            make.floats(HIDDEN),
            make.maybe(make.floats(HIDDEN)),
            1e-5,
        ],
        "core_counts": lambda: [make.floats(make.tokens, NEURONS), 0.4],
        "most_marked": lambda: [counts, priority, 10, 20],
        "sum_of_squares": lambda: [make.floats(make.tokens, NEURONS)],
        "typical_scale": lambda: [torch.rand(NEURONS), 5, make.maybe(torch.rand(NEURONS)), 3, torch.rand(NEURONS)],
        "unpack_blocks": lambda: [torch.zeros(6, 2 * 144, dtype=torch.uint8), "Q4_K", torch.zeros(6, 512)],
        "timed_read": lambda: [make.floats(NEURONS, HIDDEN)],
        "advise_huge_pages": lambda: [make.floats(NEURONS, HIDDEN)],
        "watch_mapping": lambda: [torch.zeros(4096, dtype=torch.uint8)],
        "forget_mapping": lambda: [0],
        "variants": list,
        "variant": list,
        "set_variant": lambda: [torch.ops.partinfer.variant()],
    }


def _layer_step(make: Fitting) -> tuple[str, list]:
    """The call that adds a layer, by output or by input."""
    window = make.source.choice((0, 2))
    if make.source.random() < 0.7:
        return "add_layer", [*make.attention(), window, 0.25, HEAD_SIZE]
    return "add_layer_by_input", [*make.attention_by_input(), window, 0.25, HEAD_SIZE, KV_HEADS]


def _by_input_of_up(make: Fitting, weights: list[Tensor], scales: list[Tensor]) -> list:
    """Arguments of `set_active` about inputs of up; puts up by input among the weights, if it is to be."""
    if make.source.random() < 0.5:
        return [[], None, -1.0]
    weights[1] = make.data(HIDDEN, NEURONS)
    if make.bits:
        scales[1] = make.scales(HIDDEN, NEURONS)
    columns = make.maybe(torch.rand(NEURONS)) if make.bits else None
    return [vectors_by_input(HIDDEN, NEURONS), columns, make.threshold()]


def _on_disk(
    make: Fitting, number: int, up: Tensor, scales: Tensor | None, packed: list, choice: list, added: list
) -> tuple[str, list]:
    """The same layer with rows of gate and down that are read on demand."""
    bytes_of_both = 2 * (up[:1].nbytes + (0 if scales is None else scales[:1].nbytes))
    rows = loaded_rows(make.source, NEURONS, -(-bytes_of_both // UNIT) * UNIT)
    return ("set_active_on_disk", [number, rows, 0, up, scales, *packed, "silu", *choice, added])


def decoder_steps(source: random.Random) -> list[tuple[str, list]]:
    """The calls that make a decoder of a few layers and use it."""
    make = Fitting(source, source.random() < 0.5)
    layers = source.choice((1, 2, 3))
    steps = [_layer_step(make) for _ in range(layers)]
    for number in range(layers):
        if source.random() < 0.4:
            ffn = make.linears((NEURONS, HIDDEN), (NEURONS, HIDDEN), (HIDDEN, NEURONS))
            steps.append(("set_dense", [number, *ffn, "silu"]))
            continue
        gated = source.random() < 0.7
        weights, scales, biases, bits = make.linears(*[(NEURONS, HIDDEN)] * (3 if gated else 2))
        size = make.maybe(torch.rand(NEURONS))
        biases = [None if gated and size is not None else bias for bias in biases[:-1]] + [None]
        columns = make.maybe(torch.rand(HIDDEN)) if bits else None
        choice = [60, make.index(), size, source.choice((-1, 10)), 0.1]
        added = [make.floats(HIDDEN) for _ in range(source.randrange(3))]
        by_input = _by_input_of_up(make, weights, scales) if gated and size is not None else [[], None, -1.0]
        if by_input[0]:
            choice[0], choice[1] = NEURONS, None
        down = [make.maybe(torch.rand(NEURONS)) if size is not None else None, make.threshold()]
        arguments = [number, weights, scales, columns, biases, bits, "silu", *choice, added, *by_input, *down]
        steps.append(("set_active", arguments))
        if gated and size is not None and source.random() < 0.3:
            steps.append(
                _on_disk(make, number, weights[1], scales[1] if bits else None, [columns, bits], choice, added)
            )
        if steps[number][0] == "add_layer_by_input":
            steps.append(("set_input_thresholds", [number, make.threshold(), make.threshold()]))
    steps.append(("take_counts", []))
    steps.append(("set_norm", [make.floats(HIDDEN), make.maybe(make.floats(HIDDEN)), 1e-5]))
    planes, plane_scales = (
        torch.randint(0, 256, (2, VOCABULARY, HIDDEN // 2), dtype=torch.uint8),
        make.scales(VOCABULARY, HIDDEN),
    )
    weights, scales, biases, bits = make.linears((VOCABULARY, HIDDEN))
    ends = [weights, scales, bits, weights, scales, biases, bits, None, None, None]
    if source.random() < 0.4:
        screen = [planes, plane_scales, torch.rand(HIDDEN // 32)]
        ends = [[planes], [plane_scales], 8, [planes], [plane_scales], [None], 8, *screen]
    steps.append(("set_embedding_and_head", ends))
    caches = [[make.cache() for _ in range(layers)] for _ in range(2)]
    rope = make.rope()
    run = [0, layers, make.floats(1, 1, HIDDEN), make.maybe(make.floats(1, 1, HIDDEN)), *rope, *caches, LENGTH]
    steps.append(("run", run))
    needed = [source.choice((0, 1, 5)), 1e-3, 1.0]
    steps.append(("logits", [7, make.maybe(make.floats(HIDDEN)), *rope, *caches, LENGTH, *needed]))
    return steps


def changed_tensor(values: Tensor, source: random.Random):
    """Another type, shape, layout, device or content."""
    if _is_freed(values):
        return values  # PyTorch itself would read what is not there
    last = values.dim() - 1
    freed = values.clone(memory_format=torch.contiguous_format)
    freed.untyped_storage().resize_(source.choice((0, max(0, values.nbytes // 2))))
    changes = [
        lambda: values.to(source.choice(TYPES)),
        lambda: values.new_zeros([source.choice((0, 1, n, n + 1, n - 1 if n else 0, 2 * n)) for n in values.shape]),
        lambda: values.new_zeros(
            source.choice(((), (0,), (1,), (3, 0), (0, 64), (64, 0), (1, 0, 6, 16), (2, 2, 2, 2, 2)))
        ),
        lambda: values.transpose(0, last).contiguous() if last > 0 else values[None],
        lambda: values.transpose(0, last) if last > 0 else values[:, None],
        lambda: values.unsqueeze(source.randrange(last + 2)),
        lambda: values.flatten() if source.random() < 0.5 else values.reshape(2, -1),
        lambda: values[..., ::2],
        lambda: values[..., 1:],
        lambda: values[1:],
        lambda: values[:1].expand(values.shape) if values.numel() else values,
        lambda: (
            torch.as_strided(values, values.shape, [source.choice((0, 1, 2)) for _ in values.shape])
            if 2 * sum(values.shape) < values.numel()
            else values
        ),
        lambda: values.to("meta"),
        lambda: values.to_sparse() if values.dim() else values,
        lambda: freed,
        lambda: values.detach().requires_grad_() if values.is_floating_point() else values,
        lambda: values.clone().fill_(source.choice((0, 1, -1, 127, 10**6, -(10**6), 2**31 - 1, math.nan, math.inf))),
    ]
    return source.choice(changes)()


def _is_freed(values: Tensor) -> bool:
    plain = values.device.type == "cpu" and values.layout == torch.strided and values.is_contiguous()
    return plain and values.untyped_storage().nbytes() < values.nbytes


def changed(value, source: random.Random):
    """Something else in the place of an argument, mostly of its kind."""
    if source.random() < 0.05:
        return source.choice(OTHERS)
    if isinstance(value, Tensor):
        try:
            return changed_tensor(value, source)
        except (RuntimeError, IndexError, OverflowError):  # PyTorch can't change this one so
            return None
    if isinstance(value, list):
        return _changed_list(value, source)
    if isinstance(value, float):
        return source.choice(REALS)
    if isinstance(value, int):
        return source.choice((*INTEGERS, value + 1, value - 1, 2 * value, 4, 8))
    if isinstance(value, str):
        return source.choice(TEXTS)
    return source.choice((None, torch.zeros(HIDDEN), torch.zeros(NEURONS), torch.zeros(NEURONS, dtype=torch.int32)))


def _changed_list(value: list, source: random.Random) -> list:
    value = list(value)
    kind = source.random()
    if not value or kind < 0.1:
        return source.choice(([], [None], [torch.zeros(HIDDEN)], [torch.zeros(HIDDEN)] * 3, value + value))
    place = source.randrange(len(value))
    if kind < 0.8:
        value[place] = changed(value[place], source)
    elif kind < 0.9:
        del value[place]
    else:
        other = source.randrange(len(value))
        value[place], value[other] = value[other], value[place]
    return value


def changed_arguments(arguments: list, source: random.Random) -> list:
    arguments = list(arguments)
    for _ in range(source.choice((1, 1, 2, 3))):
        if arguments:
            place = source.randrange(len(arguments))
            arguments[place] = changed(arguments[place], source)
    return arguments


def changed_steps(steps: list[tuple[str, list]], source: random.Random) -> list[tuple[str, list]]:
    """Steps with other arguments, left out, twice or in another order."""
    steps = list(steps)
    for _ in range(source.choice((1, 1, 2, 3))):
        place, other, kind = source.randrange(len(steps)), source.randrange(len(steps)), source.random()
        name, arguments = steps[place]
        if kind < 0.6:
            steps[place] = name, changed_arguments(arguments, source)
        elif kind < 0.75:  # what was set before must still hold if this is refused
            steps.insert(place + 1, (name, changed_arguments(arguments, source)))
        elif kind < 0.9 and len(steps) > 1:
            del steps[place]
        else:
            steps[place], steps[other] = steps[other], steps[place]
    return steps


def outcome(call: Callable[[], object]) -> str:
    """`done`, `refused`, or a foreign exception."""
    try:
        call()
    except REFUSED:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "done"


def make_call(kind: str, seed: int, fitting: bool = False) -> str:
    """Make the call, or sequence of calls, that follows from a seed. fitting: with arguments that fit."""
    source = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    if kind not in (DECODER, ROWS):
        arguments = fitting_arguments(kind, source)
        if not fitting:
            arguments = changed_arguments(arguments, source)
        operation = getattr(torch.ops.partinfer, kind)
        return outcome(lambda: operation(*arguments))
    steps = decoder_steps(source) if kind == DECODER else rows_steps(source, NEURONS, 2 * UNIT)
    steps = steps if fitting else changed_steps(steps, source)
    decoder, outcomes = torch.classes.partinfer.Decoder(), []
    if kind == ROWS:
        made = next((given for name, given in steps if name == "RowsOnDisk"), [])
        steps = [step for step in steps if step[0] != "RowsOnDisk"]
        try:
            decoder = torch.classes.partinfer.RowsOnDisk(*made)
        except REFUSED:
            return "refused"
    while steps:  # arguments are let go of as soon as they were given
        name, arguments = steps.pop(0)
        outcomes.append(outcome(lambda name=name, arguments=arguments: getattr(decoder, name)(*arguments)))
        del arguments
        gc.collect(0)
    return next(
        (result for result in outcomes if result not in ("done", "refused")),
        min(outcomes, key=("refused", "done").index),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300, help="calls of each kind")
    parser.add_argument("--kinds", nargs="+", help="default: all")
    parser.add_argument("--after", nargs=2, metavar=("KIND", "NUMBER"), help="go on behind this call")
    parser.add_argument("--library", help="another library of the operations, as tests/fuzz/sanitized.py builds it")
    parser.add_argument("--progress", default=os.devnull, help="a file that says which call is being made")
    parser.add_argument("--variant", help="the kernels to use")
    options = parser.parse_args()
    load(options.library)
    if options.variant:
        torch.ops.partinfer.set_variant(options.variant)
    torch.set_num_threads(2)
    # PyTorch prints an argument of a wrong type, and would read the memory of one that has none any more
    torch.Tensor.__repr__ = lambda values, **_: f"Tensor of {tuple(values.shape)}"
    kinds = options.kinds or [*operations(), DECODER, ROWS]
    first = 0
    if options.after:
        kinds, first = kinds[kinds.index(options.after[0]) :], int(options.after[1]) + 1
    progress = os.open(options.progress, os.O_WRONLY | os.O_CREAT)
    for kind in kinds:
        outcomes = Counter()
        for number in range(first, options.count):
            os.pwrite(progress, f"{kind} {number}".ljust(80).encode(), 0)
            outcomes[make_call(kind, options.seed * 10**6 + number)] += 1
        first = 0
        fits = outcome(lambda kind=kind: _must_fit(make_call(kind, options.seed, fitting=True)))
        print(json.dumps({"kind": kind, "fitting": fits, "outcomes": outcomes}), flush=True)


def _must_fit(result: str) -> None:
    if result != "done":
        raise AssertionError(result)


def load(library: str | None) -> None:
    """Load the operations, but not what answers for them on the meta device, for torch.compile."""
    from transformers_patches.kernels import build

    torch.ops.load_library(library or build.find_library() or build.build())


if __name__ == "__main__":
    main()
