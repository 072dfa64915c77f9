"""What a start tidies up is its own alone."""

import os

from sltrain_ds.zero import start


def test_the_shared_memory_of_another_user_stays(monkeypatch, tmp_path):
    """DeepSpeed names it by user, address, port and rank, and most runs have the same port."""
    monkeypatch.setattr(start, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(start.deepspeed.comm, "get_world_size", lambda: 1)
    monkeypatch.setattr(start.deepspeed.comm, "get_rank", lambda: 0)
    monkeypatch.setenv("MASTER_PORT", "29500")
    user = os.getuid()
    names = {place: tmp_path / f"deepspeed_allreduce_buffer_{place}" for place in (
        f"{user}_127.0.0.1_29500_0", f"{user}_127.0.0.1_29500_1", f"{user}_127.0.0.1_29501_0",
        f"{user + 1}_127.0.0.1_29500_0",
    )}  # fmt: skip
    for path in names.values():
        path.touch()
    start._unname_shared_memory()
    assert [place for place, path in names.items() if not path.exists()] == [f"{user}_127.0.0.1_29500_0"]
