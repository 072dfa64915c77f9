"""What several rooms' tests share: a tiny prepared corpus, a config that fits it, and a launcher for real ranks."""

import json
import lzma
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from ranks import ROOT, launch
from torch.utils import cpp_extension

CORPUS = ROOT / "sltrain_ds" / "data" / "austen.txt.xz"

# set before any test imports DeepSpeed: a CPU run on machines without a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")
# its key knows an operator by its name, not by its signature: another version's code would be taken from the cache
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# the venv's ninja, whichever python was called: another version's log would have every op compiled anew
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# measured times of the modes: of this test run alone, its ranks' too; where torch keeps its builds stays
_cache = tempfile.TemporaryDirectory(prefix="sltrain_cache_")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", cpp_extension._get_build_directory("", False))
os.environ["XDG_CACHE_HOME"] = _cache.name


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """{"tokenizer", "data"}: a 384-token vocabulary and about 60,000 tokens of the shipped corpus."""
    from sltrain_ds.cli import main

    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "text.txt"
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        text.write_text(file.read(150_000), encoding="utf-8")
    places = {"tokenizer": folder / "tokenizer", "data": folder / "data"}
    assert not main(
        ["tokenizer", "train", "--input", str(text), "--vocab-size", "384", "--out", str(places["tokenizer"])]
    )
    prepare = [
        "data",
        "prepare",
        "--input",
        str(text),
        "--tokenizer",
        str(places["tokenizer"]),
        "--out",
        str(places["data"]),
    ]
    # paragraphs: documents short enough that many borders fall inside a sequence
    assert not main([*prepare, "--val-fraction", "0.1", "--documents", "paragraphs"])
    return places


@pytest.fixture
def tiny_config(tiny, tmp_path):
    """A function of overrides (dotted keys) that gives a config dict: a 2-layer LLaMA, 5 steps of 8 sequences, fp32."""

    def make(**overrides) -> dict:
        config = {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 100000, "allgather_bucket_size": 100000},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 0.003, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True},
            },
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {"total_num_steps": 40, "warmup_num_steps": 4, "warmup_type": "linear", "cos_min_ratio": 0.1},
            },
            "sltrain": {
                "model": {
                    "config": {
                        "vocab_size": 384,
                        "hidden_size": 48,
                        "intermediate_size": 80,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 4,
                        "max_position_embeddings": 128,
                    }
                },
                "method": {"name": "sltrain", "rank": 8, "density": 0.05, "alpha": 16},
                "op_mode": "factored",  # not what is measured: runs are compared with one another
                "tokenizer": str(tiny["tokenizer"]),
                "data": {"dir": str(tiny["data"]), "sequence_length": 32},
                "steps": 5,
                "run_dir": str(tmp_path / "run"),
                "eval": {"every": 100, "tokens": 2000},
                "checkpoint": {"every": 100, "keep": 2},
            },
        }
        for key, value in overrides.items():
            node = config
            *path, last = key.split("__")
            for part in path:
                node = node.setdefault(part, {})
            if value is None:
                node.pop(last, None)
            else:
                node[last] = value
        return config

    return make


@pytest.fixture
def train(tiny_config, tmp_path):
    """Train through the launcher: `train(world, *flags, **overrides)` -> (process, metrics lines)."""

    def run(world: int, *flags: str, **overrides):
        config = tiny_config(**overrides)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        process = launch(world, "--module", "sltrain_ds.train", path, *flags, cwd=tmp_path)
        metrics = Path(config["sltrain"]["run_dir"]) / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return process, lines

    return run


@pytest.fixture
def one_rank(monkeypatch):
    """This process is the one rank of a world of its own, on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in {**world, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(key, str(value))
