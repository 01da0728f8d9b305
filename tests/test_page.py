"""The server's page as it is served, and `serve --open`. tests/test_page_in_browser.py uses the page in a browser."""

import re
import stat
import sys
from pathlib import Path

import pytest
from serving import serving

from mlx_zimage.server import static
from mlx_zimage.server.guard import MAX_BODY
from mlx_zimage.server.openai import ENDINGS

MOST = 150_000  # bytes of the whole page
FILES = sorted(static.FOLDER.iterdir())


@pytest.fixture
def open_page(server):
    """open_page(path) sends what a browser sends when it opens an address, without a key."""

    def open_page(path: str = "/", **headers: str):
        given = {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Authorization": "", **headers}
        return server.request("GET", path, headers=given)

    return open_page


def test_the_page_and_its_files_need_no_key_but_what_they_request_does(open_page, server):
    html = open_page().body.decode()
    files = re.findall(r'(?:href|src)="(page/[^"]+)"', html)
    assert {Path(name).suffix for name in files} == {".css", ".js", ".svg"}
    for name in files:
        answer = open_page(f"/{name}")
        assert answer.status == 200 and answer.body == (static.FOLDER / Path(name).name).read_bytes()
    assert open_page("/v1/models").status == 401
    assert open_page("/page/../v1/models").status in (401, 404)
    assert open_page("/page/none.js").status == 404


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_have_their_type_and_the_policy_that_keeps_other_hosts_and_inline_code_out(open_page, file):
    answer = open_page("/" if file.suffix == ".html" else f"/page/{file.name}")
    assert answer.headers["Content-Type"].partition(";")[0] == static.MEDIA[file.suffix]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' blob:", "images that were generated, and those that were chosen"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_names_another_host_or_has_inline_code(file):
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, which is not fetched
    assert not re.search(r"https?:|//\w+\.\w", text)
    assert not re.search(r"<style|\sstyle=|<script(?![^>]*src=)|\son\w+=|innerHTML|eval\(", text)


def test_the_page_weighs_less_than_150_kb():
    assert sum(file.stat().st_size for file in FILES) < MOST


def test_the_page_knows_how_much_the_server_accepts():
    factors = re.search(r"LARGEST = (\d+) \* 2 \*\* (\d+);", (static.FOLDER / "api.js").read_text())
    assert int(factors[1]) * 2 ** int(factors[2]) == MAX_BODY


def test_the_page_names_files_with_the_endings_that_the_server_gives_them():
    endings = re.search(r"ENDINGS = {(.*)};", (static.FOLDER / "settings.js").read_text())
    assert {name: f".{ending}" for name, ending in re.findall(r'(\w+): "(\w+)"', endings[1])} == ENDINGS


def test_a_link_on_another_page_opens_the_page_and_nothing_else(open_page):
    assert open_page(**{"Sec-Fetch-Site": "cross-site"}).status == 200
    assert open_page(**{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}).status == 403
    assert open_page("/health", **{"Sec-Fetch-Site": "cross-site"}).status == 403
    assert open_page(Host="attacker.example").status == 403


def test_serve_open_opens_the_page_in_a_browser_of_this_machine(small_pocket, tmp_path, monkeypatch):
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(
        f"#!{sys.executable}\nimport sys, pathlib\npathlib.Path({str(opened)!r}).write_text(sys.argv[1])\n"
    )
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    with serving("--model", small_pocket, "--host", "0.0.0.0", "--open", log=tmp_path / "log") as server:
        server.until(lambda _: opened.exists() and opened.read_text())
        assert opened.read_text() == server.url.replace("0.0.0.0", "127.0.0.1")
