"""Sources, field mappings, templates, token sequences and their batches."""

from __future__ import annotations

import json

import pytest

from profiler.sequences import Encoder, windows
from profiler.templates import Prompt, Template
from profiler.texts import BUILTIN_FOLDER, HUB_DATASETS, TextSource
from tests.profiler.byte_tokenizer import byte_tokenizer
from texts.records import Record
from transformers_patches.errors import PartInferError


def prompts(path, *arguments, **options) -> list[str]:
    return [prompt.text for prompt in TextSource(str(path), *arguments, **options).resolve().prompts()]


@pytest.mark.parametrize(
    ("task_type", "record", "expected"),
    [
        ("QA", {"question": "Why?"}, "Question: Why?\nAnswer: "),
        ("QA", {"question": "Why?", "context": "So."}, "Question: So.\nWhy?\nAnswer: "),
        ("QA", {"goal": "Dry socks", "sol1": "x"}, "Question: Dry socks\nAnswer: "),
        ("Summarize", {"document": "Long."}, "Summarize the following document:\nLong."),
        ("Summarize", {"dialogue": "A: hi"}, "Summarize the following document:\nA: hi"),
        ("translate_de_en", {"translation": {"de": "Ja", "en": "Yes"}}, "German phrase: Ja\nEnglish phrase: "),
        ("translate_ro_en", {"ro": "Da"}, "Romanian phrase: Da\nEnglish phrase: "),
        ("translate_fr_en", {"text": "Oui"}, "French phrase: Oui\nEnglish phrase: "),
        ("translate_en_fr", {"text": "Yes"}, "English phrase: Yes\nFrench phrase: "),
        ("text", {"text": "As it is {here}"}, "As it is {here}"),
    ],
)
def test_tasks_find_their_fields_and_templates(tmp_path, task_type, record, expected):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n\n")
    assert prompts(path, task_type) == [expected]


def test_text_field_and_template_over_csv(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('query,hint\n"What, now?",none\n')
    assert prompts(path, "QA", text_field="query") == ["Question: What, now?\nAnswer: "]
    assert prompts(path, template="{query} (hint: {hint})") == ["What, now? (hint: none)"]
    assert prompts(path, text_field="hint", template="<{text}>") == ["<none>"]


def test_text_files_are_lines_for_a_task_and_one_document_for_language_modelling(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one\n\ntwo\n")
    assert prompts(path, "QA") == ["Question: one\nAnswer: ", "Question: two\nAnswer: "]
    assert prompts(path, "text") == ["one\n\ntwo\n"]
    path.write_text("a line of a long document\n" * 2000)
    pieces = prompts(path, "text")
    assert len(pieces) > 1
    assert "".join(pieces) == path.read_text()


@pytest.mark.parametrize(
    ("content", "expected"), [('{"a": 1}\n{"a"\n', "line 2 is not JSON"), ("[1]\n", "expected an object, got list")]
)
def test_damaged_jsonl_names_the_line(tmp_path, content, expected):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(PartInferError, match=expected):
        prompts(path, text_field="a", template="{a}")


def test_texts_that_are_no_utf8_are_one_line_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes("text\nschön\n".encode("latin-1"))
    with pytest.raises(PartInferError, match="data.csv, line 2 is not UTF-8 .*: convert the file"):
        prompts(path, "QA")
    path.write_bytes("\ufefftext\nschön\n".encode())
    assert prompts(path, "QA") == ["Question: schön\nAnswer: "]


def test_empty_texts_are_left_out_and_missing_ones_are_not(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "  "}\n{"question": "Why?"}\n{"question": null}\n')
    source = TextSource(str(path), "QA").resolve().prompts()
    assert next(source).text == "Question: Why?\nAnswer: "
    with pytest.raises(
        PartInferError, match="line 3 has none of the usual fields of QA, or nothing in them; it has question"
    ):
        next(source)


def test_a_template_of_ones_own_makes_prompts_not_documents(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one\ntwo\n")
    source = TextSource(str(path), template="Say {text}!").resolve()
    assert [prompt.text for prompt in source.prompts()] == ["Say one!", "Say two!"]
    assert not source.language_modelling
    assert TextSource(str(path), "text").resolve().language_modelling


def test_saved_data_sets_are_read_by_split(tmp_path):
    from datasets import Dataset, DatasetDict

    saved = {"train": ["a", "b"], "test": ["c"]}
    DatasetDict({k: Dataset.from_dict({"text": v}) for k, v in saved.items()}).save_to_disk(str(tmp_path / "saved"))
    assert prompts(tmp_path / "saved", "text") == ["a", "b"]
    assert prompts(tmp_path / "saved", "text", dataset_split="test") == ["c"]
    with pytest.raises(PartInferError, match="it has train, test"):
        prompts(tmp_path / "saved", "text", dataset_split="dev")


def test_hub_mappings_by_short_name_and_by_path():
    names = "triviaqa squadv2 mlqa piqa wmt16_de_en wmt16_ro_en wmt14_fr_en wmt14_en_fr cnn_dailymail xsum samsum"
    assert set(HUB_DATASETS) >= {*names.split(), "truthful_qa", "commonsense_qa", "lambada"}
    by_path = TextSource("truthfulqa/truthful_qa", dataset_config="generation").resolve()
    by_name = TextSource("truthful_qa").resolve()
    assert (by_path.task_type, by_path.split) == (by_name.task_type, by_name.split) == ("QA", "validation")
    backwards = TextSource("wmt/wmt14", "translate_en_fr", "fr-en").resolve()
    assert backwards.template.fill(Record({"translation": {"fr": "Oui", "en": "Yes"}}, "x")).text.startswith(
        "English phrase: Yes"
    )


def test_the_hub_is_read_as_a_stream(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, config, **options):
        asked.update(path=path, config=config, **options)
        return iter([{"translation": {"ro": "Da", "en": "Yes"}}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prompts("wmt16_ro_en") == ["Romanian phrase: Da\nEnglish phrase: "]
    assert asked == {"path": "wmt/wmt16", "config": "ro-en", "split": "train", "streaming": True}


def test_an_unreachable_hub_is_one_clear_line(monkeypatch):
    import datasets

    def load_dataset(path, config, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(PartInferError, match="can't read EdinburghNLP/xsum .* Couldn't reach the Hub; give another"):
        prompts("xsum")


BUILTIN_TASKS = ("QA", "Summarize", "translate_de_en")


@pytest.mark.parametrize("task_type", BUILTIN_TASKS)
def test_built_in_texts_are_many_and_distinct(task_type):
    texts = prompts("builtin", task_type)
    assert len(texts) >= 150
    assert len(set(texts)) == len(texts)
    assert {p.stem for p in BUILTIN_FOLDER.iterdir()} == {task.lower() for task in BUILTIN_TASKS}


def test_built_in_documents_are_worth_a_summary():
    documents = [prompt.partition("\n")[2] for prompt in prompts("builtin", "Summarize")]
    assert all(60 <= len(document.split()) <= 130 for document in documents)
    beginnings = {" ".join(document.split()[:3]) for document in documents}
    assert len(beginnings) > 0.9 * len(documents)  # written one by one, not filled into a pattern


@pytest.mark.parametrize("task_type", ["text", "translate_en_fr"])
def test_tasks_without_built_in_texts_say_which_have_some(task_type):
    with pytest.raises(PartInferError, match="only for QA, Summarize, translate_de_en: give a --dataset"):
        prompts("builtin", task_type)


def test_long_prompts_keep_the_end_of_their_template():
    template = Template("QA")
    prompt = template.fill(Record({"question": "x" * 500}, "here"))
    (ids,) = Encoder(byte_tokenizer(), 60).sequences([prompt])
    text = byte_tokenizer().decode(ids)
    assert len(ids) == 60
    assert text.startswith("Question: xxx")
    assert text.endswith("x\nAnswer: ")


def test_chat_template_is_put_around_the_text_and_survives_the_cut():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<bot>"
    encoder = Encoder(tokenizer, 50, chat_template=True)
    short, long = encoder.sequences([Prompt("hello"), Prompt("y" * 500)])
    assert tokenizer.decode(short) == "<user>hello</><bot>"
    assert len(long) == 50
    assert tokenizer.decode(long).endswith("yy</><bot>")


def test_documents_are_cut_in_pieces_that_hold_every_token():
    (whole,) = Encoder(byte_tokenizer(), 10_000).sequences([Prompt("abc" * 100)])
    pieces = list(Encoder(byte_tokenizer(), 64, split=True).sequences([Prompt("abc" * 100)]))
    assert [len(piece) for piece in pieces] == [64, 64, 64, 64, 44]
    assert sum(pieces, []) == whole


def test_windows_hold_their_share_in_order_and_batches_are_sorted_by_length():
    sequences = [[1] * length for length in (3, 9, 1, 4, 4, 8, 2)]
    first, second = windows(sequences, size=4, skip=1, limit=6)
    assert [s.number for s in first.sequences] == [1, 2, 3, 4]
    assert [s.number for s in second.sequences] == [5, 6]
    assert [[len(s.ids) for s in batch] for batch in first.batches(3)] == [[9, 4, 4], [1]]


def test_digests_change_with_any_earlier_text_and_continue():
    sequences = [[number, 7] for number in range(10)]
    all_ = list(windows(sequences, 2))
    changed = list(windows([[0, 7], [1, 8], *sequences[2:]], 2))
    assert all(a.digest != b.digest for a, b in zip(all_, changed, strict=True))
    rest = list(windows(sequences[4:], 2, limit=10, done=2, digest=all_[1].digest))
    assert rest == all_[2:]
