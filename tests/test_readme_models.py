"""README's list of models and the table of docs/models.md are those that are tested."""

from pathlib import Path

import pytest

from tests.model_table import WRITTEN, with_list

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", WRITTEN)
def test_the_list_is_the_tested_one(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- models: begin -->" in text
    assert text == with_list(text, WRITTEN[name]()), "run python -m tests.model_table"
