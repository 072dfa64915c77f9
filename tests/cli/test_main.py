"""The dispatcher: every verb is told, and what a file system says is one line."""

import os
import signal
import sys

import pytest

from sltrain_ds import cli
from sltrain_ds.cli import VERBS, main
from sltrain_ds.errors import UserError
from sltrain_ds.files import new_directory


@pytest.mark.parametrize("arguments", [["foo", "data"], ["foo"], ["dat"], []])
def test_an_unknown_verb_lists_them_all(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    told = capsys.readouterr().err
    assert caught.value.code == 2
    for verb in VERBS if arguments else ["VERB"]:
        assert verb in told


def test_help_lists_them_all(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and all(f"\n    {verb} " in out or f"\n    {verb}\n" in out for verb in VERBS)


def test_a_path_below_a_file(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    text = tmp_path / "text.txt"
    text.write_text("Some words.\n")
    out = tmp_path / "file" / "d"
    arguments = ["--input", str(text), "--tokenizer", str(tiny["tokenizer"]), "--out", str(out)]
    assert main(["data", "prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sltrain-ds: error: ") and str(tmp_path / "file") in error and error.count("\n") == 1


@pytest.fixture
def doctor(monkeypatch):
    """doctor(run): `sltrain-ds doctor` calls run() alone."""

    def replace(run):
        class Verb:
            add_parser = staticmethod(lambda subparsers: subparsers.add_parser("doctor"))

        Verb.run = staticmethod(lambda args: run())
        monkeypatch.setattr(cli, "import_module", lambda name: Verb)

    return replace


@pytest.mark.parametrize(
    "error, line",
    [
        (PermissionError(13, "Permission denied", "place/file"), "place/file: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("first\nsecond"), "first"),
        (ConnectionError(), "ConnectionError"),
    ],
)
def test_os_errors_take_one_line(doctor, capsys, error, line):
    def fails():
        raise error

    doctor(fails)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"sltrain-ds: error: {line}\n"


def test_a_sigterm_unwinds_as_ctrl_c_does(doctor, monkeypatch):
    removed = []

    def is_stopped():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            removed.append(True)

    doctor(is_stopped)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["sltrain-ds", "doctor"])
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143 and removed


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    message = r"file/out: cannot be made \(Not a directory\)"
    with pytest.raises(UserError, match=message), new_directory(tmp_path / "file" / "out"):
        pass
