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
    parser.add_argument("--mask-documents", action="store_true", help="no attention across document boundaries")
    parser.add_argument("--device", default=None, help="default: cuda if available, else cpu")
    parser.add_argument("--json", action="store_true")
    return parser


def run(args) -> int:
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model}: has no config.json; give a model directory (see `sltrain-ds export`)")
    if (args.model / "checkpoints").is_dir():
        raise UserError(
            f"{args.model}: is a run, not a model; give the output of `sltrain-ds export {args.model} OUT_DIR`"
        )
    for flag, least in (("tokens", 1), ("sequence_length", 2), ("batch_size", 1)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')}: {getattr(args, flag)} must be at least {least}")

    import torch

    from sltrain_ds.data.dataset import TokenData, evaluation_batches
    from sltrain_ds.training.evaluate import evaluate

    device = _device(torch, args.device)
    data = TokenData(args.data, "validation", args.sequence_length)
    model = _load(args.model)
    _check_fit(model.config, data, args)
    model.config.use_cache = False  # with use_cache, transformers ignores document boundaries
    batches = evaluation_batches(data, args.tokens, args.batch_size, mask_documents=args.mask_documents)
    result = evaluate(model.to(device), batches, device)
    if args.json:
        print(json.dumps({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}))
    else:
        print(f"loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  ({result.tokens:,} predicted tokens)")
    return 0


def _device(torch, name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # unknown, absent and meta devices all fail here
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: cannot be used ({str(error).splitlines()[0]}); cpu always works") from None
    return name


def _load(path: Path):
    """Load the model of a plain or converted directory, with all of its weights. Raises `UserError` naming `path`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from sltrain_ds.models.converted import is_converted, load_converted

    try:
        if is_converted(path):
            return load_converted(path)
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{path}: cannot be loaded ({_one_line(error)}); export it again") from None
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would initialize them at random
        raise UserError(f"{path}: its files lack {missing[0]} ({len(missing)} missing in all); export it again")
    return model


def _check_fit(config, data, args) -> None:
    if config.vocab_size < data.vocab_size:
        raise UserError(
            f"--data {args.data}: its tokenizer has {data.vocab_size} tokens, the model {config.vocab_size}; "
            "prepare the data with the model's tokenizer"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and args.sequence_length > longest:
        raise UserError(
            f"--sequence-length: {args.sequence_length} is above the model's max_position_embeddings {longest}; "
            f"give at most {longest}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
