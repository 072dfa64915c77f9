"""`sltrain-ds report RUN_DIR... --out DIR`: plots curves, memory and spectra of runs as PNGs and one HTML page."""

from pathlib import Path

from sltrain_ds.errors import UserError


def add_parser(subparsers):
    parser = subparsers.add_parser("report", help="curves, memory and spectra of runs, as PNGs and one HTML page")
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directories; several share the plots")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where index.html and the PNGs go")
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="NAME",
        help='matrices by name components, such as "layers.0" or "q_proj", or "all" (default: a sample)',
    )
    parser.add_argument("--rank", type=int, metavar="R", help="r of the residual if the method has no rank")
    return parser


def run(args) -> int:
    if args.rank is not None and args.rank < 1:
        raise UserError(f"--rank: {args.rank} must be at least 1")

    from sltrain_ds.report.build import build

    page = build(args.run_dir, args.out, args.layers, args.rank)
    print(f"report: {page}")
    return 0
