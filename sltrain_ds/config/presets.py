"""LLaMA shapes by name, as plain ``transformers.LlamaConfig`` fields (the paper's, which are GaLore's)."""


def _llama(hidden, intermediate, heads, layers, vocab=32_000):
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        # rotary positions hold no parameters, so the long context costs nothing where it is not used
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


PRESETS = {
    "llama_quickstart": _llama(256, 688, 4, 4, vocab=2048),
    "llama_60m": _llama(512, 1376, 8, 8),
    "llama_130m": _llama(768, 2048, 12, 12),
    "llama_350m": _llama(1024, 2736, 16, 24),
    "llama_1b": _llama(2048, 5461, 32, 24),
    "llama_7b": _llama(4096, 11008, 32, 32),
}
