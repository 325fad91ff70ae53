"""Scoring token by token against scoring in one pass, and against the logits that generation had."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from evaluation.scoring import continuation_logits, decoded_logits
from tests.conftest import FAMILY_CONFIGS, LAYERS, VOCABULARY, make_tiny_checkpoint, random_neuron_file
from tests.transformers_patches.made_up_files import with_statistics
from tests.transformers_patches.model_passes import MODEL
from transformers_patches import kernels
from transformers_patches.config import PartInferConfig
from transformers_patches.generation.generate import generate_ids
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.load.loader import load_model

CONTEXT, TARGET = list(range(3, 24)), [90, 40, 77, 41, 5, 60, 61, 3]
PARTINFER = {"method": "partinfer", "sparsity": 0.35, "compensation": "mean"}
WAYS = {
    "dense": {"method": "dense"},
    "dense+partial": {"method": "dense", "use_partial_loading": True},
    "original": {"method": "partinfer", "selection": "core", "compensation": "none"},
    "coreinfer": {"method": "coreinfer"},
    "up": {**PARTINFER, "selection": "up"},
    "up average": {**PARTINFER, "selection": "up", "token_count": "average"},
    "blend": {**PARTINFER, "selection": "blend"},
}
native = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels: {kernels.why_not()}")


def load(folder, way: str, dtype: str, of_kernels: str = "native") -> LoadedModel:
    config = PartInferConfig(**WAYS[way], dtype=dtype, kernels=of_kernels, start_num=1, end_num=4, device="cpu")
    return load_model(folder, config, with_statistics(1), MODEL)


def one_pass(loaded: LoadedModel, context=CONTEXT, target=TARGET) -> torch.Tensor:
    [(_, _, logits)] = continuation_logits(loaded.model, [(context, [target])])
    return logits


@pytest.mark.parametrize("of_kernels", [pytest.param("native", marks=native), "torch"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "opt"])
def test_steps_give_what_one_pass_gives(tiny_checkpoints, family, way, of_kernels):
    loaded = load(tiny_checkpoints[family], way, "float32", of_kernels)
    for context in (CONTEXT, CONTEXT[:1]):
        loaded.reset_counters()
        steps = decoded_logits(loaded.model, context, TARGET)
        decoded = len(TARGET) - (len(context) == 1)  # the only token of a prompt is prefilled, and predicts the first
        assert {layer.counters.tokens for layer in loaded.state.layers} <= {decoded}
        assert steps.shape == (len(TARGET), VOCABULARY)
        torch.testing.assert_close(steps, one_pass(loaded, context), rtol=1e-4, atol=1e-4)


class _Ignored(BaseStreamer):
    def put(self, value) -> None: ...

    def end(self) -> None: ...


@native
@pytest.mark.parametrize("way", ["dense", "original", "up", "blend"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_logits_are_those_that_generation_had(tiny_checkpoints, family, dtype, way):
    loaded = load(tiny_checkpoints[family], way, dtype)
    config = GenerationConfig(
        max_new_tokens=8, eos_token_id=VOCABULARY, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    output = generate_ids(loaded, torch.tensor([CONTEXT]), config, _Ignored())
    first, *others = output.sequences[0, len(CONTEXT) :].tolist()
    scored = decoded_logits(loaded.model, [*CONTEXT, first], others)
    assert scored.dtype == torch.bfloat16
    assert torch.equal(scored.float(), torch.cat(output.logits[1:]))


@native
@pytest.mark.parametrize("method", ["dense", "partinfer"])
def test_weights_of_8_bits_go_through_the_native_decoder(tmp_path, monkeypatch, method):
    kind, options = FAMILY_CONFIGS["llama"]
    # whole groups of 32, so that whole layers have 8 bits, too
    monkeypatch.setitem(FAMILY_CONFIGS, "llama", (kind, options | {"intermediate_size": 96}))
    folder = make_tiny_checkpoint(tmp_path / "model", "llama")
    settings = {"selection": "up", "compensation": "none", "start_num": 1, "end_num": 4}
    settings["sparsity"] = 0.7  # all that is loaded: rounding must not decide which neurons a token takes
    config = PartInferConfig(method=method, dtype="int8", kernels="native", device="cpu", **settings)
    loaded = load_model(folder, config, random_neuron_file(1, LAYERS, 96))
    calls, run = [], kernels.Decoder.run
    monkeypatch.setattr(
        kernels.Decoder, "run", lambda self, layers, *rest: calls.append(layers) or run(self, layers, *rest)
    )
    together = one_pass(loaded)
    assert not calls
    steps = decoded_logits(loaded.model, CONTEXT, TARGET)
    assert calls == [range(LAYERS)] * len(TARGET), "all layers in one call for every scored token"
    assert not torch.equal(steps, together)
    assert (steps - together).float().square().mean().sqrt() < 0.1 * together.float().std()
