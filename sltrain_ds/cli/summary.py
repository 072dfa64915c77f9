"""`sltrain-ds summary RUN_DIR`: a run's results and the n-gram baselines of the same validation tokens."""

import json
from pathlib import Path

from sltrain_ds.errors import UserError
from sltrain_ds.files import write_json


def add_parser(subparsers):
    parser = subparsers.add_parser("summary", help="a run's results in a few lines")
    parser.add_argument("run_dir", type=Path)
    return parser


def run(args) -> int:
    from sltrain_ds.config import load
    from sltrain_ds.memory.count import Shape, count, model_fields

    config = args.run_dir / "config.json"
    if not config.is_file():
        raise UserError(f"{args.run_dir}: has no config.json; give the run directory of a run that has started")
    settings = load(config, check_files=True).sltrain
    evaluations = [line for line in _metrics(args.run_dir) if "eval_perplexity" in line]
    if not evaluations:
        raise UserError(f"{args.run_dir / 'metrics.jsonl'}: no evaluation in it yet; wait for the run's first one")
    baselines = _baselines(args.run_dir, settings)
    shape = Shape.of(model_fields(settings.model))
    trained, dense = count(shape, settings.method).parameters, count(shape).parameters
    first, last = evaluations[0], evaluations[-1]
    before, after = first["eval_perplexity"], last["eval_perplexity"]
    unigram, bigram = baselines["unigram"], baselines["bigram"]
    print(f"""
  validation perplexity   before {before:.1f}   after {last["step"]} steps {after:.2f}
                          (unigram {unigram:.1f}, interpolated bigram {bigram:.2f}, same tokens)
  parameters              {trained / 1e6:.2f}M, {trained / dense:.0%} of the dense model's {dense / 1e6:.2f}M""")
    for label, name in (
        ("checkpoints", "checkpoints"),
        ("Hugging Face model", "export"),
        ("report", "report/index.html"),
    ):
        if (args.run_dir / name).exists():
            print(f"  {label:<24}{args.run_dir / name}")
    return 0


def _metrics(run_dir: Path) -> list[dict]:
    lines = []
    try:
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # incomplete line of a killed run
    except OSError as error:
        raise UserError(f"{run_dir / 'metrics.jsonl'}: {error.strerror}; give a run directory") from None
    return lines


def _baselines(run_dir: Path, settings) -> dict:
    """`perplexities` of the run's data, cached in baselines.json together with the settings they are for."""
    path, data = run_dir / "baselines.json", settings.data
    of = {**data.model_dump(), "eval_tokens": settings.eval.tokens}
    kept = _kept(path)
    if kept.get("of") == of:
        return kept
    from sltrain_ds.data.dataset import open_data
    from sltrain_ds.data.ngram import perplexities

    splits = [open_data(data.dir, split, data.sequence_length) for split in ("train", "validation")]
    result = {"of": of, **perplexities(*splits, settings.eval.tokens, data.mask_documents)}
    write_json(path, result)
    return result


def _kept(path: Path) -> dict:
    """Content of the file; {} if it is missing or damaged, in which case it is written again."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(kept, dict) and all(isinstance(kept.get(key), float) for key in ("unigram", "bigram"))
    return kept if whole else {}
