"""Steps that are recorded and replayed, with a stand-in for the GPU's recorder: replaying calls the step again."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from tests.transformers_patches.model_passes import DATASET, MODEL
from transformers_patches.config import PartInferConfig
from transformers_patches.fast_pass import recorded_pass as module
from transformers_patches.fast_pass.kv_cache import GrowingCache
from transformers_patches.fast_pass.recorded_pass import record_steps, recorded_pass
from transformers_patches.generation.generate import generate_ids
from transformers_patches.kernels import triton
from transformers_patches.load.loader import load_model

PROMPTS = torch.tensor([[5, 17, 33, 40, 21, 9]]), torch.tensor([[9, 8, 7, 61, 5, 4, 3, 19, 30]])


class Recorder:
    """Replays by calling, and counts what is recorded."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, step):
        self.recorded += 1
        return step


def load(folder, recorder=None, **settings):
    options = {"dtype": "float32", "selection": "up", "start_num": 1, "end_num": 4, "sparsity": 0.4} | settings
    loaded = load_model(folder, PartInferConfig(device="cpu", kernels="torch", **options), DATASET, MODEL)
    loaded.model.generation_config.eos_token_id = None
    if recorder is not None:
        assert record_steps(loaded.model, loaded.state, recorder)
    return loaded


def answer(loaded, prompt=PROMPTS[0], tokens=8, cache=None) -> list[int]:
    config = GenerationConfig(max_new_tokens=tokens, pad_token_id=0, do_sample=False)
    return generate_ids(loaded, prompt, config, None, cache).tolist()


def counted(loaded) -> list[tuple[int, int, int]]:
    return [(c.tokens, c.neurons, c.rows) for c in (layer.counters for layer in loaded.state.layers)]


@pytest.mark.parametrize(
    ("family", "settings", "recordings"),
    [
        ("llama", {}, 1),
        ("llama", {"selection": "blend", "compensation": "none"}, 1),
        ("llama-mlp-bias", {"selection": "gate"}, 1),
        ("qwen2", {"token_count": "average"}, 2),  # the shorter prompt is too short for a threshold
        ("opt", {}, 1),
        ("smollm2", {"method": "dense", "selection": "auto"}, 1),
    ],
)
def test_answers_are_those_without_recordings(tiny_checkpoints, family, settings, recordings):
    """Two prompts, whose tokens choose differently, by one recording; what is computed is counted."""
    recorder = Recorder()
    plain, ours = load(tiny_checkpoints[family], **settings), load(tiny_checkpoints[family], recorder, **settings)
    for prompt in PROMPTS:
        assert answer(ours, prompt) == answer(plain, prompt)
    assert recorder.recorded == recordings
    assert counted(ours) == counted(plain)
    assert recorded_pass(ours.model).why_not == ""


def test_a_cache_that_outgrows_a_recording_gets_a_larger_one(tiny_checkpoints, monkeypatch):
    monkeypatch.setattr(module, "ROOM", 4)
    recorder = Recorder()
    plain, ours = load(tiny_checkpoints["llama"]), load(tiny_checkpoints["llama"], recorder)
    assert answer(ours, tokens=20) == answer(plain, tokens=20)
    assert recorder.recorded == 2  # for 16 and 32 tokens
    assert answer(ours, tokens=20) == answer(plain, tokens=20)
    assert recorder.recorded == 2


def test_a_cache_that_another_one_replaces_keeps_its_tokens(tiny_checkpoints):
    ours, caches = load(tiny_checkpoints["llama"], Recorder()), (GrowingCache(), GrowingCache())
    answer(ours, PROMPTS[0], cache=caches[0])
    before = [layer.keys.clone() for layer in caches[0].layers]
    answer(ours, PROMPTS[1], cache=caches[1])
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(caches[0].layers, before, strict=True))
    assert caches[0].layers[0]._keys is not caches[1].layers[0]._keys


def test_few_recordings_are_kept(tiny_checkpoints, monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", 1)
    monkeypatch.setattr(module, "ROOM", 4)
    recorder = Recorder()
    ours = load(tiny_checkpoints["llama"], recorder)
    answer(ours, tokens=20)
    step = recorded_pass(ours.model)
    assert (recorder.recorded, len(step._recordings), len(step._owners)) == (2, 1, 1)


def wrong(step):
    """A recorder whose steps always give what the first one gave."""
    logits = step().flip(-1)
    return lambda: logits


def failing(step):
    raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


@pytest.mark.parametrize(
    ("recorder", "said"), [(wrong, "logits are"), (failing, "not permitted when stream is capturing;")]
)
def test_without_a_right_recording_the_model_answers_by_itself(tiny_checkpoints, capsys, recorder, said):
    plain, ours = load(tiny_checkpoints["llama"]), load(tiny_checkpoints["llama"], recorder)
    for prompt in PROMPTS:
        assert answer(ours, prompt) == answer(plain, prompt)
    assert counted(ours) == counted(plain)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_hooks_are_not_skipped(tiny_checkpoints):
    recorder, seen = Recorder(), []
    ours = load(tiny_checkpoints["llama"], recorder)
    with ours.model.model.layers[0].register_forward_hook(lambda *_: seen.append(1)):
        answer(ours, tokens=3)
    assert (recorder.recorded, len(seen)) == (0, 3)


def test_models_with_sliding_windows_are_not_recorded(tiny_checkpoints):
    loaded = load(tiny_checkpoints["gemma3"])
    assert not record_steps(loaded.model, loaded.state, Recorder())
    assert recorded_pass(loaded.model) is None


class NoWaiting(TorchDispatchMode):
    """Refuses every operation for which the processor would wait for a GPU."""

    WAITS = {"_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "item"}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.name().split("::")[1].split(".")[0]
        assert name not in self.WAITS, f"{name} waits for the device"
        return operation(*arguments, **(options or {}))


@pytest.mark.skipif(torch.cuda.is_available() or not triton.available(), reason="needs Triton's interpreter")
def test_a_step_with_the_gpu_s_kernels_never_waits(tiny_checkpoints, monkeypatch):
    settings = {"end_num": 1}  # one sparse layer: the interpreter is slow
    monkeypatch.setattr(triton, "computes_on", lambda device: True)
    monkeypatch.setattr("transformers_patches.plan.run.decide_kernels", as_on_a_gpu)
    monkeypatch.setattr("transformers_patches.load.loader.record_steps", lambda *_: True)

    def watched(step):
        def replay():
            with NoWaiting():
                return step()

        return replay

    plain, ours = load(tiny_checkpoints["qwen2"], **settings), load(tiny_checkpoints["qwen2"], watched, **settings)
    assert answer(ours, tokens=3) == answer(plain, tokens=3)
    assert recorded_pass(ours.model).why_not == ""


def as_on_a_gpu(*_):
    from transformers_patches.plan.decision import Decision

    return Decision("triton", "as on a GPU")
