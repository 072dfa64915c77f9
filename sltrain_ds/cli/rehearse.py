"""`sltrain-ds rehearse CONFIG.json --world N`: measures the memory of one rank of N on one device."""

import contextlib
import json
import os
import sys
from pathlib import Path

from sltrain_ds.errors import UserError


def add_parser(subparsers):
    parser = subparsers.add_parser("rehearse", help="measure the memory of one rank of N on a single device")
    parser.add_argument("config", type=Path)
    parser.add_argument("--world", type=int, required=True, metavar="N", help="ranks of the real run")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="rank to simulate (default 0)")
    parser.add_argument(
        "--steps", type=int, default=3, help="optimizer steps (default 3; ZeRO-3 prefetches from the third)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    parser.add_argument("--json", action="store_true", help="one JSON object, sizes in bytes")
    return parser


def run(args) -> int:
    from sltrain_ds.config import load

    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be at least 1")
    if args.world < 1:
        raise UserError(f"--world {args.world}: must be at least 1")
    if not 0 <= args.rank < args.world:
        raise UserError(f"--rank {args.rank}: must be from 0 to {args.world - 1}, a rank of --world {args.world}")
    settings = load(args.config, args.set, world_size=args.world, check_files=False)

    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} sees no GPU here; leave --device out")
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported

    from sltrain_ds.logs import quiet
    from sltrain_ds.memory.table import meter_table
    from sltrain_ds.training.rehearse import rehearse

    quiet()
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's own lines
        found = rehearse(settings, args.rank, device, args.steps)
    if args.json:
        told = {"format": 1, "config": str(args.config), "world": args.world, "rank": args.rank, "device": device}
        print(json.dumps({**told, **found}, indent=2))
        return 0
    print(
        f"{settings.path}, rank {args.rank} of {args.world}, ZeRO-{settings.zero_stage}, {args.steps} steps on {device}"
        ": measured memory equals that of a real rank; the losses are meaningless\n"
    )
    print(meter_table(found["bytes"], found["moments"], settings))
    return 0
