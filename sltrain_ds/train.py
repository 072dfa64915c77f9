"""The launcher's entry point: `deepspeed --num_gpus N --module sltrain_ds.train CONFIG.json`."""

import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path

from sltrain_ds.config import load
from sltrain_ds.errors import UserError, os_error_line


def main(argv=None) -> int:
    """Exit code 0 when trained, 2 for what the user can put right, 1 for a loss that is no number, 130 for Ctrl-C."""
    args = _parse(argv)
    rank = int(os.environ.get("RANK", 0))
    try:
        return _train(args)
    except UserError as error:
        if rank:
            time.sleep(3)  # what every rank sees is rank 0's to say; the launcher ends the others meanwhile
        print(f"sltrain-ds: error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:  # a full disk, a directory that cannot be written
        print(f"sltrain-ds: error: rank {rank}: {os_error_line(error)}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not re.search(r"Connection (closed|reset) by peer", str(error)):
            raise
        time.sleep(3)  # another rank has ended and said why; the launcher sees its exit code first and ends this one
        print(f"sltrain-ds: error: rank {rank}: another rank has ended", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            print(
                "sltrain-ds: stopped; --resume latest continues from the last checkpoint", file=sys.stderr, flush=True
            )
        return 130


def _train(args) -> int:
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    run = load(args.config, overrides=args.set, world_size=world_size, check_files=True)
    in_the_way = _left_by_an_earlier_run(run, args)

    if run.sltrain.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts

    # imported here, so that a bad config is reported before torch and DeepSpeed load
    import torch

    from sltrain_ds.checkpoint import resume as checkpoint
    from sltrain_ds.data.dataset import BatchSource, evaluation_batches, open_data
    from sltrain_ds.files import write_json
    from sltrain_ds.logs import quiet
    from sltrain_ds.memory.table import meter_table
    from sltrain_ds.training.callbacks import own_callbacks, resume_callbacks
    from sltrain_ds.training.engine import make_engine
    from sltrain_ds.training.loop import NonFiniteLoss, Training
    from sltrain_ds.zero.start import leave, start

    quiet()
    found = checkpoint.find(args.resume, run) if args.resume else None
    device = _device(world_size)
    torch.use_deterministic_algorithms(run.sltrain.deterministic)
    own = own_callbacks(run)  # before the ranks meet: what is wrong with one is an error of the config
    start()

    source, data = BatchSource(run), run.sltrain.data
    held_out = open_data(data.dir, "validation", data.sequence_length)
    engine, meter, run = make_engine(checkpoint.with_its_modes(run, found), device)
    rank = engine.global_rank

    def validation():
        budget = run.sltrain.eval.tokens
        return evaluation_batches(held_out, budget, run.micro_batch_size, rank, world_size, data.mask_documents)

    done = checkpoint.resume(engine, run, found) if found else (0, 0)
    if found:
        resume_callbacks(own, checkpoint.read_state(found))
    if rank == 0:
        run.checkpoint_dir.mkdir(parents=True, exist_ok=True)  # an error here comes at the start, not after hours
        _delete(in_the_way)  # only now, after every check of config, ranks and checkpoint has passed
        write_json(run.run_dir / "config.json", run.to_json())
        print(_describe(run, engine.module, source.data), flush=True)
        if done[0] >= run.sltrain.steps:
            print(f"nothing to do: {found} is at step {done[0]} of sltrain.steps {run.sltrain.steps}", flush=True)
    try:
        Training(engine, run, source, validation, meter, *done, own).train()
    except NonFiniteLoss as error:
        if rank == 0:
            print(f"sltrain-ds: {error}", file=sys.stderr, flush=True)
        return 1
    else:
        if rank == 0:
            print(meter_table(meter.read(), meter.peaks, run), flush=True)
    finally:
        engine.destroy()
        leave()
    return 0


def _device(world_size: int) -> str:
    """This rank's device, made current; CPU ranks of a node share its cores evenly."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", world_size))))
    return accelerator.current_device_name()


def _describe(run, model, data) -> str:
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return (
        f"{run.sltrain.method.name}, {parameters / 1e6:.2f}M parameters, ZeRO-{run.zero_stage}, "
        f"{run.world_size} rank(s) x {run.micro_batch_size} sequences x {run.accumulation} micro-batches; an epoch is "
        f"{data.num_sequences:,} sequences of {data.sequence_length} tokens, {data.dropped_tokens} tail tokens dropped"
    )


def _parse(argv):
    parser = argparse.ArgumentParser(prog="sltrain_ds.train", description=__doc__)
    parser.add_argument("config", help="the JSON of the run, see ds_configs/")
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=value", help="override a key of the JSON")
    parser.add_argument("--resume", metavar="latest|PATH", help="go on from a checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in the way")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser.parse_args(argv)


def _left_by_an_earlier_run(run, args) -> list[Path]:
    """What --overwrite is to delete: only what a run writes, the directory is the user's own; checkpoints come first.

    UserError where there is any and no --overwrite: nothing is overwritten or left to mix with this run unasked.
    """
    if int(os.environ.get("RANK", 0)):
        return []
    from sltrain_ds.checkpoint.step_folders import complete_checkpoints, step_folders

    keep = 0
    if args.resume:
        from sltrain_ds.checkpoint import resume as checkpoint

        keep = checkpoint.read_state(checkpoint.find(args.resume, run))["step"]
    later = [path for step, path in step_folders(run.checkpoint_dir).items() if step > keep]
    if args.resume:
        # one that a stop cut short is no checkpoint: going on from the latest is going on from before it
        complete = [path for path in complete_checkpoints(run.checkpoint_dir) if path in later]
        if complete and not args.overwrite:
            raise UserError(
                f"--resume: {run.checkpoint_dir} holds checkpoints after step {keep} (up to {complete[-1].name}); "
                "resume from the latest, or add --overwrite to delete them"
            )
        return later
    files = [run.run_dir / name for name in ("metrics.jsonl", "config.json")]
    if (later or any(path.exists() for path in files)) and not args.overwrite:
        raise UserError(
            f"sltrain.run_dir: {run.run_dir} holds a run already; add --resume latest to go on with it, "
            "--overwrite to start anew, or --set sltrain.run_dir=DIR"
        )
    # checkpoints first, so that a stop while they are deleted is seen again
    return [*later, *(run.run_dir / name for name in ("export", "report", "baselines.json")), *files]


def _delete(paths) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
