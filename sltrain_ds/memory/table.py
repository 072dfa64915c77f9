"""Text table of measured memory: categories next to their estimates, and each moment's peak."""

from sltrain_ds.errors import UserError
from sltrain_ds.memory.estimate import estimate


def meter_table(found: dict[str, int], moments: dict[str, int], run) -> str:
    """Format the table. `found`: `Meter.read()`; `moments`: `Meter.peaks`; `run`: the `RunConfig` to estimate."""
    try:
        expected = estimate(run)
        told = {**expected.bytes, "tensors": expected.peak, **expected.moments}
    except UserError:
        told = {}
    unit, word = (1e9, "GB") if found["tensors"] >= 1e9 else (1e6, "MB")

    def row(label, size, key=None):
        beside = f"{told[key] / unit:>12,.3f}" if key in told else ""
        return f"  {label:<28}{size / unit:>12,.3f}{beside}"

    lines = [f"{'memory of this rank at its peak, ' + word:<30}{'measured':>12}{'estimate' if told else '':>12}"]
    lines += [row(key, size, key) for key, size in found.items() if key not in ("peak", "tensors")]
    lines.append(row("peak", found["peak"]))
    lines.append(row("peak of tensors", found["tensors"], "tensors"))
    lines += [row(f"  {moment}", size, moment) for moment, size in moments.items()]
    return "\n".join(lines)
