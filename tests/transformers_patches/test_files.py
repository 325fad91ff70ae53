"""Files are whole or not there, and nothing temporary stays behind."""

import pytest

from transformers_patches.files import atomic_path, write_text_atomic


def test_text_is_written_and_folders_are_made(tmp_path):
    write_text_atomic(tmp_path / "new" / "a.txt", "Grüße\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "Grüße\n"
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_file(tmp_path, interruption):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            assert path.read_text() == "old"
            raise interruption

    with pytest.raises(type(interruption)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
