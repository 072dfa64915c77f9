import torch

from sltrain_ds.bench.meter import Meter, peak_since_mark, saved_bytes

MARK = "sltrain bench mark"


def test_the_peak_is_the_highest_sum_since_the_mark():
    events = [("[memory]", 50), ("[memory]", -20), ("aten::mm", 0), (MARK, 0), ("[memory]", 5), ("[memory]", -30)]
    assert peak_since_mark(events) == 35
    assert peak_since_mark([(MARK, 0), ("[memory]", 7), ("[memory]", -7), ("[memory]", 6)]) == 7


def test_meter_counts_what_lives_at_once():
    with Meter("cpu") as meter:
        for _ in range(3):
            first = torch.empty(1000)
            second = torch.empty(500)
            del first, second
    assert meter.peak == 6000


def test_mark_forgets_what_has_gone_and_keeps_what_lives():
    with Meter("cpu") as meter:
        gone, kept = torch.empty(100_000), torch.empty(100)
        del gone
        meter.mark()
        more = torch.empty(10)
    assert meter.peak == kept.nbytes + more.nbytes


def test_saved_bytes_counts_storages_once_and_tells_what_was_given():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    # mm saves x and w; exp its own result; the second mm that result again, and w once more
    assert saved_bytes(lambda: torch.mm(torch.mm(x, w).exp(), w.t()), [x, w]) == (128 + 64 + 128, 128)
