"""Every check gets its line and the exit code counts the failures; what checks compare, they tell apart."""

import pytest

from sltrain_ds.cli import verify
from sltrain_ds.errors import UserError


class NoRuns:
    def __init__(self, folder, ranks):
        self.ranks = ranks


def wrong(node):
    raise UserError("sltrain.steps: is wrong")


def none_found(node):
    return [line for line in ()][-1]


@pytest.fixture
def verified(monkeypatch, capsys):
    def run(checks, node=NoRuns):
        monkeypatch.setattr(verify, "versions", lambda: "versions")
        monkeypatch.setattr(verify, "Node", node)
        monkeypatch.setattr(verify, "CHECKS", checks)
        code = verify.main(["--ranks", "2"])
        return code, capsys.readouterr().out.splitlines()

    return run


def test_a_check_that_breaks_fails_alone(verified):
    code, lines = verified({"first": wrong, "second": none_found, "third": lambda node: f"{node.ranks} ranks"})
    assert code == 1
    assert [line.split(maxsplit=2) for line in lines[1:4]] == [
        ["FAIL", "first", "UserError: sltrain.steps: is wrong"],
        ["FAIL", "second", "IndexError: list index out of range"],
        ["pass", "third", "2 ranks"],
    ]
    assert lines[4].startswith("2 of 3 failed, 2 ranks")


def test_all_pass(verified):
    assert verified({"first": lambda node: "fine"})[0] == 0


def test_without_its_data_it_fails_in_a_line(verified):
    def node(folder, ranks):
        raise verify.Failed("python exited with code 1: no space left")

    code, lines = verified({"first": wrong}, node)
    assert code == 1 and lines[1:] == [
        f"FAIL  {'tokenizer and data of the shipped corpus':<44} python exited with code 1: no space left"
    ]


def test_losses_are_compared_to_the_bit_or_nearly(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    lines = [{"loss": 2.0 + step} for step in range(verify.STEPS)] + [{"eval_loss": 3.0}]
    nearly = [{**lines[0], "loss": 2.0 * (1 + 5e-6)}, *lines[1:]]
    assert "equal to the bit" in verify._same(lines, lines, exact=True)
    assert "within 5.0e-06" in verify._same(lines, nearly, exact=False)
    for first, second, exact in ((lines, nearly, True), (lines, lines[1:], False), (lines[1:], lines[1:], False)):
        with pytest.raises(verify.Failed):
            verify._same(first, second, exact)


def test_sizes_are_compared_both_ways():
    assert "+4.0%" in verify._near(104, 100, 0.05)
    for found in (94, 106):
        with pytest.raises(verify.Failed, match=r"5% allowed"):
            verify._near(found, 100, 0.05)
