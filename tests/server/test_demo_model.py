"""The demo model, served: its tokens are partinfer.py's, also where a prompt's beginning is reused."""

from __future__ import annotations

import json

import openai
import pytest

import partinfer
from server.app import Service
from server.serve import make_answering
from tests.conftest import DEMO_MODEL, ROOT
from tests.server.conftest import arguments, running
from transformers_patches.generation.options import generation_options
from transformers_patches.plan.neuron_files import settings_for

pytestmark = pytest.mark.model
QUESTION = "Why is the sky blue?"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")[:1500]  # some 400 tokens


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def served(dtype):
    if not DEMO_MODEL.is_dir():
        pytest.skip("the demo model is not there: python download.py --model_name smollm2-135m")
    given = arguments("--checkpoint_path", str(DEMO_MODEL), "--cpu_only", "--dtype", dtype)
    settings = settings_for(DEMO_MODEL, {"dtype": dtype, "device": "cpu"}, "QA")
    made, names = make_answering(DEMO_MODEL, settings, generation_options(given), given)
    with running(Service(made, names)) as server:
        yield server


def script(capsys, *flags: str) -> str:
    command = ["--checkpoint_path", str(DEMO_MODEL), "--cpu_only", "--num_tokens_to_generate", "24", "--json"]
    assert partinfer.main([*command, "--quiet", *flags]) == 0
    return json.loads(capsys.readouterr().out)["text"]


def test_tokens_are_the_scripts(served, dtype, capsys):
    def scripts(*flags: str) -> str:
        return script(capsys, "--dtype", dtype, *flags)

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:

        def answer(text: str, **more) -> tuple[str, int]:
            messages = [{"role": "user", "content": text}]
            made = client.chat.completions.create(model=DEMO_MODEL.name, messages=messages, max_tokens=24, **more)
            return made.choices[0].message.content, made.usage.prompt_tokens_details.cached_tokens

        assert [answer(QUESTION) for _ in range(2)] == [(scripts("--prompt", QUESTION), reused) for reused in (0, 20)]
        first, second = f"{TEXT}\nWhat is this?", f"{TEXT}\nWhich models does it run?"
        expected = scripts("--prompt", second)
        assert answer(second) == (expected, 20)  # the system prompt that the template adds
        assert answer(second) == (expected, 256)
        assert answer(first) == (scripts("--prompt", first), 256)
        assert answer(second, extra_body={"partinfer": {"max_loss": 0.3}})[0] == scripts(
            "--prompt", second, "--max_loss", "0.3"
        )
        assert answer(second) == (expected, 256)
        flags = ("--sampling-method", "top-p", "--temperature", "0.8", "--seed", "3")
        assert answer(QUESTION, temperature=0.8, seed=3)[0] == scripts("--prompt", QUESTION, *flags)


def test_a_chats_next_turn_is_as_without_the_turns_before(served):
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": QUESTION}]
    first = served.chat("", messages=messages, max_tokens=16)["choices"][0]["message"]
    turn = [*messages, first, {"role": "user", "content": "And at night?"}]
    del first["refusal"]
    reused = served.chat("", messages=turn, max_tokens=24)
    assert reused["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
    served.service.answering.prefixes._prompts.clear()
    alone = served.chat("", messages=turn, max_tokens=24)
    assert alone["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert reused["choices"] == alone["choices"]


def test_what_a_token_reads_is_less_than_dense(served):
    sparse = served.chat(QUESTION, max_tokens=16, partinfer={"max_loss": 0.3})["partinfer"]
    dense = served.chat(QUESTION, max_tokens=16, partinfer={"method": "dense"})["partinfer"]
    assert sparse["bytes_per_token"] < 0.9 * dense["bytes_per_token"]
    assert dense["ffn_bytes_share"] == 1.0
