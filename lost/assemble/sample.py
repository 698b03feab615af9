"""A short continuation by the trained model: the first thing that a person wants to see."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lost.data import TokenRows

PROMPT_TOKENS = 24
NEW_TOKENS = 100


def sample_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: TokenRows, seed: int) -> str:
    """The first tokens of the validation set and how the model goes on from them, drawn with `seed`."""
    prompt = rows.read([0])["input_ids"][:, :PROMPT_TOKENS].to(model.device)
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    # Compiled blocks would be compiled again for every length of the text.
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        output = model.generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    text = tokenizer.decode(output[0])
    assert isinstance(text, str)
    return text
