"""What the entry points beside `sltrain-ds` refuse, before anything runs, and how they stop."""

import subprocess

import pytest
from ranks import ROOT

from sltrain_ds import train
from sltrain_ds.cli import verify


def test_verify_needs_a_rank(capsys):
    with pytest.raises(SystemExit) as stopped:
        verify.main(["--ranks", "0"])
    assert stopped.value.code == 2 and "--ranks 0: must be at least 1" in capsys.readouterr().err


def test_single_node_needs_a_config():
    done = subprocess.run(["bash", ROOT / "launch" / "single_node.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launch/single_node.sh CONFIG.json" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "sltrain-ds: stopped; --resume latest continues from the last checkpoint\n"),
        (OSError(28, "No space left on device"), 2, "sltrain-ds: error: rank 0: No space left on device\n"),
        (PermissionError(13, "Denied", "a/b"), 2, "sltrain-ds: error: rank 0: a/b: Denied\n"),
        (
            RuntimeError("[gloo/pair.cc:553] Connection closed by peer [::1]:1. This is"),
            1,
            "sltrain-ds: error: rank 0: another rank has ended\n",
        ),
    ],
)
def test_training_stops_in_one_line(monkeypatch, capsys, error, code, line):
    def stopped(args):
        raise error

    monkeypatch.setattr(train, "_train", stopped)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("RANK", raising=False)
    assert train.main(["config.json"]) == code
    assert capsys.readouterr().err == line
