"""Runs notebooks in a real JupyterLab in a headless Chromium, 1280 pixels wide, for what only a browser shows.

    pip install playwright        # and a Chromium: `playwright install chromium`, or Debian's package
    python tests/browser.py OUT [NOTEBOOK ...]

For each notebook: every cell runs without an error, no output is wider than its cell, every slider moves its picture.
OUT gets screenshots of the whole notebook, to be looked at. The exit code is 1 if something is wrong.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
WIDTH, HEIGHT = 1280, 900
CELL_SECONDS = 300
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},  # all cells in the page, to be looked at
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
WIDE = """() => [...document.querySelectorAll('.jp-Notebook .jp-Cell')].flatMap((cell, number) =>
    [cell, ...cell.querySelectorAll('.jp-OutputArea-output, .jp-RenderedMarkdown, .cm-scroller')]
        .filter(one => one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 0)
        .map(one => `cell ${number} is ${one.scrollWidth} pixels wide in ${one.clientWidth}`))"""
STATE = """() => ({
    ran: [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent.trim()),
    errors: [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"], '
        + '[data-mime-type="application/vnd.jupyter.stderr"]')].map(output => output.textContent)
        .filter(text => !text.trim().split('\\n').every(line => line.startsWith('warning: ')))  // which are meant
        .map(text => text.slice(0, 300)),
})"""


def serve(folder: Path, port: int, scratch: Path) -> subprocess.Popen:
    """JupyterLab on `folder`, once it answers."""
    for plugin, settings in SETTINGS.items():
        path = scratch / "settings" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    flags = ["--no-browser", f"--port={port}", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *flags, f"--notebook-dir={folder}", "--allow-root"],
        env={
            **os.environ,
            "JUPYTERLAB_SETTINGS_DIR": str(scratch / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(scratch / "workspaces"),  # not as an earlier run left it
            "JUPYTER_PLATFORM_DIRS": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=(scratch / "server.log").open("w"),
    )
    for _ in range(120):
        time.sleep(0.5)
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
            return server
        except OSError:
            if server.poll() is not None:
                break
    server.kill()
    raise SystemExit(f"JupyterLab did not start:\n{(scratch / 'server.log').read_text()[-1000:]}")


def run_all(page: Page, url: str) -> list[str]:
    """Open a notebook and run every cell; what went wrong."""
    page.goto(url)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_selector("text=/^Python 3.*[|] Idle$/", timeout=60_000)  # in the status bar: the kernel is there
    page.keyboard.press("Control+b")  # without the list of files
    page.click('.lm-MenuBar-itemLabel:text-is("Run")')
    page.click('li[data-command="runmenu:run-all"]')
    last, moved = None, time.monotonic()
    while True:
        state = page.evaluate(STATE)
        waiting = [prompt for prompt in state["ran"] if prompt in ("[*]:", "[ ]:")]
        if not waiting:
            break
        if state["ran"] != last:
            last, moved = state["ran"], time.monotonic()
        if state["errors"] or time.monotonic() - moved > CELL_SECONDS:
            return [*state["errors"], f"{len(waiting)} cells did not run"]
        time.sleep(0.5)
    page.wait_for_timeout(1500)  # pictures are drawn
    return page.evaluate(STATE)["errors"] + page.evaluate(WIDE)


def move_sliders(page: Page) -> list[str]:
    """Move each slider by a key; which of them moved nothing."""
    wrong = []
    for number, handle in enumerate(page.query_selector_all(".jp-OutputArea .noUi-handle")):
        output = handle.evaluate_handle("one => one.closest('.jp-OutputArea')").as_element()
        before, value = pictures(output), handle.get_attribute("aria-valuenow")
        handle.scroll_into_view_if_needed()
        handle.focus()
        for key in ("ArrowRight", "ArrowLeft"):  # at its end it moves one way alone
            handle.press(key)
            page.wait_for_timeout(300)
            if handle.get_attribute("aria-valuenow") != value:
                break
        deadline = time.monotonic() + 30
        while pictures(output) == before and time.monotonic() < deadline:
            page.wait_for_timeout(250)
        if pictures(output) == before:
            wrong.append(f"slider {number} does not change its picture")
    return wrong


def pictures(output) -> str:
    return output.evaluate("one => [...one.querySelectorAll('img')].map(i => i.src).join() + one.innerText")


def shots(page: Page, folder: Path) -> None:
    """The notebook from top to bottom, a screenful at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    scroller = page.query_selector(".jp-WindowedPanel-outer")
    height = scroller.evaluate("one => one.scrollHeight")
    for number, top in enumerate(range(0, height, HEIGHT - 150)):
        scroller.evaluate("(one, top) => one.scrollTo(0, top)", top)
        page.wait_for_timeout(150)
        page.screenshot(path=folder / f"{number:02}.png")


def main(out: Path, notebooks: list[Path]) -> int:
    failed = False
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        scratch = Path(name)
        shutil.copytree(NOTEBOOKS, scratch / "notebooks")
        for notebook in (scratch / "notebooks").glob("*.ipynb"):  # nothing of an earlier run is to be seen
            content = nbformat.read(notebook, as_version=4)
            for cell in content.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            content.metadata.pop("widgets", None)
            nbformat.write(content, notebook)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = serve(scratch / "notebooks", port, scratch)
        found = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        try:
            for notebook in notebooks:
                page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                wrong = run_all(page, f"http://127.0.0.1:{port}/lab/workspaces/{notebook.stem}/tree/{notebook.name}")
                wrong += [] if wrong else move_sliders(page)
                shots(page, out / notebook.stem)
                print(f"{notebook.stem}: {'; '.join(wrong) or 'runs, fits, moves'}", flush=True)
                failed |= bool(wrong)
                page.close()
        finally:
            browser.close()
            server.terminate()
    return int(failed)


if __name__ == "__main__":
    named = [Path(arg) for arg in sys.argv[2:]] or sorted(NOTEBOOKS.glob("0[1-8]_*.ipynb"))
    sys.exit(main(Path(sys.argv[1]), named))
