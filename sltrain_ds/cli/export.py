"""`sltrain-ds export CHECKPOINT_DIR OUT_DIR`: converts a run's checkpoint to a plain dense Hugging Face model."""

from pathlib import Path


def add_parser(subparsers):
    parser = subparsers.add_parser("export", help="merge a checkpoint into a plain Hugging Face model")
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="a run, its checkpoints folder, or one step in it"
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new directory")
    parser.add_argument("--dtype", default="auto", help="auto (as trained; the default), bfloat16 or float32")
    return parser


def run(args) -> int:
    from sltrain_ds.hf.export import export

    done = export(args.checkpoint, args.out, args.dtype)
    size = f"{done.parameters / 1e6:,.1f}M parameters, {done.bytes / 1e9:.3f} GB in {str(done.dtype)[6:]}"
    print(f"exported step {done.step}: {size}, {done.files} file{'s' * (done.files > 1)} in {args.out}")
    if done.tokenizer is None:
        print("no tokenizer was copied: the run's tokenizer directory is missing or empty; copy yours into the model")
    return 0
