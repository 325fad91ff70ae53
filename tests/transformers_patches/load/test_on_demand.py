"""Neurons that are read when tokens choose them: the same answers, to the last bit, as with all of them in memory."""

import gc
import os
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transformers_patches import PartInferConfig, PartInferError, kernels
from transformers_patches.fast_pass.one_token import new_cache
from transformers_patches.load.loader import load_model
from transformers_patches.load.pack_writer import write_pack
from transformers_patches.neurons.neuron_file import STATISTICS, NeuronFile
from transformers_patches.weights.records import NAME

HIDDEN, NEURONS, LAYERS, VOCABULARY = 64, 700, 3, 128
EVERYTHING = {"start_num": 0, "end_num": LAYERS - 1, "sparsity": 0.7, "base_neurons_percent": 0.0, "device": "cpu"}
KINDS = ("bfloat16", "int8", "int4")


@pytest.fixture(autouse=True)
def native():
    if not kernels.available():
        pytest.skip(f"no native kernels: {kernels.why_not()}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packs(checkpoint, tmp_path_factory):
    """packs(dtype): of all neurons, made once."""
    root, made = tmp_path_factory.mktemp("packs"), {}

    def pack(dtype: str):
        if dtype not in made:
            made[dtype] = root / dtype
            settings = PartInferConfig(loaded_neurons_percent=1.0, dtype=dtype, selection="up", **EVERYTHING)
            write_pack(checkpoint, made[dtype], settings)
        return made[dtype]

    return pack


def load(pack, resident: float, on_demand: str = "on", **options):
    given = {"loaded_neurons_percent": resident, "on_demand": on_demand, "selection": "up"} | EVERYTHING | options
    return load_model(pack, PartInferConfig(**given))


@torch.inference_mode()
def passes(loaded, tokens: int = 20) -> torch.Tensor:
    """The logits of a prompt and of greedy tokens after it, one at a time."""
    cache = new_cache(loaded.model)
    logits = [loaded.model(torch.arange(3, 15)[None], past_key_values=cache, use_cache=True).logits[:, -1:]]
    for _ in range(tokens):
        logits.append(loaded.model(logits[-1].argmax(-1), past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("resident", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("dtype", KINDS)
def test_the_same_to_the_last_bit(packs, dtype, resident):
    whole, part = load(packs(dtype), 1.0, "off"), load(packs(dtype), resident)
    assert torch.equal(passes(part), passes(whole))
    assert torch.equal(passes(part), passes(whole)), "once more, with other rows in memory"
    counts = part.rows_on_disk.take_counts()
    assert (counts.found > 0) == (resident > 0)
    assert counts.found < counts.chosen
    assert min(counts.reads, counts.bytes_read) > 0
    record = part.state.layers[0].rows.record_bytes
    assert part.report.bytes_in_file == sum(NEURONS - round(resident * NEURONS) for _ in range(LAYERS)) * record
    assert part.computed_fraction() == whole.computed_fraction()


def test_batches_and_several_tokens_at_once(packs):
    whole, part = load(packs("int4"), 1.0, "off"), load(packs("int4"), 0.4)
    ids = torch.arange(24).view(2, 12) + 2
    for loaded in (whole, part):
        with torch.inference_mode():
            cache = new_cache(loaded.model)
            first = loaded.model(ids, past_key_values=cache, use_cache=True).logits
            more = loaded.model(ids[:, :3], past_key_values=cache, use_cache=True).logits
        loaded.seen = torch.cat([first, more], dim=1)
    assert torch.equal(part.seen, whole.seen)


def test_rows_that_are_chosen_often_stay_in_memory(packs):
    part = load(packs("int8"), 0.6)
    passes(part, 5)
    part.rows_on_disk.take_counts()
    passes(part, 60)
    counts = part.rows_on_disk.take_counts()
    assert counts.found / counts.chosen > 0.6, "more than chance"


def test_auto_is_on_where_the_pack_has_all_neurons(packs, checkpoint):
    part = load(packs("int4"), 0.8, "auto")
    assert part.rows_on_disk is not None
    assert part.run.decisions["on_demand"].value == part.settings.on_demand == "on"
    assert part.plan.loaded_fraction == 1
    assert load(packs("int4"), 1.0, "auto").rows_on_disk is None
    with pytest.raises(PartInferError, match="partial loading needs a neuron file"):
        load(packs("int4"), 0.8, "off")  # the original leaves out the worst ones, and must know which
    assert load_model(checkpoint, PartInferConfig(loaded_neurons_percent=1.0, **EVERYTHING)).rows_on_disk is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "gate"}, "selection gate does not choose by up"),
        ({"kernels": "torch"}, "only the native kernels read on demand"),
        ({"compensation": "mean"}, "for neurons that are left out"),
    ],
)
def test_what_cannot_be_read_on_demand_is_refused(packs, options, message):
    with pytest.raises(PartInferError, match=message):
        load(packs("int4"), 0.5, **options)


def test_without_a_pack_of_all_neurons_it_is_refused(checkpoint):
    with pytest.raises(PartInferError, match="it needs a pack of all neurons: --make_pack makes one"):
        load(checkpoint, 0.5)


def test_a_pack_made_with_a_neuron_file(checkpoint, tmp_path):
    """Whose statistics say nothing about compensation where nothing is left out."""
    ranking = torch.stack([torch.randperm(NEURONS) for _ in range(LAYERS)]).int()
    neurons = NeuronFile(ranking, statistics={name: torch.rand(LAYERS, NEURONS) for name in STATISTICS})
    pack, own = tmp_path / "pack", PartInferConfig(loaded_neurons_percent=1.0, dtype="int8", **EVERYTHING)
    write_pack(checkpoint, pack, own, neurons)
    whole = load_model(pack, PartInferConfig(loaded_neurons_percent=1.0, on_demand="off", **EVERYTHING), neurons)
    part = load_model(pack, PartInferConfig(loaded_neurons_percent=0.4, on_demand="on", **EVERYTHING), neurons)
    assert torch.equal(passes(part), passes(whole))
    assert part.rows_on_disk.take_counts().bytes_read > 0


def test_the_file_is_written_once(packs, tmp_path):
    pack = shutil.copytree(packs("int8"), tmp_path / "pack")
    (pack / NAME).unlink(missing_ok=True)
    expected = passes(load(pack, 0.5))
    written = (pack / NAME).stat().st_mtime_ns
    assert torch.equal(passes(load(pack, 0.5)), expected)
    assert (pack / NAME).stat().st_mtime_ns == written
    content = bytearray((pack / NAME).read_bytes())
    content[5] ^= 1
    (pack / NAME).write_bytes(content)
    assert torch.equal(passes(load(pack, 0.5)), expected), "a file of another pack is written again"


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_a_file_that_ends_too_early_is_an_error(packs, tmp_path, dtype):
    pack = shutil.copytree(packs(dtype), tmp_path / "pack")
    part = load(pack, 0.2)
    before = passes(part, 3)
    name = NAME if dtype == "int4" else "model-00001-of-00001.safetensors"
    path = pack / name if (pack / name).exists() else next(pack.glob("*.safetensors"))
    cache = new_cache(part.model)
    with torch.inference_mode():
        part.model(torch.arange(3, 15)[None], past_key_values=cache, use_cache=True)
        os.truncate(path, 5000)
        with pytest.raises(PartInferError, match="can't be read: it ends too early; make the pack again"):
            part.model(before[:, :1].argmax(-1), past_key_values=cache, use_cache=True)
    with pytest.raises(PartInferError, match="was changed while it was in use|can't be read"):
        passes(part, 1)


def test_files_and_threads_are_given_back(packs):
    def used() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    passes(load(packs("int4"), 0.5), 2)
    before = used()
    for _ in range(3):
        passes(load(packs("int4"), 0.5), 2)
    gc.collect()
    assert used() <= (before[0] + 1, before[1] + 1)
