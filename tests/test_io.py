"""What a command may write, and what is left when it cannot."""

import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from pdrop_jax import io
from pdrop_jax.errors import UserError
from pdrop_jax.io import check_new_folder, check_output, check_outputs, inside, put_in_place, write_file, written_aside


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def content():
    return {path.name: path.read_bytes() for path in pathlib.Path().iterdir() if path.is_file()}


def test_a_new_file_and_one_that_is_there():
    write_file("a.txt", "first")
    with pytest.raises(UserError, match=r"a\.txt exists: choose another name, or replace the file with --overwrite"):
        write_file("a.txt", "second")
    assert content() == {"a.txt": b"first"}
    os.chmod("a.txt", 0o600)
    write_file("a.txt", b"second", overwrite=True)
    assert content() == {"a.txt": b"second"}
    assert os.stat("a.txt").st_mode & 0o777 == 0o600


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_file_stays(overwrite):
    os.mkfifo("fifo")
    os.mkdir("folder")
    pathlib.Path("device").symlink_to("/dev/null")
    pathlib.Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    refused = {
        "fifo": "fifo is a FIFO",
        "folder": "folder is a folder",
        ".": r"\. is a folder",
        "device": "device is a device",
        "/dev/full": "/dev/full is a device",
        "socket": "socket is a socket",
        "loop": "loop cannot be written: Too many levels of symbolic links",
        "nowhere/a": "nowhere/a: there is no folder nowhere",
        "a\0b": "a\0b cannot be written: ",
        "x" * 300: "cannot be written: File name too long",
    }
    for path, words in refused.items():
        with pytest.raises(UserError, match=words):
            write_file(path, "x", overwrite)
        assert content() == {}
    assert os.path.exists("fifo")


def test_a_link_is_followed():
    os.mkdir("folder")
    pathlib.Path("link").symlink_to("folder/a")
    write_file("link", "x")
    assert pathlib.Path("folder/a").read_text() == "x"
    write_file("link", "y", overwrite=True)
    assert pathlib.Path("folder/a").read_text() == "y"
    assert pathlib.Path("link").is_symlink()
    with pytest.raises(UserError, match="link exists"):
        write_file("link", "z")
    pathlib.Path("dangling").symlink_to("nowhere/a")
    with pytest.raises(UserError, match=r"dangling: there is no folder .*/nowhere"):
        write_file("dangling", "x")


def test_no_input_is_replaced_by_whatever_name():
    os.mkdir("model")
    for name in ("q.jsonl", "model/config.json"):
        pathlib.Path(name).write_text("input")
    pathlib.Path("soft").symlink_to("q.jsonl")
    os.link("q.jsonl", "hard")
    for path in ("q.jsonl", "soft", "hard", "./model/../q.jsonl", "model/config.json"):
        with pytest.raises(UserError, match="is read by this command: write to another file"):
            check_output(path, overwrite=True, inputs=["nowhere", "q.jsonl", "model"])
    assert check_output("model/new.json", inputs=["model"]) == pathlib.Path.cwd() / "model/new.json"


def test_endings_and_two_outputs_of_one_name():
    with pytest.raises(UserError, match=r"a\.txt: the name ends in '\.txt', expected \.png, \.svg"):
        check_output("a.txt", endings=(".png", ".svg"))
    assert check_output("a.PNG", endings=(".png", ".svg")).name == "a.PNG"
    check_outputs([("a.png", [".png"]), (None, [".svg"]), ("b.x", ())])
    pathlib.Path("link").symlink_to("a")
    with pytest.raises(UserError, match=r"/a is used for two outputs"):
        check_outputs([("a", ()), ("link", ())])


def test_what_was_made_meanwhile_stays_and_nothing_is_lost():
    def write(theirs, overwrite):
        with written_aside("a.txt", overwrite) as new:
            new.write_text("ours")
            theirs()

    with pytest.raises(
        UserError, match=r"/a\.txt was created by another program in the meantime: .* is in (\S+)"
    ) as caught:
        write(lambda: pathlib.Path("a.txt").write_text("theirs"), overwrite=False)
    spare = pathlib.Path(str(caught.value).rpartition(" ")[2])
    assert content() == {"a.txt": b"theirs", spare.name: b"ours"}
    assert spare.suffix == ".txt"
    os.unlink("a.txt")
    with pytest.raises(UserError, match="is a folder"):
        write(lambda: os.mkdir("a.txt"), overwrite=True)


def test_without_hard_links(monkeypatch):
    def link(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", link)  # as on a FAT file system
    write_file("a.txt", "x")
    with pytest.raises(UserError, match="exists"):
        put_in_place(pathlib.Path("a.txt"), pathlib.Path("a.txt"), overwrite=False)
    assert content() == {"a.txt": b"x"}


@pytest.mark.parametrize("before", [None, "older"])
def test_a_full_disk_leaves_what_was_there(before):
    if before:
        pathlib.Path("a.txt").write_text(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # an OSError in the middle, as of a full disk
    try:
        with pytest.raises(OSError, match=r"too large: 'a\.txt'"):
            write_file("a.txt", bytes(5000), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content() == ({"a.txt": before.encode()} if before else {})


def python(code):
    return subprocess.Popen([sys.executable, "-c", f"import os; from pdrop_jax.io import *\n{code}"])


def test_processes_that_write_at_once_do_not_share_a_file():
    write = "for _ in range(50): write_file('a.txt', '{}' * 10**6, overwrite=True)"
    processes = [python(write.format(number)) for number in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    (written,) = content().values()
    assert written in [f"{number}".encode() * 10**6 for number in range(3)]


def test_what_a_killed_process_leaves_is_removed_a_day_later():
    killed = python("with written_aside('a.txt') as new: new.write_text('half'); os.kill(os.getpid(), 9)")
    assert killed.wait(60) == -signal.SIGKILL
    (left,) = pathlib.Path().iterdir()
    write_file("b.txt", "x")
    assert left.exists()  # another process may be writing it
    day = time.time() - io.OLD - 1
    os.utime(left, (day, day))
    write_file("c.txt", "x")
    assert sorted(content()) == ["b.txt", "c.txt"]


def test_a_new_folder():
    check_new_folder("a/b/c")
    pathlib.Path("file").touch()
    pathlib.Path("dangling").symlink_to("nowhere")
    for path, words in {
        "file": "file exists: remove it",
        "dangling": "dangling exists",
        ".": "exists",
        "file/a": "/file is not a folder",
        "/dev/null/a": "/dev/null is not a folder",
    }.items():
        with pytest.raises(UserError, match=words):
            check_new_folder(path)


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [
        ("images", "1.png", True),
        ("images", "coco/train/1.png", True),
        (".", "./1.png", True),
        ("", "1.png", True),
        ("/images", "/images/1.png", True),
        ("/", "1.png", True),
        ("images", "../secret.png", False),
        ("images", "a/../../secret.png", False),
        ("images", "link/../secret.png", False),
        ("images", "/etc/passwd", False),
        ("/images", "/images2/1.png", False),
        ("images", ".", False),
    ],
)
def test_names_inside_a_folder(folder, name, expected):
    assert inside(folder, name) == expected
