"""All checks that need a GPU in one command; `bash launch/gpu_check.sh` sets up the environment and starts this.

Parts run one after another, most informative first, each in its own process with its own time limit. After each part
results.md and results.json are rewritten and log.txt is extended, so that an interrupted check keeps its results. Exit
code 1 if a part failed, else 0 (running out of time is not a failure).
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from sltrain_ds.files import write_json, write_text

ENOUGH = 520  # seconds for all parts at full length
LEAST = 8  # no part is started with fewer seconds left
TAIL = 40  # last lines of a part's output kept in the results
CLI = (sys.executable, "-m", "sltrain_ds.cli")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
NOT_BUILT = r"CUDA kernels \.+ \[NO\]|PyTorch reference serves"
SKIPPED = r"SKIPPED.* needs (a CUDA device|the CUDA kernels|the C\+\+ ops)"
NODE = ("torch", "transformers", "deepspeed", "bitsandbytes", "pydantic", "numpy", "pytest")
MODEL_7B = "ds_configs/llama_7b_per_layer.json"
SMALL = ('sltrain.model={"preset":"llama_quickstart","activation_checkpointing":"non_reentrant"}',
         "sltrain.method.rank=32")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A command and what it checks; `limit` is its time limit in seconds. It may write tables into the folder {out}."""

    name: str
    tells: str
    limit: float
    command: tuple[str, ...]
    needs: str | None = None  # a program that must be installed
    fails_on: str | None = None  # a regular expression that the output must not match


def parts(gpu: bool, scale: float = 1.0) -> list[Part]:
    """All parts in order. `scale` scales the limits and the benchmarks' seconds; 1.0 is for `ENOUGH`.

    Without a GPU, the same commands run at small sizes.
    """
    short = scale < 0.75

    def bench(name: str, *words: str, seconds: float = 2.0) -> tuple[str, ...]:
        budget = f"{seconds * scale if gpu else 0.3:.1f}"
        return *CLI, "bench", name, *words, "--pairs", "10" if gpu else "2", "--seconds", budget, "--out", "{out}"

    def sets(*pairs: str) -> list[str]:
        return [word for pair in pairs for word in ("--set", pair)]

    if gpu:
        model, sizes, length, numels = (MODEL_7B,), "256,8192,32768", "2048", "1048576,45088768,268435456"
        layer, dtypes, tokens = "7b", "fp32,bf16", "2048,8192,32768"
        step = ("ds_configs/llama_350m.json", *sets("train_batch_size=32"), "--steps", "5")
        if short:
            numels, dtypes, tokens = "45088768", "bf16", "8192"
    else:
        model, sizes, length, numels = (MODEL_7B, *sets(*SMALL)), "16,32,64", "64", "65536"
        layer, dtypes, tokens = "256x688:r64:d0.05", "bf16", "64"
        one = ("train_batch_size=1", "train_micro_batch_size_per_gpu=1", "bf16.enabled=false")
        step = ("ds_configs/quickstart.json", *sets(*one), "--steps", "1")
    found = [
        Part("doctor", "versions; ops built ahead, CUDA kernels", 60, (*CLI, "doctor"), fails_on=NOT_BUILT),
        Part("tests", "the GPU's tests", 90, (*PYTEST, "tests/gpu", "--timeout", "60"), fails_on=SKIPPED),
        Part(
            "profile", "7B, 8-bit states, per layer: bytes, ms, MFU, launches, waits, beside full-rank", 190,
            bench("profile", *model, "--tokens", sizes, "--sequence", length, seconds=8),
        ),
        Part("adam8bit", "the 8-bit Adam step, of a copy's rate", 40, bench("adam8bit", "--numel", numels)),
        Part(
            "support", "scatter and gather, of a copy's rate", 40,
            bench("support", "--shapes", layer, "--dtypes", dtypes),
        ),
        Part(
            "op", "one layer at 7B's shapes: every mode, of nn.Linear's time", 75,
            bench("op", "--shapes", layer, "--tokens", tokens, "--dtypes", "bf16", "--modes",
                  "auto,compose,keep,factored_dense", seconds=3),
        ),
        Part(
            "step", "350M, 32-bit states: whole steps beside full-rank's and the naive operator's", 60,
            (*CLI, "bench", "step", *step, "--out", "{out}"),
        ),
        Part(
            "memcheck", "the kernels under compute-sanitizer", 60,
            # without the caching allocator, so that memory past a tensor's end is unallocated
            ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", "memcheck", "--error-exitcode",
             "9", *PYTEST, "tests/gpu/test_kernels.py", "-k", "(adam and 257) or (scatter and shape1)"),
            needs="compute-sanitizer", fails_on=SKIPPED,
        ),
        Part(
            "verify", "equality, supports, resume, estimate against measured", 300,
            (sys.executable, "-m", "sltrain_ds.cli.verify", "--ranks", "1"),
        ),
    ]  # fmt: skip
    if gpu:
        return [replace(part, limit=part.limit * max(scale, 0.75)) for part in found]
    return [replace(part, fails_on=None) for part in found]  # missing CUDA kernels are expected


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="sltrain_ds.cli.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results.md, results.json, log.txt")
    parser.add_argument("--limit", type=float, default=ENOUGH, metavar="SECONDS", help="in all (default %(default)s)")
    parser.add_argument("--spent", type=float, default=0.0, metavar="SECONDS", help="already used of the limit")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if nvidia-smi shows one")
    parser.add_argument("--commit", default="", help="of the checkout, for the results")
    parser.add_argument("--only", default="", metavar="NAME,...", help="run only these parts")
    args = parser.parse_args(argv)
    card = None if args.device == "cpu" else nvidia_smi()
    gpu = args.device == "cuda" or card is not None
    if not gpu:
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    chosen = parts(gpu, min(1.0, args.limit / ENOUGH))
    if args.only:
        chosen = [part for part in chosen if part.name in args.only.split(",")]
    environment = where(card) | {"limit": f"{args.limit:g} s"} | ({"commit": args.commit} if args.commit else {})
    check = Check(args.out, chosen, args.limit, time.monotonic() - args.spent, environment)
    return check.run()


class Check:
    """Runs the parts and writes their results to files."""

    def __init__(self, out: Path, chosen: list[Part], limit: float, began: float, environment: dict):
        self.out, self.parts, self.limit, self.began = out, chosen, limit, began
        self.environment, self.results = environment, []
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").write_text("", encoding="utf-8")

    def run(self) -> int:
        for i, part in enumerate(self.parts):
            self.results.append(self._one(part))
            self._write(self.parts[i + 1 :])
            print(_line(self.results[-1]), flush=True)
        print("\n" + "\n".join(self._summary([])), flush=True)
        return int(any(result["verdict"] == "FAIL" for result in self.results))

    def _one(self, part: Part) -> dict:
        result = {"name": part.name, "tells": part.tells, "command": shlex.join(part.command), "seconds": 0.0,
                  "exit_code": None, "output": [], "tables": "", "found": {}}  # fmt: skip
        left = self.limit - (time.monotonic() - self.began)
        if left < LEAST:
            return result | {"verdict": "no time"}
        if part.needs and shutil.which(part.needs) is None:
            return result | {"verdict": f"no {part.needs} here"}
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            command = [word.replace("{out}", folder) for word in part.command]
            code, output = run(command, min(part.limit, left))
            with (self.out / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"== {part.name}: {result['command']}\n{output}\n== {part.name}: exit code {code}\n\n")
            for path in sorted(Path(folder).glob("*.json")):
                result["found"][path.stem] = json.loads(path.read_text(encoding="utf-8"))
            result["tables"] = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.md")))
        failed = code or (part.fails_on and re.search(part.fails_on, output))
        verdict = "FAIL" if failed else "pass" if code == 0 else "cut at its limit"
        result |= {"seconds": round(time.monotonic() - began, 1), "exit_code": code, "verdict": verdict}
        return result | {"output": output.splitlines()[-TAIL:]}

    def _write(self, left: list[Part]) -> None:
        whole = {"format": 1, "environment": self.environment, "parts": self.results}
        write_json(self.out / "results.json", whole | {"left": [part.name for part in left]})
        text = ["# GPU check", "", *(f"- {key}: {value}" for key, value in self.environment.items()), ""]
        text += self._summary(left)
        for result in self.results:
            text += ["", f"## {result['name']}: {result['tells']}", "", f"`{result['command']}`", ""]
            text += [result["tables"]] if result["tables"] else []
            if not result["tables"] or result["verdict"] != "pass":
                text += ["```", *result["output"], "```"]
        write_text(self.out / "results.md", "\n".join(text) + "\n")

    def _summary(self, left: list[Part]) -> list[str]:
        rows = [f"| {r['name']} | {r['tells']} | {r['seconds']:.0f} | {r['verdict']} |" for r in self.results]
        rows += [f"| {part.name} | {part.tells} | - | not begun |" for part in left]
        return ["| part | tells | s | verdict |", "|---|---|---|---|", *rows]


def run(command: list[str], limit: float) -> tuple[int | None, str]:
    """Run a command; returns (exit code, stdout and stderr). At the limit its process group is killed: code None."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")


def where(card: str | None) -> dict[str, str]:
    """Device and driver, system, versions, command; does not import torch, to be fast."""
    from importlib import metadata

    versions = [f"{name} {metadata.version(name)}" for name in NODE if importlib.util.find_spec(name)]
    missing = [name for name in NODE if not importlib.util.find_spec(name)]
    return {
        "device": card or f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores",
        "system": f"Linux {platform.release()}, python {platform.python_version()}",
        "versions": ", ".join(versions),
        "missing": ", ".join(missing) or "nothing",
        "command": "bash launch/gpu_check.sh",
    }


def nvidia_smi() -> str | None:
    """The GPU's name, memory, driver and clocks, or None without a GPU."""
    query = "name,memory.total,driver_version,clocks.sm,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _line(result: dict) -> str:
    told = "\n".join(f"    {line}" for line in result["output"][-12:]) if result["verdict"] != "pass" else ""
    return f"{result['verdict']}  {result['name']}  {result['seconds']:.0f} s  {result['tells']}\n{told}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
