"""Tiny dense models as folders that transformers wrote, and `lost convert` on them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lost.testing.runs import lost_here
from lost.testing.tiny import tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
QUIET = ("perplexity=false", "data.cache_dir=unused")


def dense(folder, family="llama", *, dtype=torch.float32, **changes):
    """A released folder: random weights of a size that matters, biases and norms too, written by transformers."""
    keys = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "vocab_size": 258}
    config = AutoConfig.for_model(family, **keys | {"pad_token_id": 0, "initializer_range": 0.2} | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return model


def some_ids():
    return torch.randint(2, 258, (2, 13), generator=torch.Generator().manual_seed(3))


def converted(source, target, *overrides):
    assert lost_here("convert", f"source={source}", f"to={target}", *QUIET, *overrides) == 0
    return AutoModelForCausalLM.from_pretrained(target).eval()


def error_of(ours, reference):
    return float(
        (ours.double() - reference.double()).square().mean().sqrt() / reference.double().square().mean().sqrt()
    )


def refused(capsys, source, *overrides):
    """The message of a conversion that must end with status 2 and leave nothing."""
    target = source.parent / "refused"
    assert lost_here("convert", f"source={source}", f"to={target}", *QUIET, *overrides) == 2
    assert not target.exists()
    assert not list(source.parent.glob(".refused*"))
    return " ".join(capsys.readouterr().err.split())
