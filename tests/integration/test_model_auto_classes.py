"""The model types in fresh processes: transformers at the repository root, Auto classes, memory of a large build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


def python(code: str, cwd: Path = REPOSITORY) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_imports_at_the_repository_root():
    """A package named `kernels` there would hide the library of that name, which transformers imports."""
    assert python("from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)") == "LlamaForCausalLM"


def test_kernels_is_no_package():
    assert (REPOSITORY / "kernels" / "lost_kernels").is_dir()
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_a_saved_model_loads_and_generates_in_another_process(tmp_path):
    save = f"""
import torch
from lost.config.model import LostConfig, ModelConfig
from lost.model import build_model
model = ModelConfig(name="t", vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, lineage_rank=5)
net = build_model(model, LostConfig(lost_rank=5, density=0.1), seed=3)
net.save_pretrained({str(tmp_path)!r})
print(net.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False).tolist())
"""
    load = f"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoConfig.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    assert "lost_llama" in str(error)
else:
    raise AssertionError("lost_llama was known before `import lost.model`")
import lost.model
net = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(net.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False).tolist())
"""
    saved = python(save).splitlines()[-1]
    assert saved.startswith("[[5, 6, 7, ")
    assert python(load, cwd=tmp_path).splitlines()[-1] == saved


@pytest.mark.parametrize("is_naive", [False, True])
def test_a_large_model_is_built_without_its_dense_weights(is_naive):
    """450 MB of dense block weights: they never exist together, except in the naive way, the negative control."""
    build = (
        "net = LlamaForCausalLM(config); inject(net, form)" if is_naive else "net = build_model(model, form, seed=0)"
    )
    grown_mib = int(
        python(
            f"""
import torch
from transformers import LlamaForCausalLM
from lost.config.model import DenseConfig, LostConfig, ModelConfig
from lost.model import build_model, inject
from lost.model.build import llama_config

def highest_mib():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

model = ModelConfig(name="large", vocab_size=64, hidden_size=768, intermediate_size=2048, num_hidden_layers=16,
    num_attention_heads=8, num_key_value_heads=8, lineage_rank=8)
# Drawn factors: factorising each of the {16 * 7} weights takes longer than the test is worth.
form = LostConfig(lost_rank=8, factor_init="cola", score="random")
config = llama_config(model, DenseConfig())
build_model(ModelConfig(name="warm", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, lineage_rank=8), form, seed=0)
before = highest_mib()
{build}
print(highest_mib() - before)
"""
        )
    )
    dense_mib = 16 * (4 * 768 * 768 + 3 * 768 * 2048) * 4 / 2**20
    if is_naive:
        assert grown_mib > dense_mib
    else:
        assert grown_mib < dense_mib / 4
