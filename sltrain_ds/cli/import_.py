"""`sltrain-ds import DIR OUT_DIR --from sltrain`: converts a checkpoint of the reference code to a model directory."""

from pathlib import Path

from sltrain_ds.errors import UserError


def add_parser(subparsers):
    parser = subparsers.add_parser("import", help="convert a checkpoint of other code to a model directory")
    parser.add_argument("source", type=Path, metavar="DIR", help="model.safetensors or pytorch_model.bin, config.json")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new directory, for sltrain.model.path")
    parser.add_argument("--from", dest="origin", required=True, metavar="CODE", help="sltrain: the paper's own code")
    parser.add_argument("--alpha", type=float, help="lora_alpha, if no JSON file in DIR has it")
    parser.add_argument("--rank", type=int, help="checked against the factors")
    return parser


def run(args) -> int:
    if args.origin != "sltrain":
        raise UserError(f"--from {args.origin}: not known; use sltrain")
    from sltrain_ds.hf.import_reference import import_sltrain

    method = import_sltrain(args.source, args.out, args.alpha, args.rank)
    values = ", ".join(f"{key} {method[key]}" for key in ("rank", "density", "alpha"))
    print(f'imported {args.source} ({values}) to {args.out}; train from it with "model": {{"path": "{args.out}"}}')
    return 0
