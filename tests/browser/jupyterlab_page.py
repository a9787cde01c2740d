"""A real JupyterLab in a real browser: start a server, open a notebook, run it, wait for its kernel."""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
SETTINGS = {  # answers to what JupyterLab would otherwise ask a newcomer or fetch from outside
    "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
}  # fmt: skip


PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"  # the notebook in front


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def jupyterlab(root, scratch, seconds: float = 60) -> Iterator[str]:
    """A JupyterLab over `root` on a free port of 127.0.0.1 with its own settings; gives its address with a token.

    `scratch` takes settings and the log. RuntimeError with the log's end where it does not answer within `seconds`.
    """
    scratch, token = Path(scratch), secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={root}", f"--IdentityProvider.token={token}", "--ServerApp.allow_root=True",
               "--LabApp.extension_manager=readonly",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *options]
    env = os.environ | {name: str(scratch / folder) for name, folder in SETTINGS.items()}
    log = scratch / "jupyterlab.log"
    news = scratch / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True, exist_ok=True)
    news.write_text('{"fetchNews": "false"}')
    with open(log, "w") as stream:
        server = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
        try:
            _await_server(f"http://127.0.0.1:{port}/api?token={token}", server, log, seconds)
            yield f"http://127.0.0.1:{port}/lab?token={token}"
        finally:
            _stop(server)


@contextlib.contextmanager
def browser_page(width: int = 1400, height: int = 1000):
    """A page of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=find_chromium(), headless=True, args=list(FLAGS))
        page = browser.new_page(viewport={"width": width, "height": height})
        try:
            yield page
        finally:
            browser.close()


def open_notebook(page, address: str, path: str, seconds: float = 60):
    """Open root/path in JupyterLab, wait until cells are drawn and the kernel answers; returns the notebook panel."""
    base, token = address.split("?", 1)
    page.goto(f"{base}/tree/{path}?reset&{token}", timeout=seconds * 1000)
    panel = page.locator(PANEL)
    panel.locator(".jp-Cell").first.wait_for(timeout=seconds * 1000)
    page.locator("#jupyterlab-splash").wait_for(timeout=seconds * 1000, state="detached")
    if panel.locator(".jp-MarkdownCell").count():
        panel.locator(".jp-MarkdownOutput").filter(has_text=re.compile(r"\S")).first.wait_for(timeout=seconds * 1000)
    wait_for_idle(page, seconds)
    return panel


def run_all(page, seconds: float = 60) -> None:
    """Run > Run All Cells by the menu, and wait until the kernel has done them."""
    before = _prompts(page)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    _await(lambda: _prompts(page) != before, 10, "no cell had begun to run")
    _await(lambda: not any("*" in prompt for prompt in _prompts(page)), seconds, "cells were still running")
    wait_for_idle(page, seconds)


def wait_for_idle(page, seconds: float = 60) -> None:
    """Wait until the open notebook's kernel says it is idle."""
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(
        timeout=seconds * 1000, state="attached"
    )


def outputs(page) -> list[str]:
    """The text of every output area on the page, scrolled to first: JupyterLab draws only what is near the view."""
    found = []
    cells = page.locator(f"{PANEL} .jp-CodeCell")
    for i in range(cells.count()):
        cells.nth(i).scroll_into_view_if_needed()
        found.append("\n".join(cells.nth(i).locator(".jp-OutputArea-output").all_inner_texts()))
    return found


def _prompts(page) -> list[str]:
    """What stands before the code cells: [ ] not run, [*] waiting or running, [3] done."""
    return page.locator(f"{PANEL} .jp-CodeCell .jp-InputPrompt").all_text_contents()


def _await(done, seconds: float, complaint: str) -> None:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"{complaint} after {seconds:g} s")
        time.sleep(0.1)


def _stop(server, seconds: float = 10) -> None:
    """End the server; its kernels end when they see it gone."""
    server.terminate()
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _await_server(address: str, server, log: Path, seconds: float) -> None:
    def answers():
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab ended at once:\n{log.read_text()[-2000:]}")
        try:
            return urllib.request.urlopen(address, timeout=2).status == 200
        except (urllib.error.URLError, OSError):
            return False

    try:
        _await(answers, seconds, "JupyterLab did not answer")
    except TimeoutError as error:
        raise RuntimeError(f"{error}:\n{log.read_text()[-2000:]}") from None
