"""Changed descriptions of packs: the pack gives the same logits, or is refused in one line."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.conftest import make_tiny_checkpoint
from tests.transformers_patches.made_up_files import with_statistics
from tests.transformers_patches.model_passes import logits
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.weights.pack_schema import CHECKSUM, seal

KINDS = ("llama float32", "llama int8", "opt int4", "opt bfloat16", "llama int8 up", "llama bfloat16 up")
NEURONS = with_statistics(1)
NUMBERS = (-1, 0, 1, 2, 3, 7, 64, 80, 96, 2**31, 2**63, 10**30, -(2**63), 0.5, 1e308)
VALUES = (*NUMBERS, None, True, False, "", "rows", "columns", "whole", "int8", "int4", "float32", "auto", "x" * 500)
OTHERS = ([], {}, [1], [[]], [64, 96], [96, 64], {"half": 0}, {"first": "x", "half": 1})


def settings(kind: str) -> PartInferConfig:
    """up: the native kernels choose by up, so that rows of gate and down alternate in the pack."""
    options = {"kernels": "native", "selection": "up"} if kind.endswith(" up") and kernels.available() else {}
    return PartInferConfig(start_num=1, end_num=4, device="cpu", dtype=kind.split()[1], sparsity=0.6, **options)


def outcome(folder: Path, kind: str, expected: torch.Tensor) -> str:
    """`same`, `refused`, `wrong` or the foreign exception."""
    try:
        result = logits(load_model(folder, settings(kind)))
    except PartInferError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"long message: {error}"[:300]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "same" if torch.equal(result, expected) else "wrong"


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths to all that lies in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in children for found in ((*path, key), *places(child, (*path, key)))]


def changed_value(content: dict, source: random.Random, under: tuple[str, ...]) -> dict:
    """Another value somewhere, a key less, another's name, two values exchanged."""
    content = json.loads(json.dumps(content))
    for _ in range(source.choice((1, 1, 1, 2))):
        *path, key = source.choice(
            [path for path in places(content) if not under or (path[0] in under and len(path) > 1)]
        )
        parent = content
        for step in path:
            parent = parent[step]
        kind = source.choice(("value", "value", "digit", "remove", "rename", "exchange"))
        if kind == "digit" and type(parent[key]) is int:
            parent[key] += source.choice((-1, 1))
        elif kind == "remove":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[source.choice((str(key)[:-1], str(key) + "s", source.choice(list(parent))))] = parent.pop(key)
        elif kind == "exchange":
            other = source.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent[key] = source.choice((*VALUES, *OTHERS))
    return content


def changed_text(text: str, source: random.Random) -> bytes:
    """Other characters, a cut end, a doubled part, nested ever deeper."""
    place = source.randrange(len(text))
    kind = source.choice(("digit", "character", "cut", "double", "deep", "long number", "byte", "space"))
    if kind == "digit":
        digits = [at for at, character in enumerate(text) if character.isdigit()]
        at = source.choice(digits)
        return (text[:at] + str((int(text[at]) + source.randrange(1, 10)) % 10) + text[at + 1 :]).encode()
    part = {
        "character": source.choice('{}[]",:0 xe-'),
        "cut": "",
        "double": text[place : place + 40] * 2,
        "deep": "[" * 100_000,
        "long number": "9" * 5000,
        "byte": "",
        "space": " ",
    }[kind]
    rest = "" if kind == "cut" else text[place + (1 if kind == "character" else 0) :]
    return text[:place].encode() + (b"\xff" if kind == "byte" else part.encode()) + rest.encode()


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """A pack of each kind, with its logits."""
    root, made = tmp_path_factory.mktemp("packs"), {}
    for kind in KINDS:
        family = kind.split()[0]
        if not (root / family).exists():
            make_tiny_checkpoint(root / family, family)
        write_pack(root / family, root / kind, settings(kind), NEURONS)
        pairs = sum("pair" in e for e in json.loads((root / kind / "pack.json").read_text())["packed"].values())
        assert pairs > 0 or not kind.endswith(" up") or not kernels.available()
        made[kind] = root / kind, logits(load_model(root / kind, settings(kind)))
    return made


def campaign(packs: dict, folder: Path, count: int, seed: int, *, sealed: bool) -> Counter:
    """sealed: the checksum is made right again, or as in older versions left out, and only the weights' part is changed."""
    outcomes = Counter()
    for number in range(count):
        source = random.Random(f"{seed} {number} {sealed}")
        kind = source.choice(KINDS)
        pack, expected = packs[kind]
        if not (folder / kind).exists():
            shutil.copytree(pack, folder / kind)
        text = (pack / "pack.json").read_text()
        if sealed:
            content = changed_value(json.loads(text), source, ("packed", "elsewhere"))
            old = {name: value for name, value in content.items() if name != CHECKSUM} | {"version": 6}
            changed = json.dumps(source.choice((seal(content), old))).encode()
        elif source.random() < 0.5:
            changed = changed_text(text, source)
        else:
            changed = json.dumps(changed_value(json.loads(text), source, ())).encode()
        (folder / kind / "pack.json").write_bytes(changed)
        result = outcome(folder / kind, kind, expected)
        outcomes[result if result in ("same", "refused") else f"{number}: {result}"] += 1
    return outcomes


def check(outcomes: Counter, count: int) -> None:
    assert set(outcomes) <= {"same", "refused"}
    assert outcomes["refused"] > count / 2, outcomes


@pytest.mark.parametrize("sealed", [False, True])
def test_changed_descriptions(packs, tmp_path, sealed):
    check(campaign(packs, tmp_path, 300, 0, sealed=sealed), 300)


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True])
def test_many_changed_descriptions(packs, tmp_path, sealed):
    check(campaign(packs, tmp_path, 10_000, 1, sealed=sealed), 10_000)
