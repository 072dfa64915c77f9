"""`sltrain-ds bench op|step|profile|adam8bit|support|memory`: side-by-side measurements, medians and ratios."""

import os
from pathlib import Path

from sltrain_ds.errors import UserError

SHAPES, TOKENS = "60m,130m,350m,1b,7b", "256,1024,8192"  # defaults of bench op


def add_parser(subparsers):
    parser = subparsers.add_parser("bench", help="measure side by side: the operator, whole steps, the 8-bit optimizer")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="op|step|profile|adam8bit|support|memory")

    op = benches.add_parser("op", help="one layer: dense, naive and every mode, forward and backward")
    op.add_argument("--shapes", help=f"presets or OUTxIN:rRANK[:dDENSITY] (default {SHAPES})")
    op.add_argument("--tokens", help=f"tokens per pass (default {TOKENS})")
    op.add_argument("--dtypes", default="fp32,bf16")
    op.add_argument("--modes", help="default: all modes")
    op.add_argument("--density", type=float, help="override each shape's density")
    _common(op)

    step = benches.add_parser("step", help="whole training steps: full-rank, SLTrain, SLTrain on the naive operator")
    step.add_argument("configs", nargs="*", default=["ds_configs/quickstart.json"], metavar="CONFIG")
    step.add_argument("--methods", default="full_rank,sltrain,naive")
    step.add_argument("--steps", dest="pairs", type=int, default=10, metavar="N", help="rounds (default %(default)s)")
    step.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the files")
    _where(step)

    profile = benches.add_parser("profile", help="a config's steps in detail: bytes, MFU, launches, waits, kernels")
    profile.add_argument("config", metavar="CONFIG")
    profile.add_argument("--methods", default="sltrain,full_rank")
    profile.add_argument("--tokens", default="256,8192", help="tokens per step (default %(default)s)")
    profile.add_argument("--sequence", type=int, default=2048, metavar="N", help="maximum length (default %(default)s)")
    profile.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    _common(profile)

    adam = benches.add_parser("adam8bit", help="the 8-bit Adam step: ours, bitsandbytes, torch's fused AdamW, a copy")
    adam.add_argument("--numel", default="1048576,16777216,45088768", help="elements (default %(default)s)")
    adam.add_argument("--dtypes", default="fp32,bf16", help="of parameter and gradient (default %(default)s)")
    _common(adam)

    support = benches.add_parser("support", help="draw a support, scatter S into W, gather dW, compared with a copy")
    support.add_argument("--shapes", default="7b", help="presets or OUTxIN:rRANK[:dDENSITY] (default %(default)s)")
    support.add_argument("--density", type=float, help="override each shape's density")
    support.add_argument("--dtypes", default="fp32,bf16", help="of W and the values (default %(default)s)")
    support.add_argument("--model", help="only draw all supports of this preset, such as 7b, on the CPU")
    _common(support)

    memory = benches.add_parser("memory", help="peak of real steps compared with the estimate and the paper's figure")
    memory.add_argument("--config", default="ds_configs/llama_350m_per_layer.json", metavar="CONFIG")
    memory.add_argument("--steps", dest="pairs", type=int, default=2, metavar="N", help="optimizer steps per row")
    memory.add_argument("--rows", choices=("all", "own"), default="all", help="own: run the recipe, estimate the rest")
    memory.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    _where(memory)
    return parser


def _common(parser):
    parser.add_argument("--pairs", type=int, default=15, metavar="N", help="maximum rounds (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="per case, after 3 rounds (default %(default)s)")
    _where(parser)


def _where(parser):
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if available")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/BENCH.md and DIR/BENCH.json")


def run(args) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the memory meter's profiler; read at import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    device = _device(args)
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    benches = {"op": _op, "step": _step, "profile": _profile, "adam8bit": _adam8bit, "support": _support}
    benches["memory"] = _memory
    return benches[args.bench](args, device) or 0


def _op(args, device):
    from sltrain_ds.bench import op
    from sltrain_ds.ops.modes import MODES

    op.bench(
        op.parse_shapes(args.shapes or SHAPES, args.density),
        _numbers("--tokens", args.tokens or TOKENS),
        _names("--dtypes", args.dtypes, op.DTYPES),
        _names("--modes", args.modes, ("auto", *MODES)) if args.modes else ("auto", *MODES),
        device, args.pairs, args.seconds, args.out,
    )  # fmt: skip


def _step(args, device):
    from sltrain_ds.bench import step
    from sltrain_ds.logs import quiet

    quiet()
    step.bench(args.configs, args.set, _names("--methods", args.methods, step.METHODS), device, args.pairs, args.out)


def _profile(args, device):
    from sltrain_ds.bench import profile_step
    from sltrain_ds.logs import quiet

    if args.sequence < 1:
        raise UserError(f"--sequence {args.sequence}: must be at least 1")
    quiet()
    methods, tokens = _names("--methods", args.methods, profile_step.METHODS), _numbers("--tokens", args.tokens)
    profile_step.bench(
        args.config, args.set, methods, tokens, args.sequence, device, args.pairs, args.seconds, args.out
    )


def _adam8bit(args, device):
    from sltrain_ds.bench import adam8bit
    from sltrain_ds.bench.op import DTYPES
    from sltrain_ds.logs import quiet

    quiet()
    numels = _numbers("--numel", args.numel)
    adam8bit.bench(numels, _names("--dtypes", args.dtypes, DTYPES), device, args.pairs, args.seconds, args.out)


def _support(args, device):
    from sltrain_ds.bench import op, support

    if args.model:
        support.draw_model(args.model)
        return
    dtypes = _names("--dtypes", args.dtypes, op.DTYPES)
    support.bench(op.parse_shapes(args.shapes, args.density), dtypes, device, args.pairs, args.seconds, args.out)


def _memory(args, device):
    from sltrain_ds.bench import memory
    from sltrain_ds.logs import quiet

    quiet()
    memory.bench(args.config, args.set, args.pairs, device, args.rows, args.out)


def _device(args) -> str:
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads {args.threads}: must be at least 1")
        torch.set_num_threads(args.threads)
    if args.pairs < 1:
        option = "--steps" if args.bench in ("step", "memory") else "--pairs"
        raise UserError(f"{option} {args.pairs}: must be at least 1")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; give a directory")  # before measuring, not after
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: must be cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch {torch.__version__} sees no GPU here; leave --device out")
    return device


def _names(option, text, known) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name}: not known; choose from {', '.join(known)}")
    return names


def _numbers(option, text) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} {text}: must be whole numbers from 1 up, for example 256,1024")
    return numbers
