"""Causal SDPA attention without transformers' check for packed sequences, which waits for the GPU in every forward."""

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "causal_sdpa"


def use_causal_attention(model, mask_documents: bool) -> None:
    """Call SDPA with `is_causal` in every forward of a LLaMA model whose batches hold nothing but tokens.

    transformers builds a mask from `position_ids` where a document starts anew, and reads the device to find out
    whether one does (masking_utils.py of 5.23, `find_packed_sequence_indices`). For an attention that is registered
    without a mask function it builds none and reads nothing. A mask given by the caller would be ignored too, so
    this is for the training loop, whose batches have none; runs with `mask_documents`, other attentions and other
    architectures (sliding windows) stay as they are. The results are the same bits.
    """
    if mask_documents or model.config.model_type != "llama" or model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, sdpa_attention_forward)
    model.set_attn_implementation(NAME)
