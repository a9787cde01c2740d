import struct

import pytest

from jupyterlab_page import browser_page, find_chromium, jupyterlab, open_notebook, outputs, run_all

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome here: install one to test in a browser"),
]


def test_a_notebook_opens_and_runs_in_jupyterlab(make_notebook, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    make_notebook(("markdown", "# Small notebook\n\nSome prose."), ("parameters", "steps = 20"),
                  ("code", "import time\ntime.sleep(1)\nprint('steps', steps + 1)"), ("code", "1 / (steps - 20)"),
                  name="root/small.ipynb")  # fmt: skip
    expect = pytest.importorskip("playwright.sync_api").expect
    with jupyterlab(root, tmp_path / "scratch") as address, browser_page() as page:
        panel = open_notebook(page, address, "small.ipynb")
        expect(panel.locator("h1")).to_contain_text("Small notebook")
        expect(panel.locator(".jp-Cell")).to_have_count(4)
        assert "".join(outputs(page)) == ""
        run_all(page)
        said = outputs(page)
        assert said[1].strip() == "steps 21" and "ZeroDivisionError" in said[2]
        picture = tmp_path / "notebook.png"
        page.screenshot(path=picture)
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert (width, height) == (1400, 1000) and picture.stat().st_size > 20_000
