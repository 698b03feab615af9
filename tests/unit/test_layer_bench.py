"""`lost bench`: interleaving, medians, saved bytes, both kinds of result on tiny shapes."""

import csv
import json
import time

import pytest
import torch

from lost.bench import run
from lost.bench.layer import ThreeProducts
from lost.bench.peers import PEERS, peer_layer
from lost.bench.timing import NUM_WARMUP_ROUNDS, SavedBytes, Timing, time_interleaved
from lost.config.model import LostConfig, ModelConfig
from lost.config.runtime import DeviceConfig
from lost.config.schema import BenchConfig
from lost.model.lost_linear import LostLinear
from lost.utils.errors import ConfigError, TrainingError

CPU = torch.device("cpu")


def tiny(**options) -> BenchConfig:
    model = ModelConfig(
        name="tiny",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        lineage_rank=8,
    )
    defaults = {
        "model": model,
        "parameterization": LostConfig(lost_rank=8, density=0.1),
        "runtime": DeviceConfig(device="cpu"),
        "in_features": 40,
        "out_features": 30,
        "lost_rank": 6,
        "num_tokens": 64,
        "seq_len": 16,
        "repeats": 3,
    }
    return BenchConfig(**{**defaults, **options})


def test_arms_take_turns_and_warm_up_is_not_counted():
    calls = []
    timings = time_interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 4, CPU)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]
    assert len(rounds) == 4 + NUM_WARMUP_ROUNDS
    assert {len(timing.seconds) for timing in timings.values()} == {4}


def test_times_are_those_of_the_arm():
    timings = time_interleaved({"short": lambda: None, "long": lambda: time.sleep(0.02)}, 3, CPU)
    assert timings["long"].median >= 0.02
    # No fixed limit: on a busy machine a call of nothing can take milliseconds.
    assert timings["short"].median < timings["long"].median


def test_median_spread_and_ratios():
    timing = Timing((3.0, 1.0, 2.0, 5.0, 4.0, 100.0))
    assert timing.median == 3.5
    assert timing.spread == (2.0, 5.0)
    assert timing.ratios_to(Timing((1.0, 1.0, 4.0, 5.0, 2.0, 50.0))) == (3.0, 1.0, 0.5, 1.0, 2.0, 2.0)


def test_saved_bytes_counts_each_storage_once_and_leaves_inputs_out():
    x, weight = torch.randn(10, 7, requires_grad=True), torch.randn(7, 7, requires_grad=True)
    with SavedBytes([x, weight]).counting() as saved:
        h = x @ weight
        (h.view(70) * h.reshape(70)).sum()
    assert saved.num_bytes == 10 * 7 * 4


def test_lost_keeps_less_than_three_products():
    layer = LostLinear(64, 64, lost_rank=16, density=0.1)
    x = torch.randn(100, 64, requires_grad=True)
    kept = {}
    for module in (layer, ThreeProducts(layer)):
        with SavedBytes([x, *layer.parameters(), *layer.buffers()]).counting() as saved:
            module(x)
        kept[type(module)] = saved.num_bytes
    assert kept[LostLinear] == 100 * (16 + 6) * 4
    assert kept[ThreeProducts] > 1.5 * kept[LostLinear]


@pytest.mark.parametrize("mode", ["fixed", "folded", "learnable"])
@pytest.mark.parametrize("density", [0, 0.1])
def test_three_products_are_the_same_function(mode, density):
    layer = LostLinear(20, 30, lost_rank=5, density=density, gamma_mode=mode, dtype=torch.float64)
    x = torch.randn(6, 20, dtype=torch.float64)
    assert torch.allclose(ThreeProducts(layer)(x), layer(x), rtol=1e-12, atol=1e-15)


def test_layer_result_and_json(tmp_path, capsys):
    result = run(tiny(to=str(tmp_path / "new")))
    assert list(result.arms) == ["dense", "cola", "sltrain", "low_rank", "three products", "lost reference", "lost"]
    # Padded to multiples of 16, as LOST pads inside.
    assert result.arms["dense"].num_parameters == 48 * 32
    assert result.arms["lost"].num_parameters == 6 * 70 + 4 * 30
    assert result.ratio_to_base("dense") == 1
    assert "three products" in capsys.readouterr().out
    facts = json.loads((tmp_path / "new" / "bench_layer.json").read_text())
    assert facts["num_threads"] == torch.get_num_threads()
    assert facts["arms"]["lost"]["median_seconds"] == result.arms["lost"].timing.median
    assert facts["arms"]["lost"]["time_over_base"] == result.ratio_to_base("lost")
    assert facts["versions"]["packages"]["torch"] == torch.__version__
    assert facts["config"]["lost_rank"] == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_step_trains_both_arms(tmp_path, precision):
    result = run(tiny(what="step", runtime=DeviceConfig(device="cpu", precision=precision), to=str(tmp_path)))
    assert list(result.arms) == ["dense p1", "lost reference", "lost p1"]
    assert result.arms["lost p1"].num_parameters < result.arms["dense p1"].num_parameters
    assert result.limit_seconds("lost p1") < result.limit_seconds("dense p1")
    assert json.loads((tmp_path / "bench_step.json").read_text())["precision"] == precision


def test_block_has_every_arm_and_keeps_less_at_higher_levels():
    arms = run(tiny(what="block")).arms
    assert list(arms) == ["dense", "cola", "sltrain", "low_rank", "lost reference", "lost", "lost p1", "lost p3"]
    assert arms["lost p3"].saved_bytes < arms["lost p1"].saved_bytes < arms["lost"].saved_bytes
    assert arms["lost"].saved_bytes < arms["lost reference"].saved_bytes


def test_memory_counts_the_state_and_every_level():
    arms = run(tiny(what="memory", arms=["lost none", "lost p1", "lost block"])).arms
    assert list(arms) == ["dense none", "lost none", "lost p1", "lost block"]
    assert all(arm.peak_bytes > 16 * arm.num_parameters for arm in arms.values())
    assert arms["lost block"].saved_bytes < arms["lost p1"].saved_bytes < arms["lost none"].saved_bytes


def test_compiled_arms():
    result = run(tiny(compiled=True, arms=["lost"], num_tokens=16))
    assert list(result.arms) == ["dense", "lost", "dense, compiled", "lost, compiled"]


def test_every_run_adds_lines_to_the_history(tmp_path):
    for _ in range(2):
        run(tiny(to=str(tmp_path), arms=["lost"]))
    lines = list(csv.DictReader((tmp_path / "bench_layer.csv").open()))
    assert [line["arm"] for line in lines] == ["dense", "lost"] * 2
    assert all(line["torch"] == torch.__version__ and line["device"] and "commit" in line for line in lines)
    assert (tmp_path / "bench_layer.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_operators_are_not_timed(monkeypatch):
    right = LostLinear.forward
    monkeypatch.setattr(LostLinear, "forward", lambda self, x: 1.01 * right(self, x))
    with pytest.raises(TrainingError, match="nothing was timed"):
        run(tiny())


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_their_definitions(name):
    layer = peer_layer(name, 10, 12, 3, dtype=torch.float64)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    if name == "sltrain":
        torch.nn.init.normal_(layer.values)
        sparse = torch.zeros(120, dtype=torch.float64).index_add(0, layer.places, layer.values).view(12, 10)
        expected = x @ (layer.up @ layer.down + sparse).T
    else:
        h = x @ layer.down.T
        expected = (h * torch.sigmoid(h) if name == "cola" else h) @ layer.up.T
    torch.testing.assert_close(layer(x), expected)
    inputs = [x, *layer.parameters()]
    for own, other in zip(
        torch.autograd.grad(layer(x).square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"what": "step", "num_tokens": 50}, "num_tokens = 50 is no multiple of seq_len = 16"),
        ({"what": "step", "seq_len": 128, "num_tokens": 128}, "seq_len = 128 is above model.max_position_embeddings"),
        ({"lost_rank": 31}, "lost_rank = 31"),
        ({"arms": ["densse"]}, "densse"),
        ({"parameterization": LostConfig(selection_axis="rows")}, "selection_axis = rows"),
        ({"parameterization": LostConfig(rank_overrides={"a": 2})}, "rank_overrides"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        run(tiny(**options))


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tiny())
    assert not list(tmp_path.iterdir())


def test_the_loop_is_a_real_run_and_its_steps_hold_the_work(tmp_path):
    result = run(tiny(what="loop", num_tokens=64, to=str(tmp_path), repeats=6))
    work, whole = result.arms["model"].timing, result.arms["whole step"].timing
    assert len(work.seconds) == len(whole.seconds) == 6
    assert all(0 < inner < outer for inner, outer in zip(work.seconds, whole.seconds, strict=True))
    facts = json.loads((tmp_path / "bench_loop.json").read_text())
    assert facts["arms"]["model"]["time_over_base"] == 1
    assert facts["arms"]["whole step"]["time_over_base"] > 1


def test_a_checkpoint_is_saved_and_resumed_each_round(tmp_path):
    result = run(tiny(what="checkpoint", to=str(tmp_path)))
    overhead = result.facts()["overhead"]
    num_steps = overhead["window_steps"]
    windows = [f"{num_steps} steps", f"{num_steps} steps and a save"]
    assert list(result.arms) == ["save", "save in background", "resume", *windows]
    assert {len(arm.timing.seconds) for arm in result.arms.values()} == {3}
    assert "checkpoint of tiny, 0 MiB" in result.title
    names = [f"bench_checkpoint.{ending}" for ending in ("csv", "json", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    without, with_save = (result.arms[name].timing for name in windows)
    added = [a - b for a, b in zip(with_save.seconds, without.seconds, strict=True)]
    assert overhead["fraction"] == pytest.approx(sorted(added)[1] / without.median * num_steps / 100)
    assert f"{overhead['fraction']:.2%} of 100 steps of 4 rows of 16 tokens" in result.remark
