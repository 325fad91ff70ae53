"""Blocks of GGUF files, unpacked by the kernels as the gguf package unpacks them."""

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from transformers_patches import kernels

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(autouse=True)
def native():
    if not kernels.available():
        pytest.skip(f"no native kernels: {kernels.why_not()}")


def packed_rows(kind: GGMLQuantizationType, rows: int, blocks: int) -> np.ndarray:
    """Any bytes, but for scales that are finite: they are float16 at places that differ from kind to kind."""
    size = GGML_QUANT_SIZES[kind][1]
    random = np.random.default_rng(0).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    odd = random.reshape(rows, blocks, size)
    for place in (1, 3, size - 1):  # high bytes of such scales: exponents that are neither inf nor nan
        odd[:, :, place] &= 0xBB
    return random


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("name", KINDS)
def test_as_the_gguf_package(name, rows):
    kind = GGMLQuantizationType[name]
    values, nbytes = GGML_QUANT_SIZES[kind]
    packed = packed_rows(kind, rows, 4)
    ours = kernels.unpack_blocks(torch.from_numpy(packed), name, 4 * values)
    expected = torch.from_numpy(np.ascontiguousarray(dequantize(packed, kind)))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_other_kinds_are_left_to_the_package():
    assert kernels.unpack_blocks(torch.zeros(2, 84, dtype=torch.uint8), "Q2_K", 256) is None


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not make up"):
        kernels.unpack_blocks(torch.zeros(2, 19, dtype=torch.uint8), "Q4_0", 32)
    with pytest.raises(ValueError, match="does not make up"):
        kernels.unpack_blocks(torch.zeros(2, 18, dtype=torch.uint8), "Q4_0", 64)
