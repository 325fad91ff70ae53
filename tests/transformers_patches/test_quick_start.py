"""What is put off when a command begins: models are the same without it, and it is there for whoever asks."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from transformers_patches import quick_start
from transformers_patches.structure.empty_model import built, without_memory

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
PROGRAM = f"""
import gc, json, sys
from transformers_patches import quick_start
quick_start.begin()
quick_start.import_ahead()
without_torch, collects = "torch" not in sys.modules, gc.isenabled()
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
torch.manual_seed(3)
model = AutoModelForCausalLM.from_config(LlamaConfig(**{SIZES!r}))
logits = model(torch.arange(7)[None]).logits.sum().item()
put_off = [name for name in quick_start.MODULES if type(sys.modules.get(name)) is quick_start._Later]
import torch._dynamo
quick_start.imported()
ahead = [without_torch, collects, gc.isenabled(), gc.get_freeze_count() > 1000]
print(json.dumps([logits, put_off, "scipy.optimize" in sys.modules, torch._dynamo.config.disable, ahead]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[list]:
    """What the program says with an empty cache folder, and with the one that it has filled."""
    cache = tmp_path_factory.mktemp("cache")
    run = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "PARTINFER_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    made = [json.loads(subprocess.check_output(run, env=environment)) for _ in range(2)]
    assert len(list((cache / "imports").glob("transformers-*.json"))) == 1
    return made


def test_logits_are_those_with_everything_imported(answers):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    expected = model(torch.arange(7)[None]).logits.sum().item()
    assert [answer[0] for answer in answers] == pytest.approx([expected] * 2, abs=1e-4)


def test_what_is_not_needed_is_not_loaded_and_comes_when_asked_for(answers):
    for _, put_off, scipy, disabled, _ in answers:
        assert {"torch._dynamo", "torch._meta_registrations"} <= set(put_off)
        assert not scipy
        assert disabled is False  # torch._dynamo.config is the real one


def test_garbage_waits_while_all_is_imported(answers):
    for *_, (without_torch, collected, collects, frozen) in answers:
        assert without_torch  # its libraries are loaded by another thread meanwhile
        assert (collected, collects, frozen) == (False, True, True)


def test_a_program_that_never_began_is_left_alone():
    before = gc.isenabled(), gc.get_freeze_count()
    quick_start.import_ahead()
    quick_start.imported()
    assert (gc.isenabled(), gc.get_freeze_count()) == before


def test_kept_names_are_those_that_were_listed(tmp_path):
    names = {"llama": {frozenset({"torch"}): {"modeling_llama": {"A", "B"}}, frozenset(): {}}}
    assert quick_start._unpacked(json.loads(json.dumps(quick_start._packed(names)))) == names


def test_damaged_kept_names_are_listed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PARTINFER_CACHE", str(tmp_path))
    package = tmp_path / "site"
    (package / "transformers-1.dist-info").mkdir(parents=True)
    (package / "transformers-1.dist-info" / "RECORD").write_text("")
    models = package / "transformers" / "models"
    names = {"llama": {frozenset(): {"modeling_llama": {"A"}}}}
    assert quick_start._kept(lambda path: names)(models) == names
    kept = next((tmp_path / "imports").iterdir())
    for content in ("[[1]]", "{", kept.read_text()[:-4]):
        kept.write_text(content)
        assert quick_start._kept(lambda path: names)(models) == names


def test_parameters_have_no_memory_and_buffers_do():
    with without_memory():
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module[1].running_mean.tolist() == [0.0] * 4
    assert not nn.Linear(3, 4).weight.is_meta


def test_what_fails_without_kernels_for_meta_tensors_is_tried_again():
    calls = []

    def build():
        calls.append(1)
        if len(calls) == 1:
            raise NotImplementedError
        return nn.Linear(2, 2)

    assert built(build).weight.is_meta
    assert len(calls) == 2


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--model_name", "nobody/nothing"], "no model at"),
        (["--checkpoint_path", "HERE", "--loaded_neurons_percent", "0.5"], "no neuron files for"),
        (["--checkpoint_path", "HERE", "--dataset_neurons_filepath", "none.json"], "no neuron file at none.json"),
    ],
)
def test_what_is_known_without_torch_is_said_without_torch(tmp_path, monkeypatch, flags, says):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    program = (
        "import sys, partinfer\n"
        "try: partinfer.main()\n"
        "except Exception as error: print(error)\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, *(str(tmp_path) if flag == "HERE" else flag for flag in flags)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    out = subprocess.check_output(command, env=environment, text=True)
    assert says in out
    assert out.splitlines()[-1] == "[]"
