"""Chat templates are programs: whatever they do, it ends, and in one line if it is not a text."""

from __future__ import annotations

import signal

import pytest

from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches.errors import PartInferError
from transformers_patches.generation import chat_template
from transformers_patches.generation.chat_template import apply_chat_template

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
        ("{{ 'a' * 10 ** 12 }}", "takes more than 1 GiB of memory"),
        ("{% for a in range(99999) %}{{ 'abc' * 200 }}{% endfor %}", "gives more than 10000000 characters"),
    ],
)
def test_templates_that_give_no_text_say_why(template, message):
    with pytest.raises(PartInferError) as refused:
        text_of(template)
    assert f"the model's chat template {message}" in str(refused.value)
    assert "\n" not in str(refused.value)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [LOOP, "{% set a = 9 ** (9 ** 9) %}{{ a > 1 }}"])
def test_templates_that_do_not_end_are_stopped(template, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(PartInferError, match="has not ended after 0.5 seconds"):
        text_of(template)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert text_of("{{ messages[0]['content'] }}") == "hi"
