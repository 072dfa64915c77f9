"""The batch triangle: train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x GPUs."""

from sltrain_ds.errors import UserError

BATCH_KEYS = _TOTAL, _MICRO, _STEPS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


def triangle(data, world_size):
    """The three numbers, in sequences; missing ones and "auto" are derived. UserError where they do not fit."""
    total, micro, steps = (None if data.get(key) in (None, "auto") else data[key] for key in BATCH_KEYS)
    if micro is None and total is not None and steps is not None:
        micro, rest = divmod(total, steps * world_size)
        if rest or not micro:
            raise UserError(
                f"{_MICRO}: cannot be derived, since {_TOTAL} {total} is not a multiple of {_STEPS} {steps} x "
                f"{_gpus(world_size)}; set {_TOTAL} to {_multiples(total, steps * world_size)}"
            )
    if micro is None:
        have = f"with {_TOTAL} {total} alone" if total else "from nothing"
        raise UserError(f"{_MICRO}: cannot be derived {have}; write how many sequences fit on one GPU, for example 8")
    if total is None:
        if steps is None:
            raise UserError(
                f"{_TOTAL}: is missing and {_STEPS} too, so it cannot be derived; write the global batch in sequences, "
                f"for example {micro * world_size}"
            )
        total = micro * steps * world_size
    if steps is None:
        steps = total // (micro * world_size)
    if steps * micro * world_size != total:
        product = f"{_MICRO} {micro} x {_STEPS} {steps if data.get(_STEPS) not in (None, 'auto') else 'N'}"
        raise UserError(
            f"{_TOTAL}: {total} is not {product} x {_gpus(world_size)}; {_advice(total, micro, data, world_size)}"
        )
    return total, micro, steps


def _advice(total, micro, data, world):
    given = data.get(_STEPS) not in (None, "auto")
    fits = []
    if given and total % (micro * world) == 0:
        return f"leave {_STEPS} out: it is derived at every start (here {total // (micro * world)})"
    worlds = [n for n in _near(world) if total % (micro * n) == 0]
    if worlds:
        fits.append(f"on {_words(sorted(worlds[:3]))} GPU" + "s" * (worlds != [1]))
    micros = [m for m in _near(micro) if total % (m * world) == 0]
    if micros:
        fits.append(f"with {_MICRO} {_words(sorted(micros[:2]))}")
    fits.append(f"with {_TOTAL} {_multiples(total, micro * world)}")
    return "works " + ", or ".join(fits) + (f" ({_STEPS} left out)" if given else "")


def _near(number, reach=1000):
    """Whole numbers around ``number``, the nearest first."""
    return sorted(range(max(1, number - reach), number + reach), key=lambda n: abs(n - number))


def _multiples(total, unit):
    below = total // unit * unit
    return _words([below, below + unit] if below else [unit])


def _words(numbers):
    return " or ".join(map(str, numbers))


def _gpus(world):
    return f"{world} GPU" + "s" * (world != 1)
