"""evaluate_perplexity.py end to end on a tiny model, and its parts against direct computation."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import perplexity_rows
from evaluation.bootstrap import Bootstrap
from evaluation.evaluate_perplexity import main
from evaluation.windows import Source, read_examples
from tests.conftest import ROOT
from tests.evaluation.conftest import SETTINGS
from transformers_patches import kernels
from transformers_patches.errors import PartInferError

ALL = "dense,dense+partial,partinfer,coreinfer,coreinfer+partial,coreinfer_random_loading"


def run(folder, ranking_paths, out, *arguments) -> dict:
    flags = [f"--{name}={value}" for name, value in (SETTINGS | ranking_paths).items()]
    code = main([f"--model_name={folder}", f"--json={out}", "--device=cpu", *flags, *map(str, arguments)])
    assert code == 0
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def windows(text_file):
    return ["--dataset", text_file, "--prefill_tokens", 24, "--scored_tokens", 8, "--limit", 6, "--bootstrap_iters", 50]


def test_every_method_on_the_same_windows(model_folder, ranking_paths, windows, tmp_path):
    result = run(model_folder, ranking_paths, tmp_path / "out.json", *windows, "--method", ALL)
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ALL.split(",")
    assert rows["dense"]["kl_to_dense"] == 0
    assert rows["dense"]["top1_agreement"] == 1
    assert rows["dense"]["excess_nll"] == 0
    fractions = {label: row["ffn_bytes_fraction"] for label, row in rows.items()}
    assert fractions == pytest.approx({label: {"dense": 1.0, "dense+partial": 0.7}.get(label, 0.4) for label in rows})
    for label, row in rows.items():
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        assert row["excess_nll"] == pytest.approx(row["nll"] - rows["dense"]["nll"])
        assert row["nll_ci"][0] <= row["nll"] <= row["nll_ci"][1]
        assert (row["examples"], row["scored_tokens"]) == (6, 48)
        if label != "dense":
            assert row["kl_to_dense"] > 0
    assert rows["coreinfer_random_loading"]["nll"] != rows["coreinfer+partial"]["nll"]
    assert rows["dense"]["token_bytes"] > rows["dense+partial"]["token_bytes"] > rows["partinfer"]["token_bytes"]


def test_block_bytes_are_those_of_all_layers(model_folder, ranking_paths, windows, tmp_path):
    rows = run(model_folder, ranking_paths, tmp_path / "out.json", *windows, "--method", ALL)["rows"]
    fractions = {row["label"]: row["block_bytes_fraction"] for row in rows}
    state = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    blocks = sum(value.nbytes for name, value in state.items() if name.startswith("model.layers."))
    ffn = sum(value.nbytes for name, value in state.items() if ".mlp." in name and ".layers.0." in name)
    for label, share in (("dense", 1.0), ("dense+partial", 0.7), ("coreinfer", 0.4), ("coreinfer+partial", 0.4)):
        assert fractions[label] == pytest.approx(1 - 4 * ffn * (1 - share) / blocks, abs=2e-3), label
    head = sum(value.nbytes for name, value in state.items() if name in ("model.norm.weight", "lm_head.weight"))
    assert rows[0]["token_bytes"] == blocks + head


def test_llama_cpp_on_the_same_windows(model_folder, ranking_paths, windows, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    flags = ["--method", "dense,partinfer", "--compare", "llama.cpp:q8_0,q4_0,llama.cpp"]
    rows = run(model_folder, ranking_paths, tmp_path / "out.json", *windows, *flags)["rows"]
    rows = {row["label"]: row for row in rows}
    assert list(rows) == ["dense", "partinfer", "llama.cpp q8_0", "llama.cpp q4_0", "llama.cpp float32"]
    same = rows["llama.cpp float32"]
    assert same["nll"] == pytest.approx(rows["dense"]["nll"], abs=0.02)
    assert same["kl_to_dense"] < 0.01
    assert same["token_bytes"] == pytest.approx(rows["dense"]["token_bytes"], rel=0.01)
    assert rows["llama.cpp q8_0"]["token_bytes"] > rows["llama.cpp q4_0"]["token_bytes"]


def test_the_flags_that_all_scripts_share(model_folder, windows):
    shared = [f"--checkpoint_path={model_folder}", "--cpu_only", "--threads=1", "--quiet", "--json"]
    command = [sys.executable, str(ROOT / "evaluation" / "evaluate_perplexity.py"), *shared, *map(str, windows)]
    done = subprocess.run([*command, "--method=dense"], capture_output=True, text=True, check=False)
    assert done.stderr == ""  # no bar, no note
    result = json.loads(done.stdout)
    assert (result["model"], result["rows"][0]["label"]) == ("tiny-llama", "dense")


def test_no_model_is_wrong_usage(windows, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, windows)])
    assert stopped.value.code == 2
    assert "--model_name or --checkpoint_path" in capsys.readouterr().err


def test_dense_nll_is_that_of_the_plain_model(model_folder, ranking_paths, windows, text_file, tmp_path):
    row = run(model_folder, ranking_paths, tmp_path / "out.json", *windows, "--method", "dense")["rows"][0]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    examples = read_examples(Source(str(text_file), limit=6, prefill_tokens=24, scored_tokens=8), tokenizer, 256)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    losses = []
    for example in examples:
        ids = torch.tensor([example.context + example.target])
        with torch.inference_mode():
            log_probs = torch.log_softmax(model(ids).logits[0, 23:-1], -1)
        losses.append(-log_probs.gather(1, torch.tensor(example.target)[:, None]).mean())
    assert row["nll"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_batch_size_makes_no_difference(model_folder, ranking_paths, windows, tmp_path):
    results = [
        run(
            model_folder,
            ranking_paths,
            tmp_path / "out.json",
            *windows,
            "--batch_size",
            size,
            "--method",
            "dense,partinfer",
        )
        for size in (1, 4)
    ]
    for one, four in zip(results[0]["rows"], results[1]["rows"], strict=True):
        assert one["nll"] == pytest.approx(four["nll"], abs=1e-5)
        assert one["kl_to_dense"] == pytest.approx(four["kl_to_dense"], abs=1e-5)


def test_sweeps_run_the_grid(model_folder, ranking_paths, windows, tmp_path):
    grid = ["--method", "dense,partinfer", "--sparsity", "0.3,0.5", "--loaded_neurons_percent", "0.6,0.8"]
    rows = run(model_folder, ranking_paths, tmp_path / "out.json", *windows, *grid)["rows"]
    points = [(row["method"], row["sparsity"], row["loaded_neurons_percent"]) for row in rows]
    assert points == [
        ("dense", None, 1.0),
        *[("partinfer", sparsity, loaded) for sparsity in (0.3, 0.5) for loaded in (0.6, 0.8)],
    ]
    assert len({row["label"] for row in rows}) == 5
    assert rows[1]["ffn_bytes_fraction"] == pytest.approx(0.3)


def test_selections_and_compensations_are_variants_and_original_is_a_preset(
    model_folder, ranking_paths, windows, tmp_path
):
    grid = ["--method", "dense,original,griffin+partial,partinfer", "--selection", "core,up", "--compensation", "none"]
    rows = run(model_folder, ranking_paths, tmp_path / "out.json", *windows, *grid)["rows"]
    labels = ["dense", "original", "griffin+partial", "partinfer selection=core", "partinfer selection=up"]
    assert [row["label"] for row in rows] == labels
    assert [row["selection"] for row in rows] == [None, "core", "griffin", "core", "up"]
    assert rows[1]["nll"] == rows[3]["nll"]
    assert len({row["nll"] for row in rows}) == 4
    assert [row["ffn_bytes_fraction"] for row in rows[1:]] == pytest.approx([0.4] * 4)
    _, *others = rows
    assert max(row["token_bytes"] for row in others) == min(row["token_bytes"] for row in others)


def test_questions_are_prefilled_and_answers_scored(model_folder, ranking_paths, tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [{"question": f"what is {i}", "answer": "x" * (i + 1)} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = run(model_folder, ranking_paths, tmp_path / "out.json", "--dataset", path, "--half", "second")
    assert result["examples"] == 3
    assert result["scored_tokens"] == sum(1 + i + 1 for i in (3, 4, 5))  # a space before each answer
    templates = ["--prompt_template", "Q {question} A", "--target_template", "{answer}!"]
    other = run(model_folder, ranking_paths, tmp_path / "out.json", "--dataset", path, *templates)
    assert other["scored_tokens"] == sum(i + 1 + 1 for i in range(6))


def test_types_are_compared_with_the_first(model_folder, ranking_paths, windows, tmp_path):
    out, methods = tmp_path / "out.json", ["--method", "dense,partinfer"]
    rows = {
        r["label"]: r
        for r in run(model_folder, ranking_paths, out, *windows, *methods, "--dtypes", "float32,int8")["rows"]
    }
    assert list(rows) == ["dense float32", "partinfer float32", "dense int8", "partinfer int8"]
    for method in ("dense", "partinfer"):
        first, second = rows[f"{method} float32"], rows[f"{method} int8"]
        assert first["perplexity_ratio"] == 1.0
        assert second["perplexity_ratio"] == pytest.approx(second["perplexity"] / first["perplexity"])
        assert second["perplexity_ratio_ci"][0] <= second["perplexity_ratio"] <= second["perplexity_ratio_ci"][1]
        assert second["perplexity_ratio"] != 1.0
    assert rows["dense int8"]["excess_nll"] == pytest.approx(rows["dense int8"]["nll"] - rows["dense float32"]["nll"])
    alone = run(model_folder, ranking_paths, out, *windows, *methods, "--dtype", "int8")["rows"]
    assert [row["nll"] for row in alone] == [rows["dense int8"]["nll"], rows["partinfer int8"]["nll"]]
    assert alone[0]["perplexity_ratio"] is None


def test_token_by_token_gives_what_one_pass_gives(model_folder, ranking_paths, windows, tmp_path):
    flags = [*windows, "--method", "dense,original,partinfer", "--selection", "core,up"]
    one, steps = (
        run(model_folder, ranking_paths, tmp_path / "out.json", *flags, *more) for more in ([], ["--token_by_token"])
    )
    assert (one["scoring"], steps["scoring"]) == ("one_pass", "token_by_token")
    assert [row["label"] for row in steps["rows"]] == [row["label"] for row in one["rows"]]
    for a, b in zip(one["rows"], steps["rows"], strict=True):
        for name in ("nll", "excess_nll", "kl_to_dense"):
            assert b[name] == pytest.approx(a[name], abs=1e-4)
        assert b["top1_agreement"] == a["top1_agreement"]
        assert b["ffn_bytes_fraction"] == a["ffn_bytes_fraction"]
    assert steps["rows"][0]["kl_to_dense"] == 0
    assert [row["decoded_tokens"] for row in steps["rows"][1:]] == [48] * 3


@pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.why_not()}")
def test_token_by_token_small_weights_meet_rounded_activations(model_folder, ranking_paths, windows, tmp_path):
    flags = [*windows, "--method", "dense,original", "--dtypes", "bfloat16,int8"]
    one, steps = (
        run(model_folder, ranking_paths, tmp_path / "out.json", *flags, *more)["rows"]
        for more in ([], ["--token_by_token", "--batch_size", 1])
    )
    for a, b in zip(one, steps, strict=True):
        assert b["nll"] != a["nll"]
        assert b["nll"] == pytest.approx(a["nll"], rel=0.02)
    assert (steps[0]["kl_to_dense"], steps[0]["perplexity_ratio"]) == (0, 1)
    assert steps[2]["kl_to_dense"] > 0


def test_without_dense_there_is_nothing_to_compare_to(model_folder, ranking_paths, windows, tmp_path):
    row = run(model_folder, ranking_paths, tmp_path / "out.json", *windows, "--method", "partinfer")["rows"][0]
    assert row["kl_to_dense"] is row["excess_nll"] is row["top1_agreement_ci"] is None
    assert row["nll"] > 0


def test_windows_follow_one_another_and_the_sample_is_seeded(model_folder, text_file):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    source = Source(str(text_file), prefill_tokens=24, scored_tokens=8)
    examples = read_examples(source, tokenizer, 256)
    tokens = tokenizer.encode(text_file.read_text(encoding="utf-8"))
    assert sum((e.context + e.target for e in examples), []) == tokens[: len(examples) * 32]
    samples = [
        read_examples(Source(str(text_file), prefill_tokens=24, scored_tokens=8, limit=5, seed=seed), tokenizer, 256)
        for seed in (0, 0, 1)
    ]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(
    "source, message",
    [
        ({"half": "third"}, "half must be one of"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"prompt_template": "{question}"}, "needs target_template"),
    ],
)
def test_bad_sources_are_told(source, message):
    with pytest.raises(PartInferError, match=message):
        Source("x.txt", **source)


def test_unreadable_sources_are_told(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n', encoding="utf-8")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"a": \n', encoding="utf-8")
    for path, message in (
        (short, "gives no example"),
        (rows, "line 1: there is no field 'question', only a .*--prompt_template"),
        (broken, "broken.jsonl, line 1 is not JSON"),
        (tmp_path / "nothing.txt", "no data set at"),
    ):
        with pytest.raises(PartInferError, match=message):
            read_examples(Source(str(path)), tokenizer, 256)


def examples(folder, path, **options):
    return read_examples(Source(str(path), **options), AutoTokenizer.from_pretrained(folder), 256)


def as_text(folder, example) -> tuple[str, str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.decode(example.context), tokenizer.decode(example.target)


def test_rows_of_every_kind_of_file_are_the_same_questions(model_folder, tmp_path):
    rows = [{"question": f"what, is {i}?", "answer": f"x{i}"} for i in range(3)]
    lines = "\n".join(map(json.dumps, rows))
    quoted = "\n".join(["question,answer", *(f'"{row["question"]}",{row["answer"]}' for row in rows)])
    triviaqa = [{**row, "answer": {"value": row["answer"], "aliases": ["y"]}} for row in rows]
    contents = {
        "rows.jsonl": lines.encode(),
        "mark.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "rows.json": json.dumps(rows, indent=1).encode(),
        "rows.csv": quoted.encode(),
        "rows.jsonl.gz": gzip.compress(lines.encode()),
        "triviaqa.jsonl": "\n".join(map(json.dumps, triviaqa)).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found = [as_text(model_folder, example) for example in examples(model_folder, tmp_path / name)]
        assert found == [(f"Question: what, is {i}?\nAnswer:", f" x{i}") for i in range(3)], name


def test_a_context_that_is_empty_is_left_out(model_folder, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("context,question,answer\nit is,what?,yes\n,who?,no\n")
    texts = [as_text(model_folder, example)[0] for example in examples(model_folder, path)]
    assert texts == ["Context: it is\nQuestion: what?\nAnswer:", "Question: who?\nAnswer:"]


def test_templates_reach_into_lists_and_objects(model_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answers": {"text": ["Paris", "Lyon"]}, "de": {"x": "ja"}}))
    for template, target in (
        (" {answers[text][0]}", " Paris"),
        (" {answers.text.1}", " Lyon"),
        ("{{{de.x}}}", "{ja}"),
    ):
        (example,) = examples(model_folder, path, target_template=template)
        assert as_text(model_folder, example)[1] == target


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q", "answer": None}, "rows.jsonl, line 1: field 'answer' is null"),
        ({"question": "q", "answer": ["a", "b"]}, "line 1: field 'answer' is a list of 2.*{answer.0}"),
        ({"question": "q", "answer": {"text": "a"}}, "line 1: field 'answer' is an object with text.*{answer.text}"),
        ({"question": "q", "answer": True}, "line 1: field 'answer' is true, expected a text"),
        ({"question": "q", "answer": " "}, "line 1: the answer is empty"),
        ({"question": "q\ud800", "answer": "a"}, "line 1: field 'question' has half of a character"),
        ({"text": None}, "line 1: field 'text' is null"),
        ({"text": ["a"]}, "line 1: field 'text' is a list of 1"),
    ],
)
def test_fields_that_are_no_texts_are_told(model_folder, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(PartInferError, match=message) as raised:
        examples(model_folder, path)
    assert "\n" not in str(raised.value)


def test_a_text_in_many_pieces_is_one_text(model_folder, tmp_path):
    path = tmp_path / "text.txt"
    text = "a line of text\r\n" * 2500  # more than one piece
    path.write_text(text, newline="")
    tokens = AutoTokenizer.from_pretrained(model_folder).encode(text.replace("\r\n", "\n"))
    found = examples(model_folder, path, prefill_tokens=24, scored_tokens=8)
    assert sum((e.context + e.target for e in found), []) == tokens[: len(tokens) // 32 * 32]


def test_saved_data_sets_are_read_by_split(model_folder, tmp_path):
    from datasets import Dataset, DatasetDict

    saved = {split: Dataset.from_dict({"question": ["q"], "answer": [split]}) for split in ("train", "test")}
    DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    for split in saved:
        (example,) = examples(model_folder, tmp_path / "saved", split=split)
        assert as_text(model_folder, example)[1] == f" {split}"


def test_the_hub_is_read_by_its_id_configuration_and_split(model_folder, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*given, **options):
        asked.append((given, options))
        return [{"question": "q", "answer": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(examples(model_folder, "owner/name:part", split="dev")) == 1
    assert asked == [(("owner/name", "part"), {"split": "dev"})]


def test_the_bootstrap_interval_covers_the_mean_at_its_rate():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        sample = generator.normal(1.0, 1.0, size=60)
        low, high = Bootstrap(60, 400, seed).ratio_interval(sample, np.ones(60))
        covered += low <= 1.0 <= high
    assert 0.88 < covered / 200 < 0.99


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "fancy"],
        ["--sparsity", "a"],
        ["--batch_size", "0"],
        ["--half", "x"],
        ["--token_by_token", "--batch_size", "8"],
    ],
)
def test_wrong_usage_ends_with_2(model_folder, text_file, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        main(["--model_name", str(model_folder), "--dataset", str(text_file), *flags])
    assert ended.value.code == 2
    if "--token_by_token" in flags:
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.endswith("--token_by_token decodes one window at a time: leave out --batch_size 8")


def test_tokens_that_the_model_lacks_are_told(model_folder, tmp_path, text_file):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(200)])
    tokenizer.save_pretrained(folder)
    path = tmp_path / "rows.jsonl"
    for row in ({"question": "a<new150>?", "answer": "b"}, {"question": "a?", "answer": "<new150>"}):
        path.write_text(json.dumps({"question": "a?", "answer": "b"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
        with pytest.raises(PartInferError, match="example 2 has token 2[0-9][0-9], but the model has embeddings for"):
            main([f"--model_name={folder}", "--device=cpu", "--method=dense", f"--dataset={path}"])


@pytest.mark.parametrize("options", [[], ["--token_by_token"]])
def test_predictions_that_are_not_finite_are_told(options, model_folder, tmp_path, windows, monkeypatch):
    """Weights so large that their products overflow."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1e30
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PartInferError, match="the model's logits are not finite"):
        main([f"--model_name={folder}", "--device=cpu", "--method=dense", *map(str, windows), *options])


def test_a_run_that_was_stopped_goes_on_with_the_next_row(model_folder, ranking_paths, windows, tmp_path, monkeypatch):
    out, given = tmp_path / "out.json", [*windows, "--method", "partinfer,dense,coreinfer", "--skip_finished"]
    measured, load = [], perplexity_rows.load_configuration

    def loading(configuration, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(configuration.label)
        return load(configuration, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(perplexity_rows, "load_configuration", loading)
        with pytest.raises(KeyboardInterrupt):
            run(model_folder, ranking_paths, out, *given)
    assert measured == ["dense", "partinfer"]
    kept = tmp_path / "out.json.rows"
    with open(kept, "a", encoding="utf-8") as file:
        file.write('{"key": "half a li')
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(
            perplexity_rows, "load_configuration", lambda c, *rest: (again.append(c.label), load(c, *rest))[1]
        )
        went_on = run(model_folder, ranking_paths, out, *given)
    assert again == ["dense", "coreinfer"]  # the dense model's logits are not kept
    assert not kept.exists()
    assert went_on == run(model_folder, ranking_paths, out, *given[:-1])


def test_finished_rows_need_a_file(model_folder, windows, capsys):
    with pytest.raises(SystemExit):
        main([f"--model_name={model_folder}", *map(str, windows), "--method=dense", "--skip_finished"])
    assert "give --json FILE" in capsys.readouterr().err
