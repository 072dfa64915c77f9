"""What the entry points beside `sltrain-ds` refuse, before anything runs."""

import subprocess

import pytest
from ranks import ROOT

from sltrain_ds import verify


def test_verify_needs_a_rank(capsys):
    with pytest.raises(SystemExit) as stopped:
        verify.main(["--ranks", "0"])
    assert stopped.value.code == 2 and "--ranks 0: must be at least 1" in capsys.readouterr().err


def test_single_node_needs_a_config():
    done = subprocess.run(["bash", ROOT / "launch" / "single_node.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launch/single_node.sh CONFIG.json" in done.stderr
