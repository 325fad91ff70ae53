"""What a bound on the memory of the process leaves for neurons."""

from dataclasses import replace

import pytest

from transformers_patches.errors import PartInferError
from transformers_patches.plan.memory import MB, MemoryNeeds

NEEDS = MemoryNeeds(
    runtime=300 * MB, fixed=400 * MB, neurons=200 * MB, scratch=10 * MB, cache=20 * MB, computing=30 * MB
)


def test_least_and_most():
    assert NEEDS.least == 760 * MB
    assert NEEDS.most == 950 * MB
    assert replace(NEEDS, neurons=0).least == 750 * MB  # no room for a layer is needed


@pytest.mark.parametrize(("limit", "share"), [(760, 0.0), (810, 0.25), (949, 0.945), (950, 1.0), (5000, 1.0)])
def test_what_is_left_is_for_neurons(limit, share):
    assert NEEDS.resident(limit * MB) == share


def test_too_little_is_refused_with_what_would_do():
    with pytest.raises(
        PartInferError, match=r"--memory 700M is not enough: at least 760M would do \(runtime 300, weights"
    ):
        NEEDS.resident(700 * MB)
