"""`sltrain-ds estimate CONFIG.json [--gpus N]`: estimated memory by category per GPU, without building the model."""

import json
from pathlib import Path

from sltrain_ds.memory.libraries import KINDS


def add_parser(subparsers):
    parser = subparsers.add_parser("estimate", help="estimated memory by category, per GPU, without building the model")
    parser.add_argument("config", type=Path)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default 1)")
    parser.add_argument(
        "--device", choices=KINDS, default="cpu",
        help="also count memory of libraries on this device (h100: that one and later; default cpu: none)",
    )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    parser.add_argument("--json", action="store_true", help="one JSON object, sizes in bytes")
    return parser


def run(args) -> int:
    from sltrain_ds.config import load
    from sltrain_ds.memory.estimate import estimate

    settings = load(args.config, args.set, world_size=args.gpus, check_files=False)
    result = estimate(settings, device=args.device)
    if args.json:
        print(json.dumps({"config": str(args.config), **result.to_json()}, indent=2))
    else:
        print(text(settings, result))
    return 0


def text(settings, result) -> str:
    """The estimate as a table: this run next to the dense model, then the paper's count."""
    dense = result.dense
    method = settings.sltrain.method.name
    lines = [
        f"{settings.path}: {method}, {result.gpus} GPU{'s' * (result.gpus > 1)}, ZeRO-{result.zero_stage}, weights "
        f"{settings.weights}, states {settings.sltrain.precision.states}, {result.tokens:,} tokens per micro-batch",
        "",
        _row("parameters (M)", method, "full_rank"),
    ]
    for group in result.parameters:
        lines.append(_row("  " + group, *(f"{p[group] / 1e6:,.2f}" for p in (result.parameters, dense.parameters))))
    lines.append(_row("  total", *(f"{sum(e.parameters.values()) / 1e6:,.2f}" for e in (result, dense))))
    unit, word = (1e9, "GB") if dense.peak >= 1e9 else (1e6, "MB")

    def sizes(label, of):
        return _row(label, *(f"{of(e) / unit:,.2f}" for e in (result, dense)))

    lines += ["", _row(f"{word} on each GPU ({word} = {unit:.0e})".replace("+0", ""), method, "full_rank")]
    lines += [sizes("  " + name, lambda e, name=name: e.bytes[name]) for name in result.bytes]
    lines += [sizes("  total", lambda e: e.total), sizes("at its peak", lambda e: e.peak)]
    for moment, label in (("initialize", "while built"), ("backward", "in backward"), ("step", "in the step")):
        lines.append(sizes("  " + label, lambda e, moment=moment: e.moments[moment]))
    lines += ["", "the paper's count (bytes: 2 per weight, 4 moments, 8 per index)   params (M)        GB"]
    lines += [f"  {name:<60}{row.millions:>14}{row.gigabytes:>10}" for name, row in result.paper.items()]
    lines += ["", "Bytes of tensors: gradients, buckets and activations are modelled (docs/memory.md), others exact."]
    return "\n".join(lines)


def _row(label, *cells):
    return f"{label:<30}" + "".join(f"{cell:>14}" for cell in cells)
