"""`sltrain-ds data prepare|verify|info`: token shards from text."""

import argparse
import os


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("data", help="prepare, verify and describe training data")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    prepare = actions.add_parser("prepare", help="tokenize text into shards; run it again to resume after a stop")
    prepare.add_argument("--input", nargs="+", default=[], metavar="FILE", help=".txt, .jsonl (also .xz .gz), .parquet")
    prepare.add_argument("--hub", metavar="NAME", help="a hub data set, streamed, e.g. allenai/c4")
    prepare.add_argument("--hub-config", metavar="C", help="its configuration, e.g. en")
    prepare.add_argument("--hub-split", default="train", metavar="S", help="its split (default: train)")
    prepare.add_argument("--tokenizer", required=True, metavar="DIR")
    prepare.add_argument("--out", required=True, metavar="DIR")
    prepare.add_argument("--val-fraction", type=float, default=0.01, metavar="F", help="of documents (default: 0.01)")
    prepare.add_argument("--val-seed", type=int, default=0, metavar="N", help="seed of the split (default: 0)")
    prepare.add_argument("--text-column", default="text", metavar="NAME", help="of JSONL, parquet, hub (default: text)")
    prepare.add_argument(
        "--documents",
        default="chapters",
        metavar="RULE",
        help="how a text file is split: chapters (three blank lines; default), paragraphs, lines, file",
    )
    prepare.add_argument("--workers", type=int, metavar="N", help="tokenizer threads (default: all cores)")
    prepare.add_argument("--shard-tokens", type=int, default=1 << 28, metavar="N", help="each (default: 268,435,456)")
    prepare.add_argument("--max-documents", type=int, metavar="N")
    prepare.add_argument("--dtype", default="auto", metavar="T", help="uint16 or uint32 (default: by vocabulary)")
    prepare.add_argument("--overwrite", action="store_true", help="replace prepared data in --out")

    verify = actions.add_parser("verify", help="check all shards against their sha256")
    verify.add_argument("dir", metavar="DIR")

    info = actions.add_parser("info", help="documents, tokens, sequences; unigram and bigram perplexity")
    info.add_argument("dir", metavar="DIR")
    info.add_argument("--sequence-length", type=int, default=256, metavar="N")
    info.add_argument("--ngram", action="store_true", help="perplexity of unigram and interpolated bigram")
    info.add_argument("--eval-tokens", type=int, default=10_000_000, metavar="N", help="like eval.tokens of the config")
    info.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    return {"prepare": _prepare, "verify": _verify, "info": _info}[args.action](args)


def _prepare(args: argparse.Namespace) -> int:
    from sltrain_ds.errors import UserError

    if args.workers is not None:
        if args.workers < 1:
            raise UserError(f"--workers {args.workers}: must be at least 1")
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # read once, at the tokenizer's first use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from sltrain_ds.data.prepare import Preparation, prepare

    names = "tokenizer out hub hub_config hub_split text_column documents val_fraction val_seed shard_tokens"
    names += " max_documents dtype overwrite"
    index = prepare(Preparation(inputs=tuple(args.input), **{name: getattr(args, name) for name in names.split()}))
    print(f"data: {_counts(index)} in {args.out}")
    return 0


def _counts(index: dict) -> str:
    return ", ".join(
        f"{name} {split['tokens']:,} tokens of {split['documents']:,} documents"
        for name, split in index["splits"].items()
    )


def _verify(args: argparse.Namespace) -> int:
    from sltrain_ds.data.index import verify

    print(f"data: {_counts(verify(args.dir))}; all shards verified")
    return 0


def _info(args: argparse.Namespace) -> int:
    import json

    from sltrain_ds.errors import UserError

    if args.eval_tokens < 1:
        raise UserError(f"--eval-tokens: {args.eval_tokens} must be at least 1")
    from sltrain_ds.data.dataset import TokenData
    from sltrain_ds.data.index import read_index

    index = read_index(args.dir)
    out = {key: index[key] for key in ("dtype", "vocab_size", "eos_id", "tokenizer_sha256")}
    splits = {name: TokenData(args.dir, name, args.sequence_length) for name in index["splits"]}
    for name, data in splits.items():
        out[name] = {
            "documents": index["splits"][name]["documents"],
            "tokens": data.num_tokens,
            "shards": len(index["splits"][name]["shards"]),
            f"sequences_of_{args.sequence_length}": data.num_sequences,
            "dropped_tokens": data.dropped_tokens,
        }
    if args.ngram:
        if "validation" not in splits:
            raise UserError(f"--ngram: {args.dir} has no validation split; prepare it with a --val-fraction above 0")
        from sltrain_ds.data.ngram import perplexities

        out["ngram"] = perplexities(splits["train"], splits["validation"], args.eval_tokens)
    if args.json:
        print(json.dumps(out, indent=1))
    else:
        for key, value in out.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
            print(f"{key}: {value}")
    return 0
