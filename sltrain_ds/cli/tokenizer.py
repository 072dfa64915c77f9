"""`sltrain-ds tokenizer train`: trains a sentencepiece BPE tokenizer on text."""

import argparse


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("tokenizer", help="train a tokenizer")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="BPE with byte fallback, saved in transformers' format")
    train.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".txt, .jsonl (also .xz), .parquet")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N")
    train.add_argument("--out", required=True, metavar="DIR")
    train.add_argument("--text-column", default="text", metavar="NAME", help="of JSONL and parquet (default: text)")


def run(args: argparse.Namespace) -> int:
    from sltrain_ds.data import sources, tokenizer

    files = [sources.file_source(path, args.text_column) for path in args.input]
    texts = (text for file in files for row in file.rows() for text in row)
    characters = tokenizer.train(texts, args.vocab_size, args.out)
    print(f"tokenizer: {args.vocab_size:,} tokens from {characters:,} characters in {args.out}")
    return 0
