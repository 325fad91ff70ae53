"""`from transformers_patches import …`: loading by name, whole answers, answers in pieces, and the README's example."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

import partinfer
from tests.conftest import DEMO_MODEL, ROOT, make_tiny_checkpoint, random_neuron_file
from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches import GenerationResult, PartInferConfig, PartInferError, generate, load_model, stream

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}a:"
LAYERS = {"start_num": 1, "end_num": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models/tiny-chat, models/tiny-base, and neuron files of the first."""
    root = tmp_path_factory.mktemp("home")
    for name, template in (("tiny-chat", CHAT_TEMPLATE), ("tiny-base", None)):
        make_tiny_checkpoint(root / "models" / name, "llama")
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(root / "models" / name)
    random_neuron_file(1).save(root / "neuron_files" / "tiny-chat" / "qa.safetensors")
    return root


@pytest.fixture(scope="module")
def model(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return load_model("tiny-chat", PartInferConfig(**LAYERS))


def test_a_name_is_enough_and_the_answer_is_that_of_the_script(model, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    given = ["--model_name", "tiny-chat", "--prompt", "hi", "--num_tokens_to_generate", "6", "--json", "--cpu_only"]
    assert partinfer.main([*given, "--start_num", "1", "--end_num", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    result = generate(model, "hi", max_new_tokens=6)
    assert isinstance(result, GenerationResult)
    assert result.text == report["text"]
    assert result.prompt_tokens == report["prompt_tokens"] == len("u:hi\na:")
    assert model.loaded.plan.loaded_fraction == pytest.approx(0.7)
    assert model.loaded.bytes_fraction() == report["computed_neurons_percent"]


def test_messages_are_taken_as_they_are(model, home):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "?"},
    ]
    assert generate(model, chat, max_new_tokens=2).prompt_tokens == len("u:hi\na:yes\nu:?\na:")
    base = load_model(home / "models" / "tiny-base", PartInferConfig(method="dense", device="cpu"))
    assert generate(base, "hi", max_new_tokens=2).prompt_tokens > len("Question: hi\nAnswer:")  # worked examples
    with pytest.raises(PartInferError, match="messages need a model with a chat template"):
        generate(base, chat)


@pytest.fixture
def endless(model, monkeypatch):
    """The model without its end token: it answers until it is told to stop."""
    monkeypatch.setattr(model.loaded.model.generation_config, "eos_token_id", None)
    return model


def test_pieces_are_the_answer_and_the_result_is_the_value(endless):
    sampled = {"sampling": "top-p", "temperature": 3.0, "max_new_tokens": 120}
    torch.manual_seed(0)
    whole, pieces = generate(endless, "hi there", **sampled), []
    torch.manual_seed(0)
    answer = stream(endless, "hi there", **sampled)
    while True:
        try:
            pieces.append(next(answer))
        except StopIteration as end:
            result = end.value
            break
    assert len(pieces) > 1
    assert "".join(pieces) == result.text == whole.text
    assert result.token_ids == whole.token_ids
    assert result.finish_reason == whole.finish_reason


@pytest.mark.parametrize("how", ["close", "interrupt"])
def test_an_answer_that_is_not_wanted_any_more_ends_and_leaves_no_trace(endless, how):
    before = generate(endless, "hi", max_new_tokens=8)
    answer = stream(endless, "a much longer question", max_new_tokens=200, sampling="top-p", temperature=3.0)
    next(answer)
    with pytest.raises(PartInferError, match="giving another answer"):
        generate(endless, "hi")
    with pytest.raises(PartInferError, match="giving another answer"):
        next(stream(endless, "hi"))
    if how == "close":
        answer.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
    tokens = sum(layer.counters.tokens for layer in endless.loaded.state.layers) / len(endless.loaded.state.layers)
    assert tokens < 199
    assert generate(endless, "hi", max_new_tokens=8).token_ids == before.token_ids


def test_what_goes_wrong_reaches_the_reader(model):
    with pytest.raises(PartInferError, match="max_new_tokens|num_tokens_to_generate must be at least 1"):
        stream(model, "hi", max_new_tokens=0)
    answer = stream(model, "x" * 300)
    with pytest.raises(PartInferError, match="the model's context is 256"):
        next(answer)
    assert generate(model, "hi", max_new_tokens=2).generated_tokens


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("opt-6.7b", {}, "no model at models/opt-6.7b: fetch it"),
        ("tiny-base", {"settings": PartInferConfig()}, "no neuron files for tiny-base"),
        ("tiny-chat", {"task_type": "chess"}, "task_type must be one of QA"),
    ],
)
def test_what_is_missing_is_one_line(home, monkeypatch, name, options, message):
    monkeypatch.chdir(home)
    with pytest.raises(PartInferError, match=message):
        load_model(name, **options)


def in_a_fresh_process(program: str, folder=ROOT) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=True
    ).stdout


def test_importing_the_package_is_cheap_and_generate_stays_the_function():
    program = """
import sys
import transformers_patches
print({"torch", "transformers"} & sys.modules.keys() or "cheap")
from transformers_patches import PartInferConfig, PartInferError, load_model, generate
import transformers_patches.generation.generate
from transformers_patches import generate as again
print(callable(generate) and again is generate)
print(hasattr(transformers_patches, "nonsense"), "stream" in dir(transformers_patches))
"""
    assert in_a_fresh_process(program).split() == ["cheap", "True", "False", "True"]


def readme_example() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)


def test_the_readmes_example_is_short():
    assert len([line for line in readme_example().splitlines() if line.strip()]) == 6


@pytest.mark.model
def test_the_readmes_example_runs_as_written():
    if not DEMO_MODEL.is_dir():
        pytest.skip("the demo model is not there: python download.py --model_name smollm2-135m")
    printed = in_a_fresh_process(readme_example())
    assert len(printed.split()) > 20
    assert "tokens/s" in printed


def test_without_neuron_files_everything_is_loaded(home, monkeypatch):
    monkeypatch.chdir(home)
    base = load_model("tiny-base")
    assert base.loaded.plan.loaded_fraction == 1.0
    assert base.loaded.settings.sparsity == 0.7
    assert generate(base, "hi", max_new_tokens=2).generated_tokens
