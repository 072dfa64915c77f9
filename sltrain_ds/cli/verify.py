"""Checks of a new cluster node before a long run: `python -m sltrain_ds.cli.verify --ranks N`, one result per line.

Runs small trainings through the launcher on this node's GPUs (or CPU ranks) with the shipped corpus and compares:
per-layer update and plain ZeRO, overlap on and off, supports on every rank and in every run, a resumed and an
uninterrupted run, estimate and rehearsal with the measurement. Exit code 0 if all checks pass, 1 if one fails.
"""

import argparse
import copy
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 6
CORPUS = Path(__file__).parent.parent / "data" / "austen.txt.xz"
SAME = 1e-5  # relative, in fp32: the order of summation may differ

BASE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 2_000_000, "allgather_bucket_size": 2_000_000},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "weight_decay": 0.0, "torch_adam": True}},
    "sltrain": {
        "model": {
            "config": {
                "vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
                "num_attention_heads": 4,
            },
        },
        "method": {"name": "sltrain", "rank": 64, "density": 0.05, "alpha": 16},
        "op_mode": "compose",
        "deterministic": True,
        "data": {"sequence_length": 128},
        "steps": STEPS,
        "eval": {"every": 1000, "tokens": 4096},
        "checkpoint": {"every": STEPS // 2, "keep": 2},
    },
}  # fmt: skip
PER_LAYER = {"sltrain.per_layer_update": True}
EIGHT_BIT = PER_LAYER | {
    "bf16.enabled": True, "zero_optimization.stage": 3, "sltrain.precision": {"states": "8bit"},
    "sltrain.loss": "chunked", "sltrain.model.activation_checkpointing": "non_reentrant",
    "sltrain.deterministic": False,  # on a GPU deterministic attention needs scratch that is not estimated
    # small relative to the model, as in a real run
    "zero_optimization.stage3_param_persistence_threshold": 1000,
    "zero_optimization.stage3_max_live_parameters": 200_000, "zero_optimization.stage3_max_reuse_distance": 200_000,
    "zero_optimization.stage3_prefetch_bucket_size": 100_000,
}  # fmt: skip


class Failed(Exception):
    """A failed check; its text says what was found."""


class Node:
    """Runs on this node, each in a directory under `folder` and started once."""

    def __init__(self, folder: Path, ranks: int):
        self.folder, self.ranks = folder, ranks
        text = folder / "text.txt"
        with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
            text.write_text(file.read(300_000), encoding="utf-8")
        self._command("tokenizer", "train", "--input", text, "--vocab-size", 512, "--out", folder / "tokenizer")
        prepared = ["--tokenizer", folder / "tokenizer", "--out", folder / "data", "--val-fraction", 0.1]
        self._command("data", "prepare", "--input", text, *prepared, "--documents", "paragraphs")

    def config(self, name: str, keys: dict) -> Path:
        data = copy.deepcopy(BASE)
        data["train_batch_size"] = 2 * self.ranks
        data["sltrain"] |= {"tokenizer": str(self.folder / "tokenizer"), "run_dir": str(self.folder / name)}
        data["sltrain"]["data"]["dir"] = str(self.folder / "data")
        for key, value in keys.items():
            *parents, last = key.split(".")
            node = data
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    def train(self, name: str, keys: dict, *flags) -> list[dict]:
        """Train and return the lines of metrics.jsonl."""
        path = self.config(name, keys)
        launcher = []  # not needed for one rank
        if self.ranks > 1:
            launcher = ["deepspeed.launcher.runner", "--num_gpus", self.ranks, "--log_level", "error", "--module"]
        # as modules: console scripts may not be next to python
        self._run([sys.executable, "-m", *launcher, "sltrain_ds.train", path, *flags])
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def rehearse(self, name: str) -> dict:
        out = self._command("rehearse", self.folder / f"{name}.json", "--world", self.ranks, "--json")
        return json.loads(out)

    def checkpoint(self, name: str, step: int) -> dict:
        return json.loads((self.folder / name / f"checkpoints/step_{step:08d}/sltrain.json").read_text())

    def _command(self, *args) -> str:
        return self._run([sys.executable, "-m", "sltrain_ds.cli", *args])

    def _run(self, command) -> str:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            told = next((line for line in lines if "error:" in line), lines[-1] if lines else "no output")
            raise Failed(f"{Path(str(command[0])).name} exited with code {done.returncode}: {told}")
        return done.stdout


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="sltrain_ds.cli.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="GPUs of this node, or CPU ranks")
    args = parser.parse_args(argv)
    if args.ranks < 1:
        parser.error(f"--ranks {args.ranks}: must be at least 1")
    print(versions(), flush=True)
    began, failures = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            node = Node(Path(folder), args.ranks)
        except (Failed, OSError) as error:
            print(f"FAIL  {'tokenizer and data of the shipped corpus':<44} {error}", flush=True)
            return 1
        for name, check in CHECKS.items():
            try:
                word, told = "pass", check(node)
            except Exception as error:  # any error: the remaining checks still run
                word, told, failures = "FAIL", f"{type(error).__name__}: {error}".removeprefix("Failed: "), failures + 1
            print(f"{word}  {name:<44} {told}", flush=True)
    print(f"{failures} of {len(CHECKS)} failed, {args.ranks} ranks, {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failures else 0


def per_layer_equals_plain(node: Node) -> str:
    return _same(node.train("plain", {}), node.train("per_layer", PER_LAYER), exact=False)  # different code


def overlap_equals_none(node: Node) -> str:
    keys = PER_LAYER | {"zero_optimization.overlap_comm": True}
    return _same(_lines(node, "per_layer"), node.train("overlap", keys), exact=node.ranks <= 2)


def supports_agree(node: Node) -> str:
    """Compare the supports of two runs, and one layer's with the numpy reference; ranks compare at every start."""
    from sltrain_ds.ops import support

    first, second = (node.checkpoint(name, STEPS)["supports"] for name in ("plain", "overlap"))
    if first != second:
        raise Failed("two runs of the same config drew different supports")
    name, held = next(iter(first.items()))
    rows, columns = support.sample(*_shape(name), held["nnz"], held["seed"], name, native=False)
    if support.checksum(rows, columns) != held["checksum"]:
        raise Failed(f"{name}: the numpy reference draws a different checksum")
    return f"{len(first)} layers"


def resume_is_exact(node: Node) -> str:
    half = STEPS // 2
    node.train("resumed", PER_LAYER | {"sltrain.steps": half})
    lines = node.train("resumed", PER_LAYER, "--resume", "latest")
    return _same(_lines(node, "per_layer"), lines, exact=True)


def estimate_holds(node: Node) -> str:
    import torch

    from sltrain_ds.config import load
    from sltrain_ds.memory.estimate import estimate
    from sltrain_ds.memory.libraries import kind_of

    measured = _tensors(node.train("eight_bit", EIGHT_BIT))
    device = kind_of("cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
    settings = load(node.folder / "eight_bit.json", [], node.ranks, check_files=False)
    expected = estimate(settings, device=device).peak
    return _near(expected, measured, 0.05)  # 3% in larger models: here half the memory is activations


def rehearsal_holds(node: Node) -> str:
    return _near(node.rehearse("eight_bit")["bytes"]["tensors"], _tensors(_lines(node, "eight_bit")), 0.02)


CHECKS = {
    "per-layer update equals plain ZeRO-2": per_layer_equals_plain,
    "overlap on equals off": overlap_equals_none,
    "supports: every rank, every run": supports_agree,
    "resumed run equals an uninterrupted one": resume_is_exact,
    "estimate vs. measurement, 8-bit ZeRO-3": estimate_holds,
    "rehearsal vs. real run, 8-bit ZeRO-3": rehearsal_holds,
}


def versions() -> str:
    """Packages and accelerator on one line."""
    from sltrain_ds.cli import doctor

    found = doctor.examine()
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"sltrain_ds {found['sltrain_ds']}, python {found['python']}, {packages}; {found['accelerator']}"


def _shape(name: str) -> tuple[int, int]:
    config = BASE["sltrain"]["model"]["config"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if name.endswith("down_proj"):
        return hidden, inner
    return (inner, hidden) if ".mlp." in name else (hidden, hidden)


def _lines(node: Node, name: str) -> list[dict]:
    return [json.loads(line) for line in (node.folder / name / "metrics.jsonl").read_text().splitlines()]


def _tensors(lines: list[dict]) -> int:
    return [line["memory"]["tensors"] for line in lines if "memory" in line][-1]


def _same(first: list[dict], second: list[dict], exact: bool) -> str:
    """Compare the losses of every step and of the last evaluation; `exact`: bit for bit on the CPU."""
    a, b = (_losses(lines) for lines in (first, second))
    if not len(a) == len(b) == STEPS + 1:
        raise Failed(f"{len(a)} and {len(b)} losses")
    off = max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))
    allowed = 0.0 if exact and os.environ.get("DS_ACCELERATOR") == "cpu" else SAME
    if not off <= allowed:
        raise Failed(f"losses differ by {off:.1e} relative ({allowed:.0e} allowed)")
    return f"{len(a)} losses " + ("equal to the bit" if off == 0.0 else f"within {off:.1e}")


def _losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line] + [line["eval_loss"] for line in lines[-1:]]


def _near(found: int, measured: int, allowed: float) -> str:
    off = found / measured - 1
    told = f"{found / 1e6:.1f} MB against {measured / 1e6:.1f} measured, {off:+.1%} ({allowed:.0%} allowed)"
    if abs(off) > allowed:
        raise Failed(told)
    return told


if __name__ == "__main__":
    sys.exit(main())
