"""PartInferLM against token-by-token scoring, against plain HFLM, and against itself at other batch sizes."""

from __future__ import annotations

import random
import string

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache

from evaluation.partinfer_lm import PartInferLM, rolling_windows
from tests.evaluation.conftest import SETTINGS
from transformers_patches.errors import PartInferError
from transformers_patches.generation.generate import GenerationOptions, generate

SPARSE = [
    {"method": "partinfer"},
    {"method": "coreinfer"},
    {"method": "coreinfer", "use_partial_loading": True},
    {"method": "dense", "use_partial_loading": True},
]
OPTIONS = {"until": ["q", "zz"], "max_gen_toks": 12, "do_sample": False}


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, values, index) for index, values in enumerate(arguments)]


def text(generator: random.Random, length: int) -> str:
    return "".join(generator.choice(string.ascii_lowercase) for _ in range(length))


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Contexts of different lengths (none, one token, many), some with several continuations."""
    generator = random.Random(0)
    pairs = []
    for length, continuations in ((0, 2), (1, 2), (2, 1), (9, 3), (30, 1), (17, 4), (5, 1)):
        context = text(generator, length)
        pairs += [(context, " " + text(generator, generator.randint(1, 9))) for _ in range(continuations)]
    generator.shuffle(pairs)
    return pairs


@pytest.fixture
def make_lm(model_folder, ranking_paths):
    def make(**options) -> PartInferLM:
        options = {"device": "cpu", "batch_size": 1, **SETTINGS, **ranking_paths, **options}
        return PartInferLM(str(model_folder), **options)

    return make


def step_by_step(lm: PartInferLM, context: str, continuation: str) -> tuple[float, bool]:
    """The same number by prefilling the context and feeding one token at a time, one sequence alone."""
    context_ids = lm.tok_encode(context) or [lm.prefix_token_id]
    target = lm.tok_encode(continuation)
    cache = DynamicCache()
    prompt, rest = context_ids[:-1] or context_ids, context_ids[-1:] if len(context_ids) > 1 else []
    predictions = []
    with torch.inference_mode():
        logits = lm.model(torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits[0, -1]
        if not rest:
            predictions.append(logits)
        for token in [*rest, *target[:-1]]:
            logits = lm.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
            predictions.append(logits)
    log_probs = torch.log_softmax(torch.stack(predictions), -1)
    total = sum(float(row[token]) for row, token in zip(log_probs, target, strict=True))
    return total, log_probs.argmax(-1).tolist() == target


@pytest.mark.parametrize("method", SPARSE, ids=lambda m: "-".join(map(str, m.values())))
def test_log_likelihoods_equal_token_by_token_scoring(make_lm, pairs, method):
    lm = make_lm(**method, batch_size=3)
    expected = [step_by_step(lm, *pair) for pair in pairs]
    scored = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [score for score, _ in scored] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("method", SPARSE, ids=lambda m: "-".join(map(str, m.values())))
def test_results_do_not_depend_on_the_batch(make_lm, pairs, method):
    prompts = [(context, OPTIONS) for context, _ in pairs if context]
    scores, texts = [], []
    for size in (1, 3, 8):
        lm = make_lm(**method, batch_size=size)
        scored = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
        scores.append([score for score, _ in scored])
        texts.append(lm.generate_until(instances("generate_until", prompts), disable_tqdm=True))
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert scores[2] == pytest.approx(scores[0], abs=1e-4)
    assert texts[0] == texts[1] == texts[2]


def test_sparse_scores_differ_from_dense_ones(make_lm, pairs):
    requests = instances("loglikelihood", pairs)
    dense = make_lm(method="dense").loglikelihood(requests, disable_tqdm=True)
    sparse = make_lm(method="partinfer").loglikelihood(requests, disable_tqdm=True)
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(dense, sparse, strict=True))


def test_dense_is_plain_hflm_exactly(make_lm, model_folder, pairs):
    ours, theirs = make_lm(method="dense", batch_size=3), HFLM(str(model_folder), device="cpu", batch_size=3)
    prompts = [(context, OPTIONS) for context, _ in pairs if context]
    for kind, arguments in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", [(context,) for context, _ in pairs if context]),
        ("generate_until", prompts),
    ):
        results = [getattr(lm, kind)(instances(kind, arguments), disable_tqdm=True) for lm in (ours, theirs)]
        assert results[0] == results[1], kind


def test_everything_loaded_and_computed_is_dense(make_lm, model_folder, pairs):
    whole = {"loaded_neurons_percent": 1.0, "base_neurons_percent": 1.0, "sparsity": 1.0}
    ours, theirs = make_lm(**whole, batch_size=3), HFLM(str(model_folder), device="cpu", batch_size=1)
    requests = instances("loglikelihood", pairs)
    got, expected = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert [score for score, _ in got] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_counted_neurons_are_in_the_model_info(make_lm, pairs):
    lm = make_lm(method="partinfer", sparsity=0.4, loaded_neurons_percent=0.7)
    lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    info = lm.get_model_info()["partinfer"]
    assert info["ffn_bytes_fraction"] == pytest.approx(0.4)
    assert info["loaded_fraction"] == pytest.approx(0.7)
    assert info["decoded_tokens"] > 0
    assert info["computed_neurons"] == info["decoded_tokens"] * 4 * 32  # 4 sparse layers, 0.4 of 80 neurons
    assert info["settings"]["method"] == "partinfer"


def test_a_context_is_prefilled_once_for_all_its_continuations(make_lm):
    lm = make_lm(method="partinfer", batch_size=8)
    prefilled = []
    lm.model.register_forward_pre_hook(
        lambda model, args, kwargs: (
            prefilled.append(kwargs["input_ids"].shape) if kwargs["past_key_values"].get_seq_length() == 0 else None
        ),
        with_kwargs=True,
    )
    requests = [("abcdef", " x"), ("abcdef", " yy"), ("ghijkl", " z"), ("abcdef", " x")]
    scored = lm.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    assert prefilled == [(2, 5)]
    assert scored[0] == scored[3] != scored[1]


def test_long_requests_lose_their_beginning(make_lm, caplog):
    lm = make_lm(method="partinfer", max_length=20)
    long, short = "ab" * 30 + "cdefghijklmnopqrst", "cdefghijklmnopqrst"
    requests = instances("loglikelihood", [(long, "xyz"), (short, "xyz"), ("a", "b" * 40)])
    scored = lm.loglikelihood(requests, disable_tqdm=True)
    assert scored[0] == pytest.approx(scored[1])
    assert scored[2][0] < 0
    assert "2 requests were cut from the left" in caplog.text


def test_rolling_windows_score_every_token_once():
    tokens = list(range(10, 25))
    windows = rolling_windows(tokens, 1, prefilled=4, scored=6)
    assert windows[0] == ([1], tokens[:6])
    assert windows[1] == (tokens[2:6], tokens[6:12])
    assert sum((continuation for _, continuation in windows), []) == tokens


def test_rolling_log_likelihood_goes_through_the_sparse_path(make_lm):
    lm = make_lm(method="partinfer", prefill_tokens=8, scored_tokens=4)
    sample = text(random.Random(5), 19)
    tokens = lm.tok_encode(sample)
    expected = sum(
        lm._loglikelihood_tokens([(None, *window)], disable_tqdm=True)[0][0]
        for window in rolling_windows(tokens, lm.prefix_token_id, 8, 4)
    )
    lm.loaded.reset_counters()
    rolled = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(sample,)]), disable_tqdm=True)
    assert rolled == [pytest.approx(expected, abs=1e-4)]
    assert lm.loaded.computed_fraction() == pytest.approx(0.4)
    assert lm.loaded.state.layers[0].counters.tokens > 0


def test_generation_honours_stop_strings_and_length(make_lm):
    lm = make_lm(method="partinfer", batch_size=2)
    prompts = ["abc", "What now", "xyzw", "hello there", "one two", "The end is"]

    def answers(until: list[str]) -> list[str]:
        options = [(prompt, {"until": until, "max_gen_toks": 9}) for prompt in prompts]
        return lm.generate_until(instances("generate_until", options), disable_tqdm=True)

    free = answers([])
    lengths = [len(lm.tok_encode(answer)) for answer in free]
    assert 3 < max(lengths) <= 9
    stop = free[lengths.index(max(lengths))][3]
    assert answers([stop]) == [answer.split(stop)[0] for answer in free]


def test_generation_is_that_of_partinfer_py(make_lm):
    lm = make_lm(method="partinfer", batch_size=2)
    prompts = ["abc", "What now", "xyzw", "hello there"]
    asked = instances("generate_until", [(prompt, {"until": [], "max_gen_toks": 9}) for prompt in prompts])
    alone = [
        generate(lm.loaded, lm.tokenizer, lm.tok_encode(prompt), GenerationOptions(max_new_tokens=9)).text
        for prompt in prompts
    ]
    assert lm.generate_until(asked, disable_tqdm=True) == alone


@pytest.mark.parametrize("given", ["device=cpu,", ""])
def test_the_device_of_the_model_arguments_wins_over_lm_evals_default(model_folder, ranking_paths, given):
    if not given and torch.cuda.is_available():
        pytest.skip("with CUDA lm-eval's default is a device that is there")
    settings = ",".join(f"{name}={value}" for name, value in (SETTINGS | ranking_paths).items())
    lm = PartInferLM.create_from_arg_string(
        f"pretrained={model_folder},{given}{settings}", {"device": "cuda:0", "batch_size": "2", "max_batch_size": None}
    )
    assert lm.device.type == "cpu"
    assert lm.batch_size == 2


def test_bad_settings_are_one_line(model_folder, ranking_paths, tmp_path):
    with pytest.raises(PartInferError, match="sparsity must be at most loaded_neurons_percent"):
        PartInferLM(str(model_folder), sparsity=0.9, loaded_neurons_percent=0.5, **ranking_paths)
    with pytest.raises(PartInferError, match="no model at"):
        PartInferLM(str(tmp_path / "nothing"), **ranking_paths)
    with pytest.raises(PartInferError, match="does not take peft"):
        PartInferLM(str(model_folder), device="cpu", peft="x", **SETTINGS, **ranking_paths)
