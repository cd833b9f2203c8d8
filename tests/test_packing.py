"""Packed records: the order, the rows, and that none sees another; the losses are those of records apart."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from fused_case import WINDOWED, fused, model_of, step
from hypothesis import given
from hypothesis import strategies as st
from test_distributed import assert_same_run, metrics, several
from test_trainer import curve, inputs, train  # noqa: F401  a fixture
from tiny import ARCHITECTURES
from torch.utils.data import BatchSampler

from fastkit.errors import FastkitError
from fastkit.models import pieces
from fastkit.train import data, run_folder
from fastkit.train.config import FinetuneConfig
from fastkit.train.finetune import FineTune
from fastkit.train.packing import PackedOrder, RowCollator, Rows, best_fit

ROOM = 64
lengths_ = st.lists(st.integers(1, ROOM), min_size=1, max_size=200)


@given(lengths=lengths_, seed=st.integers(0, 99))
def test_rows_hold_every_record_once_and_their_number_does_not_depend_on_the_order(lengths, seed):
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    rows = best_fit(lengths, order, ROOM)
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sizes) <= ROOM
    assert all(a + b > ROOM for n, a in enumerate(sizes) for b in sizes[:n]), "two rows would have gone into one"
    assert sorted(sizes) == sorted(sum(lengths[i] for i in row) for row in best_fit(lengths, range(len(order)), ROOM))


def test_each_record_goes_where_it_leaves_least_room():
    assert best_fit([5, 3, 8, 2, 4], range(5), 10) == [(2, 3), (0, 4), (1,)]
    assert best_fit([7, 6, 3], range(3), 10) == [(0, 2), (1,)]  # not with the 6, where it would leave one free


@given(
    lengths=lengths_,
    sizes=st.sampled_from([(1, 1, 6), (2, 1, 3), (1, 3, 2), (3, 2, 1), (2, 3, 1), (6, 1, 1), (1, 6, 1)]),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 5),
)
def test_a_step_holds_the_same_records_however_it_is_split(lengths, sizes, seed, epoch):
    """sizes: of a batch, processes, and passes a step."""
    batch_size, processes, _ = sizes

    def order_of(batch_size, processes):
        order = PackedOrder(lengths, ROOM, batch_size, 6, processes, hidden=8, seed=seed)
        order.set_epoch(epoch)
        return order

    whole, order = order_of(6, 1), order_of(batch_size, processes)
    rows = list(order)
    assert rows == list(order) and len(rows) == len(order) and not len(rows) % (batch_size * processes)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert [sorted(filter(None, rows[n : n + 6])) for n in range(0, len(rows), 6)] == [
        sorted(filter(None, row)) for row in (list(whole)[n : n + 6] for n in range(0, len(whole), 6))
    ]
    shares = [
        list(BatchSamplerShard(BatchSampler(order, batch_size, drop_last=False), processes, number))
        for number in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    passes = 6 // (batch_size * processes)
    for start in range(0, len(shares[0]), passes):
        mine = [[row for batch in share[start : start + passes] for row in batch] for share in shares]
        costs = [order.cost(row) for rows in mine for row in rows]
        loads = [sum(map(order.cost, rows)) for rows in mine]
        assert max(loads) - min(loads) <= max(costs) - min(costs) + 1e-9


def test_what_is_dear_is_shared_out():
    rows = list(PackedOrder(range(41, 49), ROOM, 2, 8, 2, hidden=10**9, seed=0))  # a record each
    shares = ([*rows[:2], *rows[4:6]], [*rows[2:4], *rows[6:]])
    assert [[41 + index for (index,) in share] for share in shares] == [[48, 45, 44, 41], [47, 46, 43, 42]]


def test_seeds_and_epochs_differ_in_rows_and_in_neighbours():
    lengths = [random.Random(n).randint(4, ROOM // 3) for n in range(400)]
    order = PackedOrder(lengths, ROOM, 2, 4, 2, hidden=8, seed=0)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    other = list(PackedOrder(lengths, ROOM, 2, 4, 2, hidden=8, seed=1))
    assert len(first) == len(second) == len(other)
    for rows in (second, other):
        assert len({frozenset(row) for row in first} & {frozenset(row) for row in rows}) < len(first) / 10
    sizes = [sum(lengths[index] for index in row) for row in first]
    assert sizes != sorted(sizes) and sum(lengths) > 0.98 * ROOM * order.rows
    assert f"400 records in {order.rows} rows of 64 tokens" in str(order)


def test_a_long_record_costs_more_than_short_ones_of_as_many_tokens():
    order = PackedOrder([60, 20, 20, 20], ROOM, 1, 1, 1, hidden=100, seed=0)
    assert order.cost((0,)) == 60 + 60 * 60 / 1200 > order.cost((1, 2, 3)) == 60 + 3 * 20 * 20 / 1200 > order.cost(())


RECORDS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8, 9], "labels": [8, 9]},
    {"input_ids": [10], "labels": [10]},
]


def test_rows_become_a_batch_and_no_record_predicts_the_next():
    batch = RowCollator(0)([RECORDS[:2], RECORDS[2:], []])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [10, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 1], [0, -4, -3, -2, -1]],
        "labels": [[-100, 6, 7, -100, 9], [-100] * 5],
        "logits_to_keep": [0, 1, 3],
        "shift_labels": [[6, 7, 9], [-100] * 3],
    }
    alone = RowCollator(0)(RECORDS[:2])  # as validation gives them
    assert alone["position_ids"].tolist() == [[0, 1, 2], [0, 1, -1]]
    nothing = RowCollator(0)([[], []])
    assert nothing["position_ids"].tolist() == [[-1]] and nothing["shift_labels"].tolist() == [[-100]]


def test_rows_of_a_dataset():
    order = PackedOrder([3, 2, 1], 5, 2, 2, 1, hidden=8, seed=0)
    rows = Rows(Dataset.from_list(RECORDS), order)
    assert len(rows) == 2 and rows[(2, 0)] == [RECORDS[2], RECORDS[0]] and rows[()] == []


def random_rows(lengths_of_rows):
    """Rows of records of random tokens, of which some are targets, the first too."""
    return [
        [
            {"input_ids": ids.tolist(), "labels": ids.masked_fill(torch.rand(n) < 0.3, data.IGNORE).tolist()}
            for n in row
            for ids in [torch.randint(3, 300, (n,))]
        ]
        for row in lengths_of_rows
    ]


def only(rows, kept):
    """`rows`, in which the record `kept`, (row, place), has all targets."""
    return [
        [
            record if (n, m) == kept else {**record, "labels": [data.IGNORE] * len(record["labels"])}
            for m, record in enumerate(row)
        ]
        for n, row in enumerate(rows)
    ]


def random_lengths():
    draw = random.Random(torch.initial_seed())
    return [[draw.randint(1, 14) for _ in range(draw.randint(1, 4))] for _ in range(3)]


def patched_or_not(folder, arch, kind, windowed):
    model = model_of(folder, arch, **(WINDOWED[arch] if windowed else {}))
    if kind == "fused":
        return fused(model)
    model.base_model.model.set_attn_implementation(kind)
    return model


CASES = [
    *((arch, kind, False) for arch in ARCHITECTURES for kind in ("fused", "sdpa")),
    *((arch, kind, True) for arch in WINDOWED for kind in ("fused", "sdpa")),
    ("llama", "eager", False),
]


@pytest.mark.parametrize(("arch", "kind", "windowed"), CASES)
def test_the_loss_of_each_record_and_of_all_is_that_of_records_apart(
    folder, references, fresh_seed, recwarn, arch, kind, windowed
):
    model, rows = patched_or_not(folder, arch, kind, windowed), random_rows(random_lengths())
    records = [record for row in rows for record in row]
    pad, lay = data.Collator(0), RowCollator(0)
    one = torch.ones(())
    for n, row in enumerate(rows):
        for m, record in enumerate(row):
            packed = model(**lay(only(rows, (n, m))), use_cache=False, num_items_in_batch=one).loss
            alone = model(**pad([record]), use_cache=False, num_items_in_batch=one).loss
            assert abs(packed - alone) <= 1e-5 * max(1, len(record["input_ids"])), (n, m)
    packed, apart = step(model, **lay(rows)), step(model, **pad(records))
    assert abs(packed[0] - apart[0]) <= 1e-5
    for name, gradient in apart[1].items():
        assert (packed[1][name] - gradient).abs().max() <= 2e-5 * gradient.abs().max().clamp_min(1e-6), name
    assert not [w for w in recwarn if "not fused" in str(w.message)]


def test_rows_through_the_kernels(folder, fresh_seed, device):
    """In Triton's interpreter, or in bf16 on a GPU; the records apart by transformers."""
    dtype, limit = ("bf16", 2e-2) if device == "cuda" else ("fp32", 1e-5)
    model, rows = model_of(folder, device=device, dtype=dtype), random_rows([[3, 5], [4]])
    batches = RowCollator(0)(rows), data.Collator(0)([record for row in rows for record in row])
    packed, apart = ({name: x.to(device) for name, x in batch.items()} for batch in batches)
    assert abs(step(fused(model), **packed)[0] - step(model, **apart)[0]) <= limit


@pytest.mark.parametrize("kind", ["fused", "sdpa"])
def test_a_record_has_the_same_gradient_beside_other_neighbours(folder, references, fresh_seed, kind):
    model = patched_or_not(folder, "llama", kind, False)
    first, second = ([5, 9, 7], [4]), ([11, 9, 2, 3], [8, 8])
    rows, others = random_rows(first), random_rows(second)
    others[0][1] = rows[0][1]
    losses, gradients = zip(*(step(model, **RowCollator(0)(only(r, (0, 1)))) for r in (rows, others)), strict=True)
    assert abs(losses[0] - losses[1]) <= 1e-5
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


def test_with_a_cache_records_would_see_each_other(folder, references, fresh_seed):
    """Why the trainer has use_cache off: else the mask is causal over the whole row."""
    model, rows = patched_or_not(folder, "llama", "sdpa", False), random_rows([[9, 9]])
    batch = RowCollator(0)(only(rows, (0, 1)))
    apart = model(**data.Collator(0)([rows[0][1]]), use_cache=False).loss
    assert abs(model(**batch, use_cache=False).loss - apart) <= 1e-5 < abs(model(**batch, use_cache=True).loss - apart)


def apart(self, rows):
    """In the place of RowCollator's call: the records of the rows, each padded in a row of its own."""
    rows = [row if isinstance(row, list) else [row] for row in rows]
    return data.Collator(self.pad_token_id)([record for row in rows for record in row])


PACKED = dict(packing="on", max_length=150, batch_size=2, steps=6, eval_steps=3)  # three records a row


@pytest.mark.parametrize(
    "settings", [dict(kernels="off"), dict(kernels="on", plan="keep"), dict(kernels="on", plan="leanest")]
)
@pytest.mark.usefixtures("references")
def test_a_fine_tune_has_the_losses_of_the_same_records_apart(inputs, tmp_path, monkeypatch, settings):  # noqa: F811
    packed = train(inputs, tmp_path / "packed", **PACKED, **settings)
    split = train(inputs, tmp_path / "split", **PACKED | {"batch_size": 1, "accumulation": 2}, **settings)
    monkeypatch.setattr(RowCollator, "__call__", apart)
    alone = train(inputs, tmp_path / "apart", **PACKED, **settings)
    for other in (split, alone):
        assert max(abs(a - b) for a, b in zip(curve(packed), curve(other), strict=True)) <= 1e-5
        losses = [[loss for _, loss in run["validation_losses"]] for run in (packed, other)]
        assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-5
        assert packed["tokens"] == other["tokens"]


def test_an_epoch_trains_every_record_and_tells_what_was_padding(inputs, tmp_path, capsys):  # noqa: F811
    settings = {**PACKED, "steps": -1, "epochs": 2.0}
    run = FineTune(**{**inputs, **settings, "output": str(tmp_path / "run")}).prepare()
    order = run.trainer.order
    assert str(order) in capsys.readouterr().out
    widths = 0
    for epoch in range(2):
        order.set_epoch(epoch)
        sizes = [sum(order.lengths[index] for index in row) for row in order]
        widths += sum(2 * max(pair) if all(pair) else max(pair) for pair in zip(sizes[::2], sizes[1::2], strict=True))
    found = run.train()
    assert found["tokens"] == 2 * found["data"]["train"]["tokens"] and found["steps"] == 2 * len(order) / 2
    assert 0 < found["padding"] == pytest.approx(1 - found["tokens"] / widths, abs=1e-4)


def test_padding_is_told_of_records_too(inputs, tmp_path):  # noqa: F811
    run = FineTune(**{**inputs, "steps": 6, "output": str(tmp_path / "run")}).prepare()
    lengths = [run.trainer.order.lengths[index] for index in run.trainer.order]
    places = sum(4 * max(lengths[n : n + 4]) for n in range(0, 24, 4))
    assert 0 < run.train()["padding"] == pytest.approx(1 - sum(lengths) / places, abs=1e-4)


@pytest.mark.usefixtures("references")
def test_a_packed_step_that_runs_out_of_memory_begins_again(inputs, tmp_path, monkeypatch):  # noqa: F811
    settings = {**PACKED, "batch_size": 1, "accumulation": 2, "kernels": "on", "plan": "keep", "dropout": 0.3}
    expected = train(inputs, tmp_path / "without", **settings)
    calls, work = [], pieces.gated_backward_

    def breaks_once(*args):
        calls.append(1)
        if len(calls) == 2 * 2 + 2 + 1:  # in the first layer of the second step's second pass
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return work(*args)

    monkeypatch.setattr(pieces, "gated_backward_", breaks_once)
    with pytest.warns(UserWarning, match="step 1 begins again under 2 layers"):
        ours = train(inputs, tmp_path / "with", **settings)
    assert max(abs(a - b) for a, b in zip(curve(ours), curve(expected), strict=True)) <= 1e-6


@pytest.mark.parametrize(
    ("packing_", "on_gpu", "plan", "settled"),
    [
        ("auto", True, "keep", "on"),
        ("auto", True, "auto", "on"),
        ("auto", True, "off", "off"),
        ("auto", False, "keep", "off"),
        ("on", False, "off", "on"),
        ("off", True, "keep", "off"),
    ],
)
def test_auto_packs_where_layers_are_fused_on_a_gpu(packing_, on_gpu, plan, settled):
    run = FineTune(packing=packing_, plan=plan)
    run._settle_packing(on_gpu)
    assert run.config.packing == run.metrics["config"]["packing"] == settled


def test_a_run_is_resumed_as_it_was_packed(tmp_path):
    run_folder.claim(FinetuneConfig(packing="on", output=str(tmp_path)))
    with pytest.raises(FastkitError, match="packing was 'on'"):
        run_folder.check(FinetuneConfig(packing="off", output=str(tmp_path), resume=True))


@pytest.mark.slow
def test_killed_and_resumed_has_the_same_losses(inputs, tmp_path):  # noqa: F811
    """Also with another split of a step, in the second epoch or later: one is three steps."""
    settings = {**PACKED, "steps": 12, "eval_steps": 2}
    expected = train(inputs, tmp_path / "whole", **settings)
    flags = [f"--{name}={value}" for name, value in {**inputs, **settings, "learning_rate": 1e-3}.items()]
    command = [sys.executable, "-m", "fastkit", "finetune", *flags, f"--output={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    kill_after = random.choice([4, 6, 8])
    print("killed after checkpoint", kill_after)
    while not (tmp_path / f"killed/checkpoint-{kill_after}").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/metrics.json").exists(), "the run ended before it was killed"
    split = {"batch_size": 1, "accumulation": 2, "resume": True}
    got = train(inputs, tmp_path / "killed", **settings | split)
    assert got["resumed_from"] and len(curve(got)) == 12
    assert max(abs(a - b) for a, b in zip(curve(got), curve(expected), strict=True)) <= 1e-5


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(inputs, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("fastkit.kernels.common.INTERPRETED", False)
    settings = {**inputs, **PACKED, "kernels": "on", "plan": "keep", "optimizer": "adamw", "learning_rate": 1e-3}
    settings |= {"batch_size": 4, "patience": 0, "samples": 1}
    alone = train(settings, tmp_path / "alone", **settings)
    runs = {
        "ddp": dict(batch_size=1, accumulation=2),
        "fsdp2": dict(batch_size=2, strategy="fsdp2"),
    }
    done = several(2, *({**settings, **run, "output": str(tmp_path / name)} for name, run in runs.items()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("packing: ") == 2 and "not fused" not in done.stderr
    for name in runs:
        ours = metrics(tmp_path / name)
        assert ours["processes"] == 2
        assert_same_run(ours, alone)
