"""Files are whole or not there, and nothing temporary stays behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from transformers_patches import files
from transformers_patches.errors import PartInferError
from transformers_patches.files import atomic_folder, atomic_path, check_new, scratch_folder, write_text_atomic
from transformers_patches.locks import PARTIAL, exclusive

ROOT = Path(__file__).parents[2]


def in_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def umask(value: int):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_and_folders_follow_the_umask(tmp_path, mask, expected):
    with umask(mask):
        write_text_atomic(tmp_path / "a.txt", "new")
        with atomic_folder(tmp_path / "b") as folder:
            (folder / "c").touch()
    assert mode(tmp_path / "a.txt") == mode(tmp_path / "b" / "c") == expected
    assert mode(tmp_path / "b") == 0o777 & ~mask


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.txt").chmod(0o640)
    write_text_atomic(tmp_path / "a.txt", "new")
    assert mode(tmp_path / "a.txt") == 0o640


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(tmp_path, there):
    target = tmp_path / "elsewhere" / "a.txt"
    target.parent.mkdir()
    if there:
        target.write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    write_text_atomic(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert in_folder(target.parent) == ["a.txt"]


def test_a_pipe_is_written_to_as_text_and_refused_as_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text_atomic(pipe, "text")
    reader.join(30)
    assert read == ["text"]
    with pytest.raises(PartInferError, match="pipe is a pipe: give the path of a file$"), atomic_path(pipe):
        pass
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_devices_stay_devices(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    write_text_atomic(tmp_path / "null", "text")
    with pytest.raises(PartInferError, match="null is a device"):
        check_new(tmp_path / "null", overwrite=True)
    with pytest.raises(PartInferError, match="null is a device"), atomic_path(tmp_path / "null"):
        pass
    assert Path("/dev/null").is_char_device()


def test_standard_output_into_a_file_goes_on(tmp_path):
    code = "import sys; from transformers_patches.files import write_text_atomic as w; print('a', flush=True);"
    code += "w('/dev/stdout', 'b\\n'); print('c', flush=True)"
    with open(tmp_path / "out", "a") as out:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "a\nb\nc\n"


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(PartInferError, match="is a folder: give the path of a file$"):
        write_text_atomic(tmp_path, "text")


def test_an_output_is_replaced_when_asked_only(tmp_path):
    (tmp_path / "a").touch()
    check_new(tmp_path / "b", overwrite=False)
    check_new(tmp_path / "a", overwrite=True)
    with pytest.raises(
        PartInferError, match="a already exists: replace it with --overwrite, or give another --output$"
    ):
        check_new(tmp_path / "a", overwrite=False)


KILLED = """
import os, signal, sys
from transformers_patches.files import atomic_folder, atomic_path
from transformers_patches.locks import exclusive
with exclusive({path!r}), {function}({path!r}) as temporary:
    print(temporary, flush=True)
    {wait}
    os.kill(os.getpid(), signal.SIGKILL)
"""


def writer(path: Path, function: str, wait: str = "pass") -> subprocess.Popen:
    code = KILLED.format(path=str(path), function=function, wait=wait)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize("function", ["atomic_path", "atomic_folder"])
def test_what_a_killed_writer_left_goes_with_the_next_write_and_that_of_a_live_one_stays(tmp_path, function):
    killed = writer(tmp_path / "killed", function)
    killed.communicate()
    assert len([name for name in in_folder(tmp_path) if name.endswith(PARTIAL)]) == 1
    alive = writer(tmp_path / "alive", function, "sys.stdin.readline()")
    temporary = Path(alive.stdout.readline().decode().strip())
    (tmp_path / f".somebody{PARTIAL}.txt").touch()
    write_text_atomic(tmp_path / "other", "text")
    assert in_folder(tmp_path) == sorted(["other", f".somebody{PARTIAL}.txt", temporary.name, ".alive.partinfer-lock"])
    with pytest.raises(PartInferError, match="another run is writing .*alive"), exclusive(tmp_path / "alive"):
        pass
    alive.communicate(b"\n")
    with exclusive(tmp_path / "alive"):
        pass
    assert in_folder(tmp_path) == sorted(["other", f".somebody{PARTIAL}.txt"])


def test_one_lock_for_all_names_of_an_output(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "place")
    with (
        exclusive(tmp_path / "place"),
        pytest.raises(PartInferError, match="another run is writing .*link"),
        exclusive(tmp_path / "link"),
    ):
        pass


def test_many_writers_at_once_leave_one_whole_file(tmp_path):
    contents = [str(number) * 10000 for number in range(8)]

    def write(content):
        for _ in range(10):
            write_text_atomic(tmp_path / "a", content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in contents
    assert in_folder(tmp_path) == ["a"]


def test_a_full_disk_is_an_error_about_the_file(small_disk):
    path = small_disk / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left") as caught:
        write_text_atomic(path, "x" * 10**6)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert in_folder(small_disk) == ["a.txt"]


def test_scratch_folders_go_also_those_of_killed_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f".partinfer-speed.0{PARTIAL}").mkdir()
    with scratch_folder("speed") as folder:
        (folder / "a").touch()
        assert in_folder(tmp_path) == [folder.name]
        assert mode(folder) == 0o700
    assert in_folder(tmp_path) == []
