"""`fastkit bench train`: contenders in processes of their own, what it says of those that fail, and where time goes."""

import json
import math
import sys

import pytest
import torch
from tiny import SHAPE, tiny_model

from fastkit.cli import main
from fastkit.errors import FastkitError
from fastkit.lab import results
from fastkit.models import add_lora, budget, load
from fastkit.models.bnb import bnb, keep_differentiable
from fastkit.models.shapes import SHAPES, config_of
from fastkit.train import bench_contenders, bench_stages, bench_train
from fastkit.train.bench_contenders import CONTENDERS, Contender, Settings, carry_out
from fastkit.train.bench_stages import attribute, breakdown, floors
from fastkit.train.bench_train import TrainBenchConfig, _notes, bench, table

STEP = dict(batch=2, seq=16, rank=4, steps=2, warmup=1, device="cpu", seed=0)
FACTS = {"gbps": 3000, "tflops": {"bfloat16": 700.0, "float8": 1400.0}, "attention_ms": (0.3, 0.9), "attention_by": "x"}


@pytest.fixture(scope="module")
def model(folder):
    return str(tiny_model(folder / "tiny"))


def settings(model, who="ours", **changes) -> Settings:
    return Settings(who, **{"shape": model, "plan": "keep" if who == "ours" else None, **STEP, **changes})


def test_a_run(model, capsys, monkeypatch, tmp_path):
    """Ours in a process of its own, hf in this one, and one that is not installed."""
    start = bench_train._start
    monkeypatch.setattr(bench_train, "_start", lambda s, *rest: carry_out(s) if s.who == "hf" else start(s, *rest))
    monkeypatch.setattr(bench_train, "record", lambda *args: results.record(*args, folder=tmp_path))
    monkeypatch.setattr(bench_train, "resolve_device", lambda device="cpu": torch.device("cpu"))
    monkeypatch.setitem(CONTENDERS, "liger", Contender(None, "a_package_that_is_not_there"))
    flags = ["--shape", model, "--batch", "2", "--seq", "16", "--rank", "4", "--steps", "2", "--warmup", "1"]
    flags += ["--device", "cpu", "--vs", "hf,liger", "--plan", "keep", "--record", "trial"]
    assert main(["bench", "train", *flags]) == 0
    out = capsys.readouterr().out
    assert "liger       not installed: pip install a-package-that-is-not-there" in out
    assert "forward products" in out and "x hf" in out and "gaps" not in out
    result = results.load(tmp_path / "trial.json")
    assert result["command"].startswith(f"fastkit bench train --shape {model}")
    rows = {row["who"]: row for row in result["rows"] if row["what"] == "step"}
    for who in ("hf", "ours, keep"):
        row = rows[who]
        assert row["failed"] is None and 0 < row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"]
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["median_ms"] * 1e3)
        assert row["peak_allocated_gib"] is None
    assert rows["hf"]["first_loss"] == pytest.approx(rows["ours, keep"]["first_loss"], abs=1e-5)
    assert rows["hf"]["last_loss"] == pytest.approx(rows["ours, keep"]["last_loss"], abs=1e-3)
    assert rows["hf"]["trained"] == rows["ours, keep"]["trained"] > 0
    assert rows["ours, keep"]["layers"] == "2 layers keep" and rows["ours, keep"]["estimated_gib"] > 0


def test_each_plan_with_and_without_a_graph(model):
    config = TrainBenchConfig(vs="none", shape=model, plan=["keep", "leanest"], graphs=["off", "on"], **STEP)
    assert [bench_train.label(one) for one in config.settings()] == [
        "ours, keep", "ours, leanest", "ours, keep, graph", "ours, leanest, graph"
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_several_processes(model, strategy):
    """The first process has one's own batches; the gradients, and so the losses after a step, are of all."""
    config = TrainBenchConfig(
        vs="none", shape=model, plan=["keep"], processes=[1, 2], strategy=strategy, **STEP | {"warmup": 0}
    )
    found = bench(config)
    (one, two), stages = found.rows, found.stage_rows
    assert one["failed"] is None and two["failed"] is None, two["failed"]
    assert two["who"] == f"ours, keep, 2 x {strategy}" and not found.notes()
    assert two["tokens_per_second"] == pytest.approx(2 * 2 * 16 / two["median_ms"] * 1e3)
    assert two["first_loss"] == pytest.approx(one["first_loss"], abs=1e-5)
    assert two["last_loss"] != one["last_loss"]
    assert {row["who"] for row in stages} == {"ours, keep"} and "link" not in two


@pytest.mark.parametrize("compute", ["auto", "fp8"])
def test_stages_are_of_the_real_step(model, references, compute):
    """In this process, on the CPU: every part is there, and they are all of the profiled steps' time."""
    found = carry_out(settings(model, plan="recompute-all", compute=compute))
    assert "failed" not in found, found
    places = {(row["stage"], row["part"]) for row in found["stages"]}
    layer = {(stage, part) for stage in ("forward", "backward") for part in bench_stages.PARTS}
    layer -= {place for place in layer if compute == "auto" and place[1] == "quantizing"}
    assert places >= (layer - {("forward", "adapters")}) | {("loss", "other"), ("optimizer", "other")}
    assert ("forward", "adapters") not in places
    assert all(row["ms"] > 0 for row in found["stages"])
    rows = breakdown(found["stages"], {}, None)
    assert [row["stage"] for row in rows] == sorted((r["stage"] for r in rows), key=bench_stages.STAGES.index)
    assert all(row["floor_ms"] is None for row in rows)
    places = [(owner, name) for places in bench_stages.PARTS.values() for owner, name in places]
    assert not any(hasattr(getattr(owner, name), "__wrapped__") for owner, name in places)  # given back


def event(cat, ts, dur, **args):
    name = args.pop("name", "x")
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_kernels_count_where_they_were_launched():
    """Made by hand: a step of two parts within each other, kernels late and on two streams."""
    stage = [event("user_annotation", at, 0.1, name=f"fastkit stage: {name}")
             for at, name in ((10, "forward"), (40, "loss"), (50, "backward"), (90, "end"))]  # fmt: skip
    part = [
        event("user_annotation", 12, 20, name="fastkit part: products"),
        event("user_annotation", 14, 4, name="fastkit part: merging"),
        event("user_annotation", 60, 5, name="fastkit part: attention"),
        event("user_annotation", 0, 200, name="somebody else's"),
    ]
    launches = {1: 5, 2: 13, 3: 15, 4: 30, 5: 35, 6: 45, 7: 62, 8: 70, 9: 95, 10: 71}
    host = [event("cuda_runtime" if n % 2 else "cuda_driver", at, 1, correlation=n) for n, at in launches.items()]
    work = [event("kernel", 1000 + n, 100 * n, correlation=n, stream=7) for n in range(1, 10)]
    work += [
        event("gpu_memcpy", 2000, 500, correlation=10, stream=9),
        event("gpu_memset", 1, 1, correlation=99, stream=7),
    ]
    found = attribute([*stage, *part, *host, *work, {"ph": "M", "name": "no span"}], gpu=True)
    assert found == {
        ("forward", "products"): pytest.approx(0.2 + 0.4),
        ("forward", "merging"): pytest.approx(0.3),
        ("forward", "other"): pytest.approx(0.5),
        ("loss", "other"): pytest.approx(0.6),
        ("backward", "attention"): pytest.approx(0.7),
        ("backward", "other"): pytest.approx(0.8),
        ("beside", "copies"): pytest.approx(0.5),
        ("unknown", "other"): pytest.approx(0.001),
    }  # 1 and 9 were launched outside of the step
    rows = breakdown([{"stage": s, "part": p, "ms": ms} for (s, p), ms in found.items()], {("loss", "other"): 0.5}, 4.0)
    by_place = {(row["stage"], row["part"]): row for row in rows}
    assert by_place["gaps", "other"]["ms"] == pytest.approx(4.0 - 3.501) and by_place["gaps", "other"]["floor_ms"] == 0
    assert by_place["loss", "other"]["floor_ms"] == 0.5 and rows[-1]["stage"] == "beside"
    with pytest.raises(FastkitError, match="saw no kernel"):
        attribute([*stage, *part, *host], gpu=True)
    host_times = attribute([*stage, *part], gpu=False)
    assert host_times["forward", "merging"] == pytest.approx(0.004)
    assert host_times["forward", "products"] == pytest.approx(0.016)
    assert sum(host_times.values()) == pytest.approx(0.08)


def test_kernels_of_a_graph_count_as_those_that_were_launched_in_their_turn():
    """But for one of the masks, one in whose place there are two others, and copies beside, in another order."""
    marks = [event(cat, at, 0.1, name=f"fastkit stage: {name}") for cat in ("user_annotation", "gpu_user_annotation")
             for at, name in ((10, "forward"), (40, "backward"), (90, "optimizer"), (95, "end"))]  # fmt: skip
    product = event("user_annotation", 48, 10, name="fastkit part: products")
    away, back, within = (f"Memcpy {kind}" for kind in ("DtoH (Device -> Pinned)", "HtoD (x)", "DtoD (y)"))
    launched = {20: "norm", 30: "gemm", 35: "norm", 38: "Memset (Device)", 50: "gemm", 60: within, 92: "adam"}
    beside = {39: away, 42: back}

    def one_by_one(names, dur, stream=7):
        host = [event("cuda_runtime", at, 1, correlation=at) for at in names]
        return host + [
            event("kernel", 100 + at, dur, name=name, correlation=at, stream=stream) for at, name in names.items()
        ]

    once = [*marks, product, *one_by_one(launched, 100), *one_by_one(beside, 10, stream=8)]
    for copy in once:
        if copy.get("name", "").startswith("Memcpy"):
            copy["cat"] = "gpu_memcpy"
    replay = [event("cuda_runtime", 15, 1, name="cudaGraphLaunch", correlation=1)]
    replayed = [("mask", 3), ("norm", 20), (back, 11), ("gemm", 400), ("norm", 30), ("Memset (Unknown)", 2), (away, 12)]
    replayed += [("gemm of another kind", 600), ("its sums", 40), ("memcpy128", 7)]
    replay += [
        event("kernel", 200 + n, us, name=name, correlation=1, stream=9 if us < 20 else 7)
        for n, (name, us) in enumerate(replayed)
    ]
    found = bench_stages.attribute_replayed([*marks, *one_by_one({120: "adam"}, 5), *replay[::-1]], once)
    assert found == {
        ("forward", "other"): pytest.approx(0.003 + 0.02 + 0.4 + 0.03 + 0.002),
        ("backward", "products"): pytest.approx(0.6 + 0.04),
        ("backward", "other"): pytest.approx(0.007),
        ("optimizer", "other"): pytest.approx(0.005),
        ("beside", "copies"): pytest.approx(0.023),
    }


def test_the_floor_counts_the_model_itself():
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config_of("mistral-7b"))
    weights = sum(p.numel() for name, p in made.model.layers.named_parameters() if p.dim() == 2)
    step = Settings("ours", "mistral-7b", 4, 2048, 16, 8, 3, "cpu", 0)
    floor = floors(step, torch.bfloat16, FACTS)
    assert floor["forward", "products"] == pytest.approx(2 * 8192 * weights / 700e12 * 1e3)
    assert floor["backward", "products"] == floor["forward", "products"]
    assert floor["forward", "attention"] == pytest.approx(32 * 0.3)
    head = made.lm_head.weight.numel()
    assert floor["loss", "other"] == pytest.approx(4 * 8192 * head / 700e12 * 1e3, rel=0.02)
    stored = weights * (2 + 0.5)  # bf16 written, 4 bits read, and a little
    assert floor["forward", "merging"] == pytest.approx(stored / 3000e9 * 1e3, rel=0.03)
    fp8 = floors(Settings(**{**vars(step), "compute": "fp8"}), torch.bfloat16, FACTS)
    assert fp8["forward", "products"] == pytest.approx(floor["forward", "products"] / 2)
    assert fp8["forward", "merging"] < floor["forward", "merging"] and fp8["loss", "other"] == floor["loss", "other"]
    assert floors(step, torch.bfloat16, None) == {}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.cuda.OutOfMemoryError("tried to allocate 9 GiB.\nmore"), "out of memory: tried to allocate 9 GiB"),
        (FastkitError("no such plan"), "no such plan"),
        (RuntimeError("an illegal memory access"), "RuntimeError: an illegal memory access"),
        (UserWarning("a decoder layer goes through transformers, not fused: why"), "not fused: why"),
    ],
)
def test_one_that_fails_says_why(model, monkeypatch, error, said):
    def make(*_):
        if isinstance(error, UserWarning):
            import warnings

            warnings.warn(error, stacklevel=2)
        raise error

    monkeypatch.setitem(CONTENDERS, "hf", Contender(make))
    assert said in carry_out(settings(model, "hf"))["failed"]


def test_a_model_that_does_not_fit_is_out_of_memory():
    error = FastkitError("it does not fit")
    error.__cause__ = torch.cuda.OutOfMemoryError("x")
    assert bench_contenders._from_memory(error) and not bench_contenders._from_memory(FastkitError("x"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys; print('boom'); sys.exit(3)", "its process ended with exit code 3: boom"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended with exit code -9: it said nothing"),
        ("import time; time.sleep(60)", "not done after --time_limit 0.5 s"),
    ],
)
def test_a_process_that_dies_says_so(model, monkeypatch, text, said):
    monkeypatch.setattr(bench_train, "command", lambda *_: [sys.executable, "-c", text])
    config = TrainBenchConfig(
        vs="hf", shape=model, plan=["none"], device="cpu", time_limit=0.5 if "sleep" in text else 60
    )
    found = bench(config)
    assert [row["failed"] for row in found.rows] == [said] and not found.stage_rows
    assert said in table(found.rows, found.stage_rows)


def test_what_is_done_is_recorded_at_once(model, monkeypatch, tmp_path):
    """A run that is stopped keeps the contenders that had ended."""
    monkeypatch.setattr(bench_train, "record", lambda *args: results.record(*args, folder=tmp_path))

    def start(settings, *_):
        if settings.who == "hf-keep":
            raise KeyboardInterrupt
        return {"failed": "for the test"}

    monkeypatch.setattr(bench_train, "_start", start)
    config = TrainBenchConfig(vs="hf,hf-keep", shape=model, plan=["none"], device="cpu", record="trial")
    with pytest.raises(KeyboardInterrupt):
        bench(config, "a command")
    (row,) = results.load(tmp_path / "trial.json")["rows"]
    assert row["who"] == "hf" and row["failed"] == "for the test"


def row(who, first_loss, last_loss=1.0, compute="auto"):
    return {"who": who, "first_loss": first_loss, "last_loss": last_loss, "compute": compute, "failed": None}


def test_another_loss_is_said_to_be_wrong():
    good = [row("hf", 10.0), row("ours", 10.05), row("fp8", 10.2, compute="fp8")]
    assert _notes([*good, {"who": "x", "failed": "not installed"}], None) == []
    bad = [row("hf", 10.0), row("a", 10.2), row("b", math.nan), row("c", 10.0, math.nan)]
    assert [note.split(":")[0] for note in _notes(bad, None)] == ["a is WRONG", "b is WRONG", "c is WRONG"]
    assert "10.2000" in _notes(bad, None)[0]
    assert _notes(good, FACTS) == [
        "floor: 700 TFLOP/s in bfloat16, 1,400 TFLOP/s in float8, 3,000 GB/s, attention by x"
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--vs", "hf,unsloths"], "'unsloths' is no contender"),
        (["--plan", "fastest"], "--plan 'fastest' is unknown"),
        (["--compute", "fp4"], "--compute 'fp4' is unknown"),
        (["--graphs", "yes"], "--graphs 'yes' is unknown: use off, on, or both"),
        (["--graphs", "off", "on", "--batch", "0"], "--batch 0"),
        (["--compute", "bf16", "--device", "cpu"], "the model here is in float32"),
        (["--vs", "none", "--plan", "none"], "nothing to time"),
        (["--limit", "lots"], "'lots' is no amount of memory"),
        (["--budget", "8GiB", "0GiB"], "'0GiB' is no amount of memory"),
        (["--steps", "0"], "--steps 0 must be 1 or more"),
        (["--device", "cpu"], "--shape mistral-7b needs a GPU"),
        (["--device", "cpu", "--limit", "8GiB"], "--limit 8GiB is for a GPU"),
        (["--shape", "mistral-8b"], "'mistral-8b' is neither a folder nor one of mistral-7b"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, said):
    assert main(["bench", "train", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_contenders_are_as_asked():
    config = TrainBenchConfig(
        vs="hf,unsloth-keep", plan=["keep", "auto"], compute=["auto", "fp8"], budget=["8GiB", "6GiB"]
    )
    labels = [bench_train.label(s) for s in config.settings()]
    ours = ["ours, keep", "ours, auto 8 GiB", "ours, auto 6 GiB"]
    assert labels == ["hf", "unsloth-keep", *ours, *(f"{who}, fp8" for who in ours)]
    assert all(s.shape == "mistral-7b" and s.seq == 2048 and s.limit_gib is None for s in config.settings())
    config.limit = "budget"
    assert [s.limit_gib for s in config.settings()] == [None] * 3 + [8, 6, None, 8, 6]


def test_the_checkpoint_for_others_holds_the_same_weights(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(SHAPES, "tiny", {"model_type": "mistral", **SHAPE})
    step = settings("tiny", "checkpoint", checkpoint=str(tmp_path))
    assert carry_out(step) == {}
    read = keep_differentiable(AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}))
    made, _ = load("tiny", random_weights=True, device="cpu")
    assert isinstance(read.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, made(ids).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == made.config.vocab_size


def test_others_are_given_the_weights_to_load(monkeypatch):
    """One checkpoint for both of Unsloth's rows; in this process, and by transformers in its stead."""
    from transformers import AutoModelForCausalLM

    def make(step, dtype):
        base = AutoModelForCausalLM.from_pretrained(step.checkpoint, device_map={"": "cpu"})
        base.config.use_cache = False
        return add_lora(base, rank=step.rank, seed=step.seed), {}

    started = []
    monkeypatch.setattr(bench_train, "_start", lambda step, *_: started.append(step.who) or carry_out(step))
    monkeypatch.setattr(TrainBenchConfig, "check", lambda config: None)
    monkeypatch.setitem(SHAPES, "tiny", {"model_type": "mistral", **SHAPE})
    for who in ("unsloth", "unsloth-keep"):
        monkeypatch.setitem(CONTENDERS, who, Contender(make))
    found = bench(TrainBenchConfig(vs="hf,unsloth,unsloth-keep", shape="tiny", plan=["none"], **STEP))
    assert started == ["hf", "checkpoint", "unsloth", "unsloth-keep"] and not found.notes()
    assert all(row["failed"] is None for row in found.rows)
    assert len({round(row["first_loss"], 4) for row in found.rows}) == 1
    monkeypatch.setattr(bench_train, "_start", lambda step, *_: {"failed": "the disk is full"})
    found = bench(TrainBenchConfig(vs="unsloth", shape="tiny", plan=["none"], **STEP))
    assert found.rows[0]["failed"] == "no checkpoint to load: the disk is full"


def test_auto_takes_what_the_budget_allows(model):
    """The plans and their estimate are those of fastkit.models.budget; a budget too small names the least."""
    rich = bench_contenders._ours(settings(model, plan="auto", budget_gib=8.0), torch.float32)[1]
    assert rich["layers"] == "2 layers keep" and 0 < rich["estimated_gib"] < 8
    assert "needs a --budget" in carry_out(settings(model, plan="auto"))["failed"]
    found = carry_out(settings(model, plan="auto", budget_gib=1e-4))
    assert "do not fit" in found["failed"]


def test_auto_goes_by_the_rates_of_the_card(model, monkeypatch):
    """What a plan costs depends on them: on an H200 another is the fastest than on a card with slower products."""
    given, measured, choose = [], (690e12, 55e9), budget.choose
    monkeypatch.setattr(budget, "rates", lambda device, dtype: measured)
    monkeypatch.setattr(budget, "choose", lambda *args, rates, **kw: given.append(rates) or choose(*args, **kw))
    bench_contenders._ours(settings(model, plan="auto", budget_gib=8.0), torch.float32)
    assert given == [measured]


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu(model, capsys):
    flags = ["--shape", model, "--batch", "2", "--seq", "64", "--steps", "4", "--vs", "hf", "--plan", "keep", "auto"]
    assert main(["bench", "train", *flags, "--budget", "2GiB", "--limit", "4GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for row in found["rows"]:
        assert row["failed"] is None and 0 < row["peak_allocated_gib"] <= row["peak_reserved_gib"] <= 4
    stages = {(row["stage"], row["part"]): row for row in found["stages"] if row["who"] == "ours, keep"}
    assert stages["forward", "products"]["floor_ms"] > 0 and ("gaps", "other") in stages
    assert ("unknown", "other") not in stages
    assert any(note.startswith("floor: ") for note in found["notes"])


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["keep", "recompute-mlp+offload"])
def test_parts_of_a_graph(model, plan):
    rows = carry_out(settings(model, device="cuda", graphs=True, steps=4, warmup=3, plan=plan))["stages"]
    assert isinstance(rows, list), rows
    places = {(row["stage"], row["part"]) for row in rows}
    layer = {(stage, part) for stage in ("forward", "backward") for part in ("products", "attention", "elementwise")}
    assert layer < places and ("backward", "adapters") in places and not [p for p in places if p[0] == "unknown"]
    assert (("beside", "copies") in places) == plan.endswith("+offload")
