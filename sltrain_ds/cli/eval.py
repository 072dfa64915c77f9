"""`sltrain-ds eval MODEL_DIR --data DIR`: validation loss and perplexity of a plain or converted model."""

import json
from pathlib import Path

from sltrain_ds.errors import UserError


def add_parser(subparsers):
    parser = subparsers.add_parser("eval", help="validation loss and perplexity of a model directory")
    parser.add_argument("model", type=Path, help="a Hugging Face directory, or one with converted layers")
    parser.add_argument("--data", type=Path, required=True, help="a prepared data directory")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="token budget (default 10,000,000)")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", action="store_true")
    return parser


def run(args) -> int:
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model}: no config.json there; give a model directory (see `sltrain-ds export`)")
    for flag in ("tokens", "sequence_length", "batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: {getattr(args, flag)} must be at least 1")

    import torch
    from transformers import AutoModelForCausalLM

    from sltrain_ds.converted import is_converted, load_converted
    from sltrain_ds.data.dataset import TokenData, evaluation_batches
    from sltrain_ds.evaluate import evaluate

    data = TokenData(args.data, "validation", args.sequence_length)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = (
            load_converted(args.model) if is_converted(args.model) else AutoModelForCausalLM.from_pretrained(args.model)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{args.model}: cannot be loaded ({str(error).splitlines()[0]})") from None
    if model.config.vocab_size < data.vocab_size:
        raise UserError(
            f"--data {args.data}: its tokenizer has {data.vocab_size} tokens, the model {model.config.vocab_size}; "
            "prepare the data with the model's tokenizer"
        )
    batches = evaluation_batches(data, args.tokens, args.batch_size, rank=0, world=1)
    result = evaluate(model.to(device), batches, device)
    if args.json:
        print(json.dumps({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}))
    else:
        print(f"loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  ({result.tokens:,} predicted tokens)")
    return 0
