"""`sltrain-ds VERB`: a file a verb, each with `add_parser(subparsers)` and `run(args)`."""

import argparse
import sys
from importlib import import_module

from sltrain_ds import __version__
from sltrain_ds.errors import UserError

# verb -> module; imported only when called, so that `estimate` does not wait for torch
VERBS = {
    "config": "config",
    "tokenizer": "tokenizer",
    "data": "data",
    "estimate": "estimate",
    "eval": "eval",
    "export": "export",
    "import": "import_",
    "report": "report",
    "summary": "summary",
    "doctor": "doctor",
    "bench": "bench",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Exit code 0, what the verb returns, or 2 with one line on stderr for a `UserError`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="sltrain-ds", description="SLTrain pretraining on DeepSpeed. Verbs: " + ", ".join(VERBS)
    )
    parser.add_argument("--version", action="version", version=f"sltrain-ds {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    wanted = [verb for verb in argv if verb in VERBS][:1] or VERBS
    for verb in wanted:
        import_module(f"sltrain_ds.cli.{VERBS[verb]}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return import_module(f"sltrain_ds.cli.{VERBS[args.verb]}").run(args) or 0
    except UserError as error:
        print(f"sltrain-ds: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
