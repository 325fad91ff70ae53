"""OpenMP that gives fewer threads than PyTorch counts on is noticed, before a product is wrong."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from transformers_patches.errors import PartInferError
from transformers_patches.load import threads
from transformers_patches.load.threads import check_threads

CPU = torch.device("cpu")
PROGRAM = """
import torch
from transformers_patches.load.threads import check_threads
check_threads(torch.device("cpu"), torch.bfloat16)
print(torch.get_num_threads())
"""


@pytest.fixture(autouse=True)
def two_threads():
    """What PyTorch counts on in these tests; afterwards what it did before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.skipif(sys.platform != "linux", reason="asks the OpenMP library that PyTorch brings for Linux")
@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, 2),
        ({"OMP_THREAD_LIMIT": "2"}, 2),
        ({"OMP_THREAD_LIMIT": "1"}, 1),
        ({"OMP_DYNAMIC": "true"}, 1),
        ({"OMP_MAX_ACTIVE_LEVELS": "0"}, 1),
    ],
)
def test_no_more_threads_than_openmp_gives(environment, expected):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "2"} | environment,
        check=True,
    )
    assert ended.stdout == f"{expected}\n"
    said = f"all of the 2 threads that PyTorch counts on: computing with {expected}"
    assert ended.stderr.count("\n") == (expected < 2)
    assert (said in ended.stderr) == (expected < 2)


def test_wrong_products_lower_the_number_of_threads(monkeypatch, caplog):
    monkeypatch.setattr(threads, "_product_is_right", lambda _dtype: torch.get_num_threads() < 2)
    with caplog.at_level(logging.WARNING):
        check_threads(CPU, torch.bfloat16)
    assert torch.get_num_threads() == 1
    assert "computing with 1" in caplog.text


def test_products_that_are_wrong_with_one_thread_are_refused(monkeypatch):
    monkeypatch.setattr(threads, "_product_is_right", lambda _dtype: False)
    with pytest.raises(PartInferError, match="use --dtype float32"):
        check_threads(CPU, torch.bfloat16)
    check_threads(CPU, torch.float32)
    check_threads(torch.device("cuda"), torch.bfloat16)


def test_a_wrong_part_of_a_product_is_seen(monkeypatch):
    def partly(x, weight):
        result = x @ weight.T
        result[-1, threads.OUTPUTS // 2 :] = float("nan")
        return result

    assert threads._product_is_right(torch.bfloat16)
    monkeypatch.setattr(torch.nn.functional, "linear", partly)
    assert not threads._product_is_right(torch.bfloat16)
