"""The smallest real tokenizer and model, for tests that save and load."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY_SPECIAL_TOKENS = ["<pad>", "<eos>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte after pad 0 and eos 1: 258 tokens, every text encodes and decodes exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*TINY_SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A dense LLaMA of two blocks with random weights large enough that its text is not constant."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
