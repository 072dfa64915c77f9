"""A run's engine, as every entry point makes it: train, rehearse and the benchmarks hold the same bytes."""

from sltrain_ds.memory.malloc import give_back_holes, give_back_large_blocks
from sltrain_ds.memory.segments import grow_segments
from sltrain_ds.models import build as models
from sltrain_ds.models.causal_attention import use_causal_attention
from sltrain_ds.models.chunked_loss import use_chunked_loss
from sltrain_ds.training.meter import Meter
from sltrain_ds.zero.agree_on_modes import agree_on_modes
from sltrain_ds.zero.initialize import initialize, partitioner


def make_engine(run, device):
    """(DeepSpeed engine, `Meter`, run with its modes settled) of a `RunConfig`; the process group is up.

    The meter runs from before the model.
    """
    grow_segments()
    if run.sltrain.per_layer_update:  # memory is the point
        give_back_large_blocks()
    meter = Meter(device)
    model = models.build(run, device, partitioner(run))
    use_causal_attention(model, run.sltrain.data.mask_documents)
    if run.sltrain.loss == "chunked":
        use_chunked_loss(model)
    meter.watch(model)
    run = agree_on_modes(model, run, device)
    engine, *_ = initialize(model=model, config=run)
    meter.begin(engine)
    give_back_holes()
    return engine, meter, run
