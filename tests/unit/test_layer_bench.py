"""`lost bench`: interleaving, medians, saved bytes, both kinds of result on tiny shapes."""

import csv
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

import lost.utils.versions
from lost.bench import block, layer, run, step, verify
from lost.bench.layer import ThreeProducts
from lost.bench.limits import Machine, Work, block_works, layer_works, lost_widths, step_works
from lost.bench.peers import PEERS, peer_layer
from lost.bench.timing import NUM_WARMUP_ROUNDS, SavedBytes, Timing, time_interleaved
from lost.config.model import DenseConfig, LostConfig, ModelConfig
from lost.config.runtime import DeviceConfig
from lost.config.schema import BenchConfig
from lost.model.lost_linear import LostLinear
from lost.utils.errors import ConfigError, TrainingError

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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
    # A published result names no folder of the machine that the command lies in.
    assert facts["versions"]["command_line"].split()[0] == "lost"
    assert facts["config"]["lost_rank"] == 6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_step_trains_both_arms(tmp_path, precision):
    result = run(tiny(what="step", runtime=DeviceConfig(device="cpu", precision=precision), to=str(tmp_path)))
    assert list(result.arms) == ["dense p1", "lost reference", "lost p1"]
    assert result.arms["lost p1"].num_parameters < result.arms["dense p1"].num_parameters
    assert result.limit_seconds("lost p1") < result.limit_seconds("dense p1")
    assert json.loads((tmp_path / "bench_step_tiny.json").read_text())["precision"] == precision


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


def test_results_of_an_earlier_run_do_not_make_the_code_dirty(tmp_path, monkeypatch):
    package = tmp_path / "lost"
    package.mkdir()
    (package / "__init__.py").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "lost"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(lost.utils.versions, "_PACKAGE_FOLDER", package)
    for name, is_dirty in (("benchmarks/results", False), ("docs", True)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "new.csv").write_text("1\n")
        assert lost.utils.versions.versions()["is_dirty"] is is_dirty


def test_a_history_with_other_columns_is_kept(tmp_path):
    (tmp_path / "bench_layer.csv").write_text("date,arm,older\n2026-01-01,dense,3\n")
    run(tiny(to=str(tmp_path), arms=["lost"]))
    older, *own = csv.DictReader((tmp_path / "bench_layer.csv").open())
    assert older["date"] == "2026-01-01"
    assert older["older"] == "3"
    assert older["median_seconds"] == ""
    assert [(line["arm"], line["older"]) for line in own] == [("dense", ""), ("lost", "")]
    assert all(float(line["median_seconds"]) > 0 for line in own)


def test_the_fraction_of_the_limit_is_in_table_json_and_history(tmp_path, capsys):
    result = run(tiny(to=str(tmp_path), arms=["cola", "lost"]))
    machine = result.machine
    # dense, padded to 48 -> 32, on 64 rows in float32.
    flops, moved = 2 * 64 * 48 * 32, 4 * (64 * 48 + 48 * 32 + 64 * 32)
    least = 3 * max(flops / machine.flops_per_second, moved / machine.bytes_per_second)
    assert result.limit_seconds("dense") == pytest.approx(least)
    facts = json.loads((tmp_path / "bench_layer.json").read_text())
    lines = {line["arm"]: line for line in csv.DictReader((tmp_path / "bench_layer.csv").open())}
    for name, arm in result.arms.items():
        fraction = result.limit_seconds(name) / arm.timing.median
        assert 0 < fraction < 2
        assert facts["arms"][name]["fraction_of_limit"] == pytest.approx(fraction)
        assert float(lines[name]["fraction_of_limit"]) == pytest.approx(fraction)
    assert facts["bytes_per_second"] == machine.bytes_per_second
    assert "limit %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "in_256", "in_2048", "in_4096"),
    [
        ("llama_60m", 1.15, 1.14, 1.12),
        ("llama_130m", 1.28, 1.25, 1.21),
        ("llama_350m", 1.62, 1.54, 1.46),
        ("llama_1b", 1.88, 1.80, 1.71),
        ("llama_7b", 2.13, 2.06, 1.98),
    ],
)
def test_limits_of_steps_are_those_of_another_roofline(name, in_256, in_2048, in_4096):
    """Speed-up over dense at the limit, as a model written apart from this one gives it for an H200.

    790 TFLOP/s and 4.3 TB/s, bfloat16 over float32 state; one update for 131072 tokens. It counts the head and the
    rounding of kept channels differently, by up to 2.5 %.
    """
    sizes = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())
    model = ModelConfig(**sizes | {"num_key_value_heads": sizes["num_attention_heads"]})
    machine, num_tokens = Machine(790e12, 4.3e12), 16384

    def seconds(form, seq_len):
        *work, update = step_works(model, form, num_tokens, seq_len, value_bytes=2, state_bytes=4)
        return machine.least_seconds(work) + machine.least_seconds([update]) * num_tokens / 131072

    for seq_len, expected in ((256, in_256), (2048, in_2048), (4096, in_4096)):
        lost = seconds(LostConfig(lost_rank=model.lineage_rank), seq_len)
        assert seconds(DenseConfig(), seq_len) / lost == pytest.approx(expected, rel=0.03)


def test_limits_of_forms():
    """R columns down and R + S up for LOST; both R for a peer; rows put S beside R."""
    columns = lost_widths(40, 30, 6, 4, "columns")
    assert (columns.num_down, columns.num_up) == (6, 10)
    assert sum(work.flops for work in layer_works(columns, 7, 4)) == 6 * 7 * (40 * 6 + 10 * 30)
    rows = lost_widths(40, 30, 6, 4, "rows")
    assert sum(work.flops for work in layer_works(rows, 7, 4)) == 6 * 7 * (40 * 10 + 6 * 30)
    model = tiny().model
    blocks = sum(work.flops for work in block_works(model, DenseConfig(), 64, 16, 4, factor_rank=8))
    linears = 4 * (32 + 32) + 3 * (32 + 48)
    assert blocks == 6 * 64 * 8 * linears + 7 * 16 * 32 * 64


def test_a_slow_and_a_fast_kernel_each_have_their_own_limit():
    works = [Work(flops=10.0, num_bytes=1.0), Work(flops=1.0, num_bytes=40.0)]
    assert Machine(flops_per_second=2.0, bytes_per_second=4.0).least_seconds(works) == 5.0 + 10.0


def test_every_backend_can_be_an_arm():
    arms = ["lost reference", "lost grouped", "lost"]
    assert list(run(tiny(arms=arms)).arms) == ["dense", *arms]
    names = ["lost grouped p1", "lost reference p1", "sltrain"]
    assert list(run(tiny(what="step", arms=names)).arms) == ["dense p1", *names]


def test_a_backend_that_the_device_has_not_is_refused():
    with pytest.raises(ConfigError, match="triton: needs a CUDA device"):
        run(tiny(arms=["lost triton"]))


@pytest.mark.parametrize("what", ["layer", "block", "step"])
def test_wrong_operators_are_not_timed(monkeypatch, what):
    timed = []
    for module in (layer, block, step):
        monkeypatch.setattr(module, "time_interleaved", lambda *args: timed.append(args))
    right = verify.outputs_of
    monkeypatch.setattr(verify, "outputs_of", lambda *given: [1.001 * y for y in right(*given)])
    with pytest.raises(TrainingError, match="nothing was timed"):
        run(tiny(what=what))
    assert not timed


def test_a_wrong_loss_is_not_timed(monkeypatch):
    right = verify.linear_cross_entropy
    monkeypatch.setattr(verify, "linear_cross_entropy", lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    with pytest.raises(TrainingError, match="operators of the loss"):
        run(tiny(what="step"))


def test_each_backend_is_verified_and_named(monkeypatch):
    right = verify.outputs_of

    def wrong_grouped(layers, x):
        return [y * (1.001 if layers[0].kernels == "grouped" else 1) for y in right(layers, x)]

    monkeypatch.setattr(verify, "outputs_of", wrong_grouped)
    run(tiny(what="step", arms=["lost reference"]))
    with pytest.raises(TrainingError, match="kernels = grouped"):
        run(tiny(what="step", arms=["lost reference", "lost grouped"]))


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
    facts = json.loads((tmp_path / "bench_loop_tiny.json").read_text())
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
    names = ["bench_checkpoint.csv", "bench_checkpoint_tiny.json", "bench_checkpoint_tiny.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    without, with_save = (result.arms[name].timing for name in windows)
    added = [a - b for a, b in zip(with_save.seconds, without.seconds, strict=True)]
    assert overhead["fraction"] == pytest.approx(sorted(added)[1] / without.median * num_steps / 100)
    assert f"{overhead['fraction']:.2%} of 100 steps of 4 rows of 16 tokens" in result.remark
