"""Chat templates are programs: whatever they do, it ends, and in one line if it is not a text."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ROOT
from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches.errors import PartInferError
from transformers_patches.generation import chat_template
from transformers_patches.generation.chat_template import apply_chat_template

LIMITS = resource.getrlimit(resource.RLIMIT_AS)
MESSAGES = [{"role": "user", "content": "hi"}]


def text_of(template: str) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return apply_chat_template(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('System role not supported') }}", "fails: System role not supported; --no_chat_template"),
        ("{% for m in messages %}{{ m['content'] }", "fails: unexpected '}'"),
        ("{{ nothing.at.all }}", "fails: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "fails: maximum recursion depth"),
        ("{{ 'a' * 1000000000000 }}", "takes more than 1 GiB of memory"),
        ("{% set a = 9 ** (9 ** 9) %}{{ a > 1 }}", "computes a power (**)"),
        ("{% for a in range(99999) %}{{ 'abc' * 200 }}{% endfor %}", "gives more than 10000000 characters"),
    ],
)
def test_templates_that_give_no_text_say_why(template, message):
    with pytest.raises(PartInferError) as refused:
        text_of(template)
    assert f"the model's chat template {message}" in str(refused.value)
    assert "\n" not in str(refused.value)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


GROWING = (
    "{% set n = namespace(x=3) %}{% for a in range(99999) %}{% set n.x = n.x * n.x % 1000003 %}{{ '' }}{% endfor %}"
)
NO_POWER = "{# a ** b #}{{ '**' }}{{ messages[0]['content'] }}"


@pytest.mark.parametrize("template", [LOOP, f"{{% for b in range(99999) %}}{GROWING}{{% endfor %}}"])
@pytest.mark.parametrize("in_main_thread", [True, False])
def test_templates_that_do_not_end_are_stopped(template, in_main_thread, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    if in_main_thread:
        with pytest.raises(PartInferError, match="has not ended after 0.5 seconds"):
            text_of(template)
    else:
        with ThreadPoolExecutor(3) as pool:
            endless, plain = pool.submit(text_of, template), pool.submit(text_of, NO_POWER)
            assert plain.result() == "**hi"
            assert "has not ended after 0.5 seconds" in str(endless.exception())
    assert text_of(NO_POWER) == "**hi"
    assert resource.getrlimit(resource.RLIMIT_AS) == LIMITS
    time.sleep(0.1)  # nothing comes after the end


def test_many_threads_at_once():
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text_of, [NO_POWER] * 100)) == ["**hi"] * 100
    assert resource.getrlimit(resource.RLIMIT_AS) == LIMITS


def test_under_a_profiler():
    """Nothing may be left behind that CPython looks for at every call, which under a profiler never ends."""
    program = (
        "import cProfile\nfrom tests.transformers_patches.generation.test_chat_template import NO_POWER, text_of\n"
        "with cProfile.Profile():\n    text = text_of(NO_POWER)\nprint(text)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "**hi\n", ended.stderr
