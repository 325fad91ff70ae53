"""generate(): what is streamed, why it ends, what a conversation keeps."""

import itertools

import pytest
import torch

from tests.tiny_tokenizer import tiny_tokenizer
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.generation.generate import Conversation, GenerationOptions, generate
from transformers_patches.load.loader import load_model

PROMPT = [5, 17, 33, 40, 21]


@pytest.fixture(scope="module")
def model(tiny_checkpoints):
    loaded = load_model(
        tiny_checkpoints["llama"],
        PartInferConfig(method="coreinfer", start_num=1, end_num=4, device="cpu"),
    )
    loaded.model.generation_config.eos_token_id = None
    return loaded


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def greedy(count: int, **options) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=count, **options)


def test_streams_all_of_the_text_in_order(model, tokenizer):
    pieces = []
    result = generate(model, tokenizer, PROMPT, greedy(12), pieces.append)
    assert "".join(pieces) == result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert len(pieces) > 1
    assert (result.prompt_tokens, result.generated_tokens, result.finish_reason) == (5, 12, "length")
    assert result.time_to_first_token_s > 0
    assert result.decode_tokens_per_second > 0


def test_greedy_tokens_are_those_of_plain_generate(model, tokenizer):
    ids = torch.tensor([PROMPT])
    plain = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert generate(model, tokenizer, PROMPT, greedy(9)).token_ids == plain[0, len(PROMPT) :].tolist()


def test_stop_string_ends_and_is_not_in_the_text(model, tokenizer):
    whole = generate(model, tokenizer, PROMPT, greedy(12)).text
    stop = whole[4:6]
    pieces = []
    result = generate(model, tokenizer, PROMPT, greedy(12, stop=(stop,)), pieces.append)
    assert result.finish_reason == "stop"
    assert "".join(pieces) == result.text == whole[: whole.index(stop)]


def test_text_that_only_begins_a_stop_string_is_kept(model, tokenizer):
    whole = generate(model, tokenizer, PROMPT, greedy(6)).text
    result = generate(model, tokenizer, PROMPT, greedy(6, stop=(whole[-1] + "never",)))
    assert (result.text, result.finish_reason) == (whole, "length")


def test_end_token_ends(model, tokenizer, monkeypatch):
    third = generate(model, tokenizer, PROMPT, greedy(6)).token_ids[2]
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [third])
    result = generate(model, tokenizer, PROMPT, greedy(6))
    assert result.finish_reason == "stop"
    assert result.token_ids[-1] == third
    assert third not in result.token_ids[:-1]


def test_sampling_follows_the_seed(model, tokenizer):
    options = greedy(16, sampling="top-p", temperature=5.0, top_p=1.0)

    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, tokenizer, PROMPT, options).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_ctrl_c_keeps_the_text_and_leaves_the_next_prompt_alone(model, tokenizer):
    undisturbed = generate(model, tokenizer, PROMPT, greedy(8))
    calls = itertools.count()

    def interrupt(_piece):
        if next(calls) == 0:
            raise KeyboardInterrupt

    conversation = Conversation()
    broken = generate(model, tokenizer, [9, 60, 61], greedy(30), interrupt, conversation)
    assert broken.finish_reason == "interrupted"
    assert 0 < broken.generated_tokens < 30
    assert broken.text
    assert conversation.cache is None
    assert generate(model, tokenizer, PROMPT, greedy(8)).token_ids == undisturbed.token_ids


def test_a_later_turn_prefills_only_what_is_new(model, tokenizer):
    conversation = Conversation()
    first = generate(model, tokenizer, PROMPT, greedy(4), conversation=conversation)
    assert conversation.cache.get_seq_length() == len(conversation.token_ids) == 8  # the last token was never fed
    second_prompt = PROMPT + first.token_ids + [50, 51, 52]
    second = generate(model, tokenizer, second_prompt, greedy(4), conversation=conversation)
    assert second.prompt_tokens == 12
    assert second.prefilled_tokens == 4
    decoded = model.state.layers[0].selection.evidence
    assert int(decoded[0].counts.sum()) > 0


def test_a_dense_conversation_equals_whole_prompts(tiny_checkpoints, tokenizer):
    dense = load_model(tiny_checkpoints["llama"], PartInferConfig(method="dense", device="cpu"))
    dense.model.generation_config.eos_token_id = None
    conversation = Conversation()
    first = generate(dense, tokenizer, PROMPT, greedy(4), conversation=conversation)
    changed = PROMPT + first.token_ids[:2] + [70, 71]  # the history was rewritten: the cache is cropped
    kept = generate(dense, tokenizer, changed, greedy(6), conversation=conversation)
    assert kept.prefilled_tokens == 2
    assert kept.token_ids == generate(dense, tokenizer, changed, greedy(6)).token_ids


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "num_tokens_to_generate must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be a number, got nan"),
        ({"temperature": float("inf")}, "temperature must be a number, got inf"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"stop": ("",)}, "stop must be a text"),
        ({"sampling": "beam"}, "sampling-method must be greedy or top-p, got 'beam'"),
    ],
)
def test_options_out_of_range_say_so(options, message):
    with pytest.raises(PartInferError, match=message):
        GenerationOptions(**options)


def test_prompts_that_do_not_fit_say_so(model, tokenizer):
    with pytest.raises(PartInferError, match="no tokens"):
        generate(model, tokenizer, [], greedy(1))
    with pytest.raises(PartInferError, match="context is 256"):
        generate(model, tokenizer, [5] * 300, greedy(1))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_answers_end_where_the_context_does(tiny_checkpoints, tokenizer, family):
    loaded = load_model(tiny_checkpoints[family], PartInferConfig(method="dense", device="cpu"))
    loaded.model.generation_config.eos_token_id = None
    result = generate(loaded, tokenizer, [5, 9] * 125, greedy(20))
    assert (result.prompt_tokens, result.generated_tokens, result.finish_reason) == (250, 6, "length")
    assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", ["greedy", "top-p"])
def test_logits_that_are_not_finite_end_in_one_line(tiny_checkpoints, tokenizer, kernels, value, sampling):
    broken = load_model(tiny_checkpoints["llama"], PartInferConfig(method="dense", device="cpu", kernels=kernels))
    conversation, options = Conversation(), greedy(8, sampling=sampling)
    right = generate(broken, tokenizer, PROMPT, greedy(8)).token_ids
    norm = broken.model.model.norm.weight
    before = float(norm[3])
    norm.data[3] = value
    with pytest.raises(PartInferError, match="logits are not finite"):
        generate(broken, tokenizer, PROMPT, options, conversation=conversation)
    assert conversation.cache is None
    norm.data[3] = before
    assert generate(broken, tokenizer, PROMPT, greedy(8), conversation=conversation).token_ids == right
