"""Headers of GGUF files: several parts, other names, damage."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from tests.tiny_gguf import tiny_llama, tiny_metadata, tiny_tensors, write_tiny_gguf
from transformers_patches.config import PartInferConfig
from transformers_patches.errors import PartInferError
from transformers_patches.load.loader import load_model
from transformers_patches.weights.file_kinds import is_gguf
from transformers_patches.weights.gguf_file import read_gguf
from transformers_patches.weights.lookup import gguf_model_name
from transformers_patches.weights.model_files import load_tokenizer

DENSE = {"method": "dense", "dtype": "float32", "device": "cpu", "kernels": "torch"}


def write_parts(folder, count: int, **others: object) -> list:
    """The tiny model in so many files, as llama.cpp's gguf-split names and numbers them."""
    everything = tiny_tensors(tiny_llama())
    names = sorted(everything)
    paths = []
    for part in range(count):
        mine = names[part::count]
        path = folder / f"tiny-{part + 1:05d}-of-{count:05d}.gguf"
        numbers = {"split.no": part, "split.count": count, "split.tensors.count": len(names)} | others
        kept = dict.fromkeys(tiny_metadata(tiny_llama())) if part else {}
        write_tiny_gguf(path, metadata=kept | numbers, tensors={name: None for name in names if name not in mine})
        paths.append(path)
    return paths


@torch.no_grad()
def test_parts_are_read_as_one(tmp_path):
    paths = write_parts(tmp_path, 3)
    ours = load_model(paths[0], PartInferConfig(**DENSE)).model
    for name, weight in tiny_llama().state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert load_tokenizer(paths[0]).tokenize("ab") == ["a", "b"]
    assert gguf_model_name(paths[0]) == "tiny"


def test_parts_that_do_not_belong_together(tmp_path):
    paths = write_parts(tmp_path, 3)
    with pytest.raises(PartInferError, match="is part 2 of 3: give the first one, tiny-00001-of-00003.gguf"):
        read_gguf(paths[1])
    other = paths[0].rename(tmp_path / "other.gguf")
    with pytest.raises(PartInferError, match="is one of 3 parts: name them"):
        read_gguf(other)
    other.rename(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(PartInferError, match="00003-of-00003.gguf is not part 3 of 3"):
        read_gguf(paths[0])
    paths[2].unlink()
    with pytest.raises(PartInferError, match="first of 3 parts, but tiny-00003-of-00003.gguf is not there"):
        read_gguf(paths[0])
    paths = write_parts(tmp_path, 2, **{"split.tensors.count": 5})
    with pytest.raises(PartInferError, match="but 5 are named"):
        read_gguf(paths[0])


def test_a_file_is_known_by_its_first_bytes(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    other = (tmp_path / "tiny.gguf").rename(tmp_path / "model.bin")
    assert is_gguf(other)
    assert load_model(other, PartInferConfig(**DENSE)).model.config.model_type == "llama"
    (tmp_path / "text.txt").write_text("GGU")
    (tmp_path / "folder.gguf").mkdir()
    assert not any(is_gguf(tmp_path / name) for name in ("text.txt", "folder.gguf", "nothing", ""))
    assert is_gguf(tmp_path / "not-there.gguf")


def header(*parts: bytes, tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join(parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def described(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF", "ends inside its header"),
        (b"GGML" + bytes(100), "starts with other bytes than GGUF"),
        (header(version=1), "version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(tensors=2**63), "tensors don't fit into its 24 bytes"),
        (header(pairs=2**40), "metadata keys don't fit"),
        (header(struct.pack("<Q", 2**62), bytes(20), pairs=1), "bytes of a key don't fit"),
        (header(text("k"), struct.pack("<I", 77), bytes(9), pairs=1), "'k' has the unknown type 77"),
        (
            header(text("k"), struct.pack("<IIQ", 9, 4, 2**61), bytes(9), pairs=1),
            "numbers of the value of 'k' don't fit",
        ),
        (
            header(text("k"), struct.pack("<IIQ", 9, 8, 2**61), bytes(9), pairs=1),
            "strings of the value of 'k' don't fit",
        ),
        (header(text("k"), struct.pack("<IIQ", 9, 9, 1), bytes(20), pairs=1), "has the unknown type 9"),
        (header(*[text("k"), struct.pack("<II", 4, 1)] * 2, pairs=2), "'k' is there twice"),
        (header(struct.pack("<Q", 2), b"\xff\xfe", bytes(20), pairs=1), "a key is no UTF-8"),
        (
            header(text("general.alignment"), struct.pack("<II", 4, 3), pairs=1),
            "alignment must be a power of two, got 3",
        ),
        (header(described("t", (4,), 99, 0), bytes(64), tensors=1), "unknown type 99"),
        (
            header(described("t", (4,), gguf.GGMLQuantizationType.I64, 0), bytes(64), tensors=1),
            "in I64, a type that can't",
        ),
        (header(described("t", (0,), 0, 0), bytes(64), tensors=1), r"has the shape \(0,\)"),
        (header(described("t", (33, 2), 8, 0), bytes(99), tensors=1), r"shape \(2, 33\) in Q8_0, blocks of 32 values"),
        (header(described("t", (1,) * 9, 0, 0), bytes(64), tensors=1), "has 9 dimensions"),
        (header(described("t", (4,), 0, 2**60), bytes(64), tensors=1), "should start at byte 0"),
        (header(described("t", (2**62, 8), 0, 0), bytes(64), tensors=1), "reaches beyond the file's"),
        (header(described("t", (40,), 0, 0), bytes(64), tensors=1), "reaches beyond the file's"),
        (header(*(described("t", (8,), 0, offset) for offset in (0, 32)), bytes(99), tensors=2), "'t' is there twice"),
        (header(*(described(name, (8,), 0, 0) for name in "ab"), bytes(99), tensors=2), "'b' should start at byte 32"),
    ],
)
def test_damage_is_told_in_one_line(data, message, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(PartInferError, match=message) as raised:
        read_gguf(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_metadata_of_every_type(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int16("i16", -5)
    writer.add_uint64("u64", 2**63)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("name", "Größe")
    writer.add_array("floats", [0.5, -1.0])
    writer.add_array("flags", [True, False])
    writer.add_array("texts", ["", "é"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = read_gguf(tmp_path / "tiny.gguf").metadata
    assert {name: found[name] for name in ("u8", "i16", "u64", "f64", "yes", "name", "texts")} == {
        "u8": 200,
        "i16": -5,
        "u64": 2**63,
        "f64": 0.1,
        "yes": True,
        "name": "Größe",
        "texts": ["", "é"],
    }
    assert found["yes"] is True
    assert np.array_equal(found["floats"], [0.5, -1.0])
    assert found["flags"].tolist() == [True, False]
