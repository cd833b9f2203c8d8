"""The warm-up: what it compiles and keeps, and that nothing is left to compile after it."""

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_data, tiny_model

from fastkit.cli import main
from fastkit.errors import FastkitError
from fastkit.kernels import attention_forward, choices
from fastkit.kernels.attention_choice import BACKENDS
from fastkit.lab.compilations import Compilation
from fastkit.models import graphs, warmup_rows
from fastkit.models.sequences import begin, ends
from fastkit.models.warmup import WarmUp, shapes, warm_up
from fastkit.models.warmup_rows import Heads, Rows, packed_rows

HEADS = Heads(4, 2, 16, torch.float32)  # of tiny models


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and none that ships."""
    monkeypatch.setenv("FASTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "shipped")
    choices._read.cache_clear()
    yield tmp_path
    choices._read.cache_clear()


def run(code, *args, **environment):
    """The output of a fresh Python."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPILE = """
import sys
from fastkit.lab.compiling import take_for
from fastkit.lab.compilations import compilations
import triton
from triton.compiler import ASTSource
target = take_for("sm_90")

@triton.jit
def copy(x_ptr, y_ptr, BLOCK: triton.language.constexpr):
    numbers = triton.language.arange(0, BLOCK)
    triton.language.store(y_ptr + numbers, triton.language.load(x_ptr + numbers))

def build(BLOCK):
    source = ASTSource(copy, {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": BLOCK})
    triton.compile(source, target=target)

heard = []
triton.knobs.compilation.listener = lambda **found: heard.append(found["cache_hit"])
with compilations() as found:
    build(64)
    build(128)
    build(64)
assert triton.knobs.compilation.listener is not None
build(256)
print([one.kernel for one in found.compiled], found.cached, all(one.seconds > 0 for one in found.compiled), heard)
"""


def test_compilations_are_told_from_what_the_cache_holds(tmp_path):
    script = tmp_path / "script.py"  # triton reads a kernel's source from its file
    script.write_text(COMPILE)
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    first, second = (run(code, script, TRITON_CACHE_DIR=str(tmp_path / "triton")).strip() for _ in range(2))
    assert first == "['copy', 'copy'] ['copy'] True [False, False, True, False]"
    assert second == "[] ['copy', 'copy', 'copy'] True [True, True, True, True]"


class TestChoices:
    def test_what_is_stored_is_there_in_the_next_process(self, cache):
        assert choices.stored("a.json", "small") is None
        choices.store("a.json", "small", "flash")
        choices.store("a.json", "large", "cudnn")
        code = "from fastkit.kernels import choices; print(choices.stored('a.json', 'small'))"
        assert run(code, FASTKIT_CACHE=str(cache / "cache")).strip() == "flash"
        assert json.loads((choices.folder() / "a.json").read_text()) == {"large": "cudnn", "small": "flash"}
        assert choices.stored("b.json", "small") is None
        assert [path.name for path in choices.folder().iterdir()] == ["a.json"]

    def test_what_ships_is_read_first(self, cache):
        choices.store("a.json", "small", "flash")
        choices.SHIPPED.mkdir()
        (choices.SHIPPED / "a.json").write_text('{"small": "ours"}')
        choices._read.cache_clear()
        assert choices.stored("a.json", "small") == "ours"

    def test_what_ships_is_of_named_cards_and_can_be_chosen(self):
        shipped = list(choices.SHIPPED.glob("*"))
        assert shipped
        for path in shipped:
            assert re.fullmatch(r"attention-[\w.+-]+-torch[\d.]+\+cu\d+-triton[\d.]+-cudnn\d+\.json", path.name)
            for kind, choice in choices._read(path).items():
                names = kind.partition(", of ")[2].split()
                assert choice in names and set(names) <= {*BACKENDS}

    def test_another_card_or_version_has_another_file(self, monkeypatch):
        names = {choices.file_name("attention", "A card"), choices.file_name("attention", "B card")}
        monkeypatch.setattr(torch, "__version__", "9.9")
        names.add(choices.file_name("attention", "A card"))
        assert len(names) == 3 and all(Path(name).name == name and " " not in name for name in names)

    @pytest.mark.parametrize("text", ["", "{", '{"small": "fl', "[1]", '{"small": 3}', b"\xff\xfe"])
    def test_a_damaged_file_is_said_and_written_anew(self, cache, text):
        choices.folder().mkdir(parents=True)
        path = choices.folder() / "a.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.warns(UserWarning, match=r"a\.json cannot be read .* timed anew"):
            assert choices.stored("a.json", "small") is None
        with pytest.warns(UserWarning, match="cannot be read"):
            choices.store("a.json", "small", "flash")
        assert choices.stored("a.json", "small") == "flash"

    def test_a_folder_that_cannot_be_written_stops_nothing(self, cache):
        (cache / "cache").write_text("a file")
        with pytest.warns(UserWarning, match="not kept for the next run: .*; FASTKIT_CACHE"):
            choices.store("a.json", "small", "flash")

    def test_a_write_that_breaks_off_leaves_the_old_file(self, cache, monkeypatch):
        choices.store("a.json", "small", "flash")
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.warns(UserWarning, match="No space left"):
            choices.store("a.json", "large", "cudnn")
        assert json.loads((choices.folder() / "a.json").read_text()) == {"small": "flash"}
        assert [path.name for path in choices.folder().iterdir()] == ["a.json"]

    def test_readers_meet_a_whole_file_while_others_write(self, cache):
        code = "from fastkit.kernels import choices\nfor n in range(20): choices.store('a.json', f'{n}' * 500, 'flash')"
        choices.store("a.json", "small", "flash")
        environment = os.environ | {"FASTKIT_CACHE": str(cache / "cache")}
        writers = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
        read = 0
        while any(writer.poll() is None for writer in writers):
            json.loads((choices.folder() / "a.json").read_text())
            read += 1
            time.sleep(0.001)
        assert read and not any(writer.returncode for writer in writers)
        assert [path.name for path in choices.folder().iterdir()] == ["a.json"]


@pytest.mark.usefixtures("references")
def test_the_steps_run_as_references_on_a_cpu(folders, cache):
    for arch in ("llama", "qwen3"):
        found = warm_up(str(folders[arch]), batch=2, seq=5, rank=4, plans=["keep", "leanest", "off"], device="cpu")
        sizes, few = len(shapes(2, 5)), 3  # lengths of 5, 4 and 1
        packed = len(packed_rows(range(1, 3), range(1, 6), HEADS))
        assert packed > 2 and found.steps == 1 + sizes + packed + 2 * few + sizes
        assert (found.compiled, found.cached, found.binaries) == ((), 0, None)
    assert not choices.folder().exists(), "nothing is timed on a CPU"


@pytest.mark.usefixtures("references")
def test_every_kind_of_layer_has_one(folder, cache):
    model = tiny_model(
        folder / "windowed",
        "qwen2",
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=1,
        num_hidden_layers=4,
    )
    one = warm_up(str(model), batch=1, seq=5, rank=4, plans=["keep"], every_length=False, device="cpu")
    packed = packed_rows(range(1, 2), range(5, 6), replace(HEADS, windows=(3,)))
    assert one.steps == 3 + len(packed) > 4


def test_shapes():
    found = shapes(4, 2048)
    assert found[0] == (4, 2048) and len(found) == len(set(found))
    assert {records for records, _ in found} == {1, 2, 3, 4} and {tokens for _, tokens in found} >= set(range(1, 129))
    for records in range(1, 5):
        remainders = {records * tokens % 16 for n, tokens in found if n == records}
        assert 0 in remainders and len(remainders) >= 4
    assert shapes(1, 1) == [(1, 1)]


@pytest.mark.parametrize(
    ("heads", "batch", "seq", "cached"),
    [
        (HEADS, 3, 96, 2**24),
        (HEADS, 2, 150, 2**13),
        (Heads(32, 8, 128, torch.bfloat16), 4, 2048, 2**24),
        (Heads(9, 3, 64, torch.bfloat16, (1024,)), 4, 2048, 2**24),
        (Heads(32, 32, 100, torch.bfloat16), 2, 300, 2**24),
    ],
)
def test_packed_rows_stand_for_all(monkeypatch, heads, batch, seq, cached):
    draw = random.Random(0)
    monkeypatch.setattr(attention_forward, "CACHED_BYTES", cached)
    found = packed_rows(range(1, batch + 1), range(1, seq + 1), heads)
    kinds = {kind for one in found for kind in warmup_rows._binaries(one, heads)}
    assert len(found) <= len(kinds)
    for _ in range(5000):
        rows, tokens = draw.randint(1, batch), draw.choice([draw.randint(2, seq), draw.randint(2, min(seq, 40))])
        longest = draw.randint(1, tokens)
        fewest, most = max(rows * -(-tokens // longest), rows + 1), rows * tokens - longest + 1
        room = graphs.FEWEST_SEQUENCES * 2 ** draw.randint(0, max(0, (rows * tokens - 1).bit_length() - 4))
        others = [Rows(rows, tokens, room, tokens, captured=True)]
        if fewest <= most:
            others.append(Rows(rows, tokens, draw.randint(fewest, most), longest))
        for other in others:
            assert set(warmup_rows._binaries(other, heads)) <= kinds, other


@pytest.mark.parametrize("size", [(1, 2, 2, 1), (1, 9, 3, 4), (1, 9, 5, 4), (2, 5, 7, 4), (3, 4, 9, 4), (2, 3, 6, 1)])
def test_packed_rows_are_what_they_are_called(size):
    rows, tokens, sequences, longest = size
    positions = Rows(*size).position_ids(torch.device("cpu"))
    ended = ends(begin(positions))
    assert positions.shape == (rows, tokens) and len(ended) == sequences + 1 and ended.diff().max() == longest
    assert Rows(*size).packed(positions.device) is None


def test_captured_rows_have_sequences_of_no_tokens():
    one = Rows(2, 5, 16, 5, captured=True)
    positions = one.position_ids(torch.device("cpu"))
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    packed = one.packed(positions.device)
    assert packed.longest == 5 and packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == graphs.filled(ends(begin(positions))).tolist()


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        (
            "mistral",
            dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=24, sliding_window=40),
        ),
    ],
    ids=["heads of 16", "heads of 24 and a window"],
)
def test_no_batch_of_another_shape_needs_another_binary(tmp_path, arch, changes):
    model, script = tiny_model(tmp_path, arch, **changes), Path(__file__).parent / "specialisations.py"
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    keys = json.loads(run(code, script, model, 2, 150, "sm_90", "fp16").splitlines()[-1])
    kernels = {key.split()[0] for key in keys["warmed"]}
    assert {"_merge_kernel", "_rotate_kernel", "_reduce_kernel", "_backward_dq_kernel"} <= kernels
    assert len(keys["warmed"]) > 50 and len(keys["packed"]) > 30
    assert keys["missed"] == []


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (dict(batch=0), "batch 0 must be 1 or more"),
        (dict(seq=513), "seq 513 is more than the model's context of 512"),
        (dict(plans=[]), "no plan is named"),
        (dict(plans=["lean"]), "no plan 'lean'"),
        (dict(rank=0), "rank 0 must be 1 or more"),
        (dict(model="mistral-8b"), "'mistral-8b'"),
    ],
)
def test_bad_values(folders, settings, part):
    with pytest.raises(FastkitError, match=part):
        warm_up(**{"model": str(folders["llama"]), "seq": 8, "device": "cpu", **settings})


@pytest.mark.usefixtures("references")
def test_the_command(folders, cache, capsys):
    flags = ["--model", str(folders["llama"]), "--batch", "1", "--seq", "8", "--rank", "4", "--every_length", "false"]
    assert main(["warmup", *flags, "--plan", "keep", "leanest", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    steps = 4 + len(packed_rows(range(1, 2), range(8, 9), HEADS))
    assert "0 kernels compiled" in out and f" {steps} steps" in out and str(choices.folder()) in out
    assert main(["warmup", *flags, "--plan", "lean", "--device", "cpu"]) == 2
    assert "lean" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_command_without_a_gpu(capsys):
    assert main(["warmup", "--model", "mistral-7b"]) == 2
    assert "no GPU here to compile for" in capsys.readouterr().err


def test_the_report_names_each_kernel():
    compiled = (Compilation("_merge_kernel", 1.5), Compilation("_merge_kernel", 0.5), Compilation("_norm_kernel", 0.25))
    text = str(WarmUp(compiled, 7, 12, 3.0, Path("/binaries"), Path("/choices")))
    assert text.splitlines() == [
        "  _merge_kernel                      2 x    2.00 s",
        "  _norm_kernel                       1 x    0.25 s",
        "3 kernels compiled in 2.2 s, 7 were there already; 12 steps, 3.0 s in all",
        "binaries: /binaries",
        "timed choices: /choices",
    ]


FINE_TUNE = """
import sys
from fastkit.lab.compilations import compilations
from fastkit.train.finetune import finetune
model, data, output, plan = sys.argv[1:]
with compilations() as found:
    finetune(model=model, data=data, output=output, plan=plan, rank=4, batch_size=3, max_length=96, steps=20,
             eval_steps=5, samples=0, facts=False, progress=False, patience=0)
print(len(found.cached), [one.kernel for one in found.compiled])
"""


@pytest.mark.gpu
@pytest.mark.slow
def test_a_fresh_process_compiles_nothing_after_a_warm_up(tmp_path):
    model, data = tiny_model(tmp_path / "model"), tiny_data(tmp_path / "data", records=40)
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "FASTKIT_CACHE": str(tmp_path / "cache")}
    warm = (
        "import sys; from fastkit.models.warmup import warm_up; "
        "print(len(warm_up(sys.argv[1], batch=3, seq=96, rank=4).compiled))"
    )
    assert int(run(warm, model, **caches).splitlines()[-1]) > 10
    for plan in ("keep", "recompute-mlp-qkv+offload", "leanest", "off"):
        cached, compiled = run(FINE_TUNE, model, data, tmp_path / plan, plan, **caches).splitlines()[-1].split(" ", 1)
        assert int(cached) > 5 and compiled == "[]", plan
    assert int(run(warm, model, **caches).splitlines()[-1]) == 0
