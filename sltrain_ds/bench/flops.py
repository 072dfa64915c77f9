"""FLOPs of a training step and peak FLOP/s of devices, from which MFU is computed.

The model's FLOPs (Chowdhery et al. 2022, PaLM, appendix B, with causal attention):

    6 * tokens * (weights of all linear layers, head included + layers * heads * head_dim * sequence)

They are those of the full-rank model for every method, so MFU ranks methods as tokens/s does. Recomputation for
activation checkpointing is not counted.
"""

from sltrain_ds.config.shapes import linear_shapes

# dense bf16 tensor-core FLOP/s from the data sheets; the first key contained in the device's name is used
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


def peak(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device, or None if it is not listed."""
    return next((most for name, most in PEAKS.items() if name in device_name), None)


def model_flops(fields: dict, sequence: int, tokens: int) -> int:
    """FLOPs of forward and backward for `tokens` tokens in sequences of `sequence`; `fields` are the full-rank model's
    `LlamaConfig` fields.
    """
    shapes = linear_shapes(fields)
    layers, head = fields["num_hidden_layers"], shapes.pop("lm_head")
    weights = layers * sum(out * in_ for out, in_ in shapes.values()) + head[0] * head[1]
    queries = shapes["model.layers.0.self_attn.q_proj"][0]
    return 6 * tokens * (weights + layers * queries * sequence)


def layer_flops(mode: str, out: int, in_: int, rank: int, nnz: int, tokens: int, micro_batches: int = 1) -> int:
    """FLOPs of an SLTrain layer in a step of `tokens` tokens, per mode of `ops/sltrain_linear.py`."""
    dense, product, thin = 6 * tokens * out * in_, 2 * rank * out * in_, 6 * tokens * rank * (out + in_)
    return {
        "compose": dense + 4 * product * micro_batches,  # B A twice, dA, dB
        "keep": dense + 3 * product * micro_batches,
        "keep_step": dense + 3 * product,
        "factored": thin + 6 * tokens * nnz,
        "factored_dense": thin + dense,
    }[mode]


def step_flops(layers, fields: dict, sequence: int, tokens: int, micro_batches: int = 1) -> int:
    """FLOPs executed in a step; `layers` are the model's SLTrain layers, counted in their current modes."""
    own = model_flops(fields, sequence, tokens)
    for layer in layers:
        sizes = (layer.out_features, layer.in_features, layer.rank, layer.nnz)
        mode = layer.current_mode
        if mode == "factored" and layer.S_columns.device.type == "cuda":
            mode = "factored_dense"  # as in `sltrain_linear`
        own += layer_flops(mode, *sizes, tokens, micro_batches) - 6 * tokens * layer.out_features * layer.in_features
    return own
