"""What the entry points beside `sltrain-ds` refuse, before anything runs."""

import subprocess
from pathlib import Path

import pytest
from ranks import ROOT

from sltrain_ds import train, verify


def test_verify_needs_a_rank(capsys):
    with pytest.raises(SystemExit) as stopped:
        verify.main(["--ranks", "0"])
    assert stopped.value.code == 2 and "--ranks 0: must be at least 1" in capsys.readouterr().err


def test_single_node_needs_a_config():
    done = subprocess.run(["bash", ROOT / "launch" / "single_node.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launch/single_node.sh CONFIG.json" in done.stderr


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda _: Path("/dev/full").write_text("line"), "No space left on device"),
        (lambda _: Path("no/such/file").read_text(), "no/such/file: No such file or directory"),
    ],
)
def test_a_failed_write_is_one_line_without_none(monkeypatch, capsys, work, said):
    monkeypatch.setattr(train, "_train", work)
    assert train.main(["config.json"]) == 2
    err = capsys.readouterr().err
    assert said in err and "None" not in err and err.startswith("sltrain-ds: error: rank 0: ") and err.count("\n") == 1
