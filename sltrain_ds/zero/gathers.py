"""Order ZeRO-3's all-gathers after the update that writes the weights they read."""

from deepspeed.accelerator import get_accelerator

STREAM = "_DeepSpeedZeRoOffload__allgather_stream"  # runtime/zero/parameter_offload.py:195 of DeepSpeed 0.19.8


def gather_after_updates(engine) -> None:
    """After `engine.step()`: let the all-gather stream wait for what the current stream has been given.

    DeepSpeed queues the next forward's gathers on a stream of their own, which does not wait for the step's copies into
    the shards. A loop that reads the loss after every step is ordered by that read; one that does not needs an event.
    Does nothing at other stages and on CPUs, which have no streams.
    """
    stream = getattr(getattr(engine.optimizer, "parameter_offload", None), STREAM, None)
    if stream is not None:
        stream.wait_stream(get_accelerator().current_stream())
