"""`sltrain-ds config check FILE` prints the resolved config, `sltrain-ds config schema` the JSON Schema."""

import json
import sys


def add_parser(subparsers):
    parser = subparsers.add_parser("config", help="check a config file, or print the JSON Schema")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="check a file and print it with every value resolved")
    check.add_argument("config", help="the JSON file")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, as in training")
    check.add_argument("--gpus", type=int, default=1, metavar="N", help="number of ranks (default 1)")
    check.add_argument("--no-files", action="store_true", help="do not check that tokenizer and data exist")
    actions.add_parser("schema", help="print the JSON Schema of a config file")
    return parser


def run(args) -> int:
    if args.action == "schema":
        from sltrain_ds.config.schema import text

        sys.stdout.write(text())
        return 0
    from sltrain_ds.config import load

    resolved = load(args.config, args.set, args.gpus, check_files=not args.no_files)
    print(json.dumps(resolved.to_json(), indent=2, ensure_ascii=False))
    for key, value in resolved.resolved.items():
        print(f"resolved: {key} = {json.dumps(value)}", file=sys.stderr)
    print(
        f"batch: {resolved.train_batch_size} sequences = {resolved.micro_batch_size} x {resolved.accumulation} "
        f"accumulated x {resolved.world_size} GPUs; {resolved.tokens_per_step:,} tokens per step",
        file=sys.stderr,
    )
    return 0
