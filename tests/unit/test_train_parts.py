"""Loss, norms, clipping, optimizer state, RNG state: each against its plain definition."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from lost.config.runtime import RuntimeConfig
from lost.config.training import AdamWConfig
from lost.train.loss import token_loss_sum
from lost.train.norms import clip_gradients, group_norms, group_of
from lost.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from lost.train.runtime import pick_device, pick_precision, start_runtime
from lost.train.state import rng_tensors, set_rng_tensors
from lost.utils.errors import CheckpointError, ConfigError
from lost.utils.labels import count_label_tokens

ALONE = start_runtime(RuntimeConfig(device="cpu"))


def test_loss_sum_is_the_sum_over_predicted_tokens():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[1, 4:] = -100
    labels[2, 0] = -100
    expected, count = 0.0, 0
    for row in range(3):
        for position in range(6):
            label = int(labels[row, position + 1])
            if label >= 0:
                z = logits[row, position].double()
                expected += float(torch.logsumexp(z, 0) - z[label])
                count += 1
    assert count_label_tokens(labels) == count
    assert token_loss_sum(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    # Not shifting the labels is the classic mistake: it must give another number.
    unshifted = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    assert abs(unshifted - expected) > 1e-2 * expected


def tiny_model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))


def backward(model, seed=0):
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


def test_only_matrices_decay():
    model = tiny_model()
    optimizer = build_optimizer(model, AdamWConfig(learning_rate=0.1, weight_decay=0.5), torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_global_norm_and_clipping():
    model = tiny_model()
    backward(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert clip_gradients(model, 0.0, ALONE).item() == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert clip_gradients(model, expected / 3, ALONE).item() == pytest.approx(expected, rel=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / 3, rtol=1e-5, atol=0)


def test_group_norms_sum_over_layers():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for i, layer in enumerate(model.layers):
        layer.q_proj = nn.Linear(3, 2, bias=False)
        nn.init.constant_(layer.q_proj.weight, 1.0 + i)
    norms = group_norms(model, ALONE)
    assert norms == {"weight_norm/q_proj": pytest.approx(math.sqrt(6 * 1 + 6 * 4))}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.11.self_attn.q_proj.low_rank_down", "attention.q_proj.low_rank_down"),
        ("model.layers.0.mlp.up_proj.weight", "mlp.up_proj"),
        ("model.layers.3.input_layernorm.weight", "norm"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_group_names(name, group):
    assert group_of(name) == group


def trained(num_steps):
    model = tiny_model()
    optimizer = build_optimizer(model, AdamWConfig(learning_rate=0.01), torch.device("cpu"))
    for step in range(num_steps):
        backward(model, seed=step)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_optimizer_state_moves_by_name_and_continues_bit_for_bit():
    model, optimizer = trained(3)
    saved = {key: value.clone() for key, value in optimizer_tensors(model, optimizer).items()}
    assert "0.weight/exp_avg" in saved
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    other_optimizer = build_optimizer(other, AdamWConfig(learning_rate=0.01), torch.device("cpu"))
    load_optimizer_tensors(other, other_optimizer, saved)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        backward(m, seed=17)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    # Negative control: without the state the next step is another one.
    fresh = tiny_model()
    fresh.load_state_dict(trained(3)[0].state_dict())
    fresh_optimizer = build_optimizer(fresh, AdamWConfig(learning_rate=0.01), torch.device("cpu"))
    backward(fresh, seed=17)
    fresh_optimizer.step()
    assert not torch.equal(fresh[0].weight, model[0].weight)


def test_optimizer_state_of_an_unknown_parameter_is_named():
    model, optimizer = trained(1)
    with pytest.raises(CheckpointError, match=r"9\.weight"):
        load_optimizer_tensors(model, optimizer, {"9.weight/exp_avg": torch.zeros(1)})


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_rng_state_round_trip():
    draws()
    saved = rng_tensors()
    first = draws()
    assert draws() != first
    set_rng_tensors(saved)
    assert draws() == first


def test_a_device_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA, so runtime.device=cuda is no mistake here")
    with pytest.raises(ConfigError, match=r"runtime\.device = cuda.*choose one of"):
        pick_device("cuda")
    assert pick_precision("auto", torch.device("cpu")) == "fp32"
