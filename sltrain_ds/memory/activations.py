"""Activation memory of a transformers LLaMA: bytes that one micro-batch keeps for the backward pass.

This is a model. The terms are the tensors that autograd saves in modeling_llama.py of transformers 5.23 (a test
compares them with saved-tensor hooks); allocations inside kernels are not included. T tokens per micro-batch, h hidden,
f intermediate, q and k the widths of queries and keys, a heads, V vocabulary, c bytes of the compute dtype:

    norm        4 T h (its input in fp32) + c T h (normalised) + 4 T (1 / rms)
    attention   c T h (the normed input) + c T (q + 2 k) + c T q (output) + 4 T a (log-sum-exp)
                eager, S tokens per sequence: attention weights, 4 T a S (plus c T a S if c is not 4), instead of the
                log-sum-exp
    MLP         c T h (the normed input) + 4 c T f (gate, silu(gate), up, their product)
    block       2 norms + attention + MLP, and c T r for each x A^T that a method keeps
    head        norm + c T h + 12 T V (fp32: log-probabilities, their gradient, the logits' gradient)
                chunked loss: 8 V (plus c V if c is not 4) times the tokens of one chunk
    all         layers x block + head; with checkpointing layers x c T h + max(block, head)
"""

from sltrain_ds.formats import chunk_tokens
from sltrain_ds.memory.count import Model, Shape


def activations(model: Model, tokens: int, compute: int, checkpointing: bool, chunked: bool, held: int = 0) -> int:
    """Bytes at the start of the backward pass of `tokens` tokens; `compute`: bytes per element.

    `held`: bytes of W that a block keeps from forward to backward (op_mode "keep").
    """
    s = model.shape
    one = block(model, tokens, compute) + held
    last = head(s, tokens, compute) + loss(s, tokens, compute, chunked)
    if checkpointing:
        return s.layers * compute * tokens * s.hidden + max(one, last)
    return s.layers * one + last


def block(model: Model, tokens: int, compute: int) -> int:
    """Bytes saved by one transformer block."""
    s = model.shape
    q, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
    of_a_score = model.scores * (4 + compute * (compute != 4)) if model.scores else 4
    attention = compute * tokens * (s.hidden + q + 2 * k + q) + of_a_score * tokens * s.heads
    mlp = compute * tokens * (s.hidden + 4 * s.intermediate)
    return 2 * _norm(s, tokens, compute) + attention + mlp + compute * tokens * model.kept_width // s.layers


def head(s: Shape, tokens: int, compute: int) -> int:
    """Bytes of the last norm and the head's input, without the T x V arrays."""
    return _norm(s, tokens, compute) + compute * tokens * s.hidden


def loss(s: Shape, tokens: int, compute: int, chunked: bool) -> int:
    """Bytes of the arrays over the vocabulary. A chunk has logits, an fp32 copy if they are not, log-probabilities."""
    if chunked:
        return (8 + compute * (compute != 4)) * s.vocab * min(tokens, chunk_tokens(s.vocab))
    return 12 * s.vocab * tokens


def _norm(s, tokens, compute):
    return (4 + compute) * tokens * s.hidden + 4 * tokens
