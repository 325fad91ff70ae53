"""Tiny random models of every family, as checkpoint folders, and the real demo model."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model_table import COMMON
from transformers_patches.neurons.neuron_file import NeuronFile

# no time limit per example (the machine may be busy), no database folder, the same examples on every run
settings.register_profile("project", deadline=None, database=None, derandomize=True)
settings.load_profile("project")

ROOT = Path(__file__).parent.parent
DEMO_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

LAYERS, INTERMEDIATE = 6, 80
HIDDEN, VOCABULARY = COMMON["hidden_size"], COMMON["vocab_size"]
_COMMON = {**COMMON, "num_hidden_layers": LAYERS, "intermediate_size": INTERMEDIATE}
_OPT = {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim", "initializer_range")}
FAMILY_CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _COMMON),
    "llama-mlp-bias": ("llama", {**_COMMON, "mlp_bias": True}),
    "smollm2": ("llama", {**_COMMON, "tie_word_embeddings": True}),
    "mistral": ("mistral", _COMMON),
    "qwen2": ("qwen2", _COMMON),
    "qwen3": ("qwen3", _COMMON),
    "gemma": ("gemma", _COMMON),
    "gemma2": ("gemma2", _COMMON),
    "gemma3": ("gemma3_text", _COMMON),
    "opt": ("opt", {**_OPT, "ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN, "init_std": 0.2}),
}
FAMILIES = list(FAMILY_CONFIGS)


def make_tiny_checkpoint(folder: Path, family: str, **save_options) -> Path:
    """Save a seeded random model of a family; biases and norms are random too, so that nothing is left untested."""
    model_type, options = FAMILY_CONFIGS[family]
    torch.manual_seed(FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options), dtype=torch.float32)
    norm_center = 0.0 if model_type.startswith("gemma") else 1.0  # Gemma's norms add 1 to their weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 0.0 if name.endswith("bias") else norm_center
                parameter.copy_(torch.randn_like(parameter) * 0.1 + center)
    model.save_pretrained(folder, **save_options)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: make_tiny_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tiny_checkpoints) -> Path:
    """The checkpoint folder of each family in turn."""
    return tiny_checkpoints[request.param]


def random_neuron_file(seed: int, layers: int = LAYERS, size: int = INTERMEDIATE) -> NeuronFile:
    generator = torch.Generator().manual_seed(seed)
    ranking = torch.stack([torch.randperm(size, generator=generator) for _ in range(layers)]).to(torch.int32)
    return NeuronFile(ranking)


@pytest.fixture
def neuron_files() -> dict[str, NeuronFile]:
    """A data set's and a model's ranking for the tiny models, as load_model takes them."""
    return {"dataset_neurons": random_neuron_file(1), "model_neurons": random_neuron_file(2)}


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own with room for half a megabyte; skipped where nobody may mount one."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no room on a folder's disk, which is a small one."""
    with suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        for _ in range(10**4):
            file.write(bytes(1024))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    if not DEMO_MODEL.is_dir():
        pytest.skip(f"the demo model is not there: python download.py --model_name smollm2-135m ({DEMO_MODEL.name})")
    return DEMO_MODEL
