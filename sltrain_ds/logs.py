"""Keeps libraries' known noise out of a run's output; everything else they warn of still shows."""

import logging
import os
import warnings

# text a message starts with -> why it says nothing here
KNOWN = (
    "Attempting to get learning rate from scheduler before it has started",  # DeepSpeed does so itself, at construction
    "**** You are using ZeRO with an untested optimizer",  # 8-bit Adam is what our tests run
    "Failed to load CPU gemm_4bit_forward",  # of bitsandbytes, only the 8-bit Adam is used
)


def quiet() -> None:
    """DeepSpeed from WARNING up (DS_LOG_LEVEL overrides), without what is KNOWN."""
    from deepspeed.utils import logger

    if "DS_LOG_LEVEL" not in os.environ:
        logger.setLevel("WARNING")
    for noisy in (logger, logging.getLogger("bitsandbytes.backends.cpu.ops")):
        noisy.addFilter(lambda record: not record.getMessage().startswith(KNOWN))
    # DeepSpeed 0.19.8 calls them on every step; torch 2.13 gave them new names
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into|reduce_scatter)_tensor.* is deprecated", category=FutureWarning
    )
