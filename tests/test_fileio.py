from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from saerl_fast import fileio
from saerl_fast.errors import SaerlError, Unreadable
from saerl_fast.fileio import (
    atomic_path,
    check_writable,
    has_ended,
    move_aside,
    process_mark,
    read_json,
    reason,
    write_json,
    write_text,
)

ROOT = Path(__file__).resolve().parents[1]


def test_replaces_the_target_only_at_the_end(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    write_text(target, "old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent
    assert target.read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path):
    target = write_text(tmp_path / "file.txt", "old")
    with pytest.raises(RuntimeError, match="half way"), atomic_path(target) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_value_json_cannot_hold_leaves_the_old_file(tmp_path):
    target = write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(target, {"a": float("nan")})
    assert read_json(target, "saerl score") == {"a": 1}


def test_files_get_the_usual_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        target = write_text(tmp_path / "file.txt", "x")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "plain").write_text("a file where a folder should be")
    with pytest.raises(SaerlError, match=r"cannot write .*plain/file.txt: .*; choose another run_dir"):
        write_text(tmp_path / "plain" / "file.txt", "x")


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(SaerlError, match=r"cannot write to .*plain: .*; choose another run_dir"):
        check_writable(tmp_path / "plain")
    with pytest.raises(SaerlError, match=r"cannot write to .*plain/deep: .*; choose another run_dir"):
        check_writable(tmp_path / "plain" / "deep")
    check_writable(tmp_path / "new" / "deep")
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(SaerlError, match="cannot write .*Permission denied; choose another run_dir"):
            write_text(tmp_path / "file.txt", "x")
    finally:
        tmp_path.chmod(0o755)


def test_many_processes_may_write_and_probe_at_once(tmp_path):
    code = (
        "import sys; from saerl_fast.fileio import check_writable, write_text\n"
        "print(flush=True); sys.stdin.readline()\n"  # all start together
        "for i in range(300): check_writable(sys.argv[1]); write_text(sys.argv[1] + '/x.txt', 'whole' * 1000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipe) for _ in range(6)]
    for process in processes:
        assert process.stdout.readline() == "\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[1] for process in processes] == [""] * 6
    assert (tmp_path / "run" / "x.txt").read_text() == "whole" * 1000
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["x.txt"]


def test_a_target_that_is_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(SaerlError, match="cannot write .*taken"):
        write_text(tmp_path / "taken", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("content", ['{"a": ', "\u00e9"], ids=["cut off", "not json"])
def test_reading_damaged_json_names_the_command(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(SaerlError, match="not valid JSON.*`saerl plan`"):
        read_json(path, "saerl plan")


def test_reading_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(SaerlError, match="does not exist; make it with `saerl plan`"):
        read_json(tmp_path / "plan.json", "saerl plan")


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "plan.json"
    link.symlink_to("disk/plan.json")
    for text in ("new", "newer"):  # a link to nothing, then to a file
        write_text(link, text)
        assert link.is_symlink() and (tmp_path / "disk" / "plan.json").read_text() == text
    assert len(list(tmp_path.rglob("*"))) == 3


def test_a_private_file_of_a_library_gets_the_mode_of_all_others(tmp_path):
    with atomic_path(tmp_path / "weights") as temporary:
        temporary.chmod(0o600)
    write_text(tmp_path / "text", "")
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "text").stat().st_mode


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "free some space"),
        (RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space" })'), "free some space"),
        (OSError(errno.EFBIG, ""), "(ulimit -f)"),
        (OSError(errno.ENOENT, ""), "its folder was removed meanwhile"),
        (OSError(errno.EROFS, ""), "choose another run_dir"),
        (OSError(errno.ENOTDIR, "Not a directory"), "Not a directory"),
        (OSError("odd"), "odd"),
    ],
)
def test_why_a_file_cannot_be_written_and_what_to_do(error, said):
    assert reason(error).endswith(said) and ("free" in said) == ("free" in reason(error))


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("before", ["file", "folder", "link", "nothing"])
def test_moved_aside_in_place_of_anything(tmp_path, kind, before):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "kept").touch()
    make = {"file": Path.touch, "folder": Path.mkdir, "link": lambda path: path.symlink_to("disk")}
    make.get(before, lambda path: None)(tmp_path / "sae.previous")
    make[kind](tmp_path / "sae")
    assert move_aside(tmp_path / "sae") == tmp_path / "sae.previous"
    assert not (tmp_path / "sae").exists() and (tmp_path / "sae.previous").is_symlink() == (kind == "link")
    assert (tmp_path / "disk" / "kept").exists()


def test_the_mark_of_a_process():
    mark = process_mark()
    machine, pid, started = mark.split("-")
    assert has_ended(mark) is False
    assert has_ended(f"{machine}-{pid}-{int(started) + 1}") is True  # another that had the same id
    assert has_ended(f"{machine}-99999999999-1") is True
    for unknown in ("00000000-1-1", f"{machine}--1-1", f"{machine}-0-1", "", "x"):
        assert has_ended(unknown) is None


@pytest.mark.parametrize(
    ("err", "said"),
    [
        (
            OSError(errno.EMFILE, "x"),
            "cannot read a: Too many open files; raise the limit of open files (ulimit -n)",
        ),
        (OSError(errno.ELOOP, "x"), "cannot read a: Too many levels of symbolic links; make it readable"),
        (Exception("Io(Os { code: 5, kind: Other })"), "cannot read a: Input/output error; check the disk"),
        (
            OSError("Parquet magic bytes not found"),
            "a is damaged (Parquet magic bytes not found); make it again",
        ),
        (FileNotFoundError(2, "none"), "a is missing; make it again"),
        (ValueError("bad"), "a is damaged (bad); make it again"),
    ],
)
def test_what_cannot_be_read_is_not_called_damaged(err, said):
    found = fileio.damaged("a", err, "make it again")
    assert str(found) == said and isinstance(found, Unreadable) == ("cannot" in said)


def test_a_device_is_not_replaced(tmp_path, monkeypatch):
    """Nor is anything written beside it; the rename is taken away, lest a fault harm the machine."""
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("replaced"))
    (tmp_path / "out.json").symlink_to(os.devnull)
    with pytest.raises(SaerlError, match="out.json is a device, /dev/null; remove it"):
        fileio.write_text(tmp_path / "out.json", "x")
    assert Path(os.devnull).is_char_device()
