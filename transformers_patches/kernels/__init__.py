"""Matrix-vector products for decoding on CPUs: the sparse FFN, linear layers, float and quantised weights.

Native kernels where they can be compiled, plain PyTorch elsewhere: operations.py has all operations and decides. They
are made for 1 to 8 tokens; more give the same results, but PyTorch's matrix products are then faster. docs/kernels.md
explains how they work.
"""

from transformers_patches.kernels.blockwise import multiplies_fast
from transformers_patches.kernels.decoder import Decoder
from transformers_patches.kernels.experts import ExpertTable
from transformers_patches.kernels.formats import FORMATS, GROUP, INT4, INT8, WeightFormat, format_named
from transformers_patches.kernels.layer import ActiveNeurons, AttentionLayer, ByInput, Projections
from transformers_patches.kernels.library import available, use_variant, variant, variants, why_not
from transformers_patches.kernels.operations import (
    add_norm,
    advise_huge_pages,
    attention_step,
    bandwidth_probe,
    by_input,
    combine,
    core_counts,
    dense_ffn,
    dequantize,
    ffn,
    ffn_on_device,
    join_planes,
    linear,
    most_marked,
    project,
    quantize,
    screened_linear,
    split_planes,
    stays_on_device,
    sum_of_squares,
    typical_scale,
    unpack_blocks,
    watch_mapping,
    weighted_rows,
)
from transformers_patches.kernels.quantization import QuantizedTensor, Weight
from transformers_patches.kernels.rows_on_disk import UNIT as RECORD_UNIT
from transformers_patches.kernels.rows_on_disk import FetchCounts, RecordPlace, RowsOnDisk
from transformers_patches.kernels.screening import SOFTMAX, Needed, Screen

__all__ = [
    "FORMATS",
    "GROUP",
    "INT4",
    "INT8",
    "SOFTMAX",
    "ActiveNeurons",
    "AttentionLayer",
    "ByInput",
    "Decoder",
    "ExpertTable",
    "FetchCounts",
    "Needed",
    "Projections",
    "QuantizedTensor",
    "RECORD_UNIT",
    "RecordPlace",
    "RowsOnDisk",
    "Screen",
    "Weight",
    "WeightFormat",
    "add_norm",
    "advise_huge_pages",
    "attention_step",
    "available",
    "bandwidth_probe",
    "by_input",
    "combine",
    "core_counts",
    "dense_ffn",
    "dequantize",
    "ffn",
    "ffn_on_device",
    "format_named",
    "join_planes",
    "linear",
    "most_marked",
    "multiplies_fast",
    "project",
    "quantize",
    "screened_linear",
    "split_planes",
    "stays_on_device",
    "sum_of_squares",
    "typical_scale",
    "unpack_blocks",
    "use_variant",
    "variant",
    "variants",
    "watch_mapping",
    "weighted_rows",
    "why_not",
]
