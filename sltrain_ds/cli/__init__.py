"""`sltrain-ds VERB`: one module per verb, each with `add_parser(subparsers)` and `run(args)`."""

import argparse
import signal
import sys
from importlib import import_module

from sltrain_ds import __version__
from sltrain_ds.errors import UserError, os_error_line

# verb -> module, imported only when called, so that `estimate` does not import torch
VERBS = {
    "config": "config",
    "tokenizer": "tokenizer",
    "data": "data",
    "estimate": "estimate",
    "rehearse": "rehearse",
    "eval": "eval",
    "export": "export",
    "import": "import_",
    "report": "report",
    "summary": "summary",
    "doctor": "doctor",
    "bench": "bench",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code: the verb's, or 2 with one line on stderr for `UserError` and `OSError`."""
    if argv is None:
        argv = sys.argv[1:]
        # SIGTERM unwinds like Ctrl-C, so that temporary files are removed
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(
        prog="sltrain-ds", description="SLTrain pretraining on DeepSpeed. Verbs: " + ", ".join(VERBS)
    )
    parser.add_argument("--version", action="version", version=f"sltrain-ds {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    first = next((word for word in argv if not word.startswith("-")), None)
    for verb in [first] if first in VERBS else VERBS:
        import_module(f"sltrain_ds.cli.{VERBS[verb]}").add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return import_module(f"sltrain_ds.cli.{VERBS[args.verb]}").run(args) or 0
    except UserError as error:
        print(f"sltrain-ds: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sltrain-ds: error: {os_error_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
