"""The server's page in a real browser: Chromium or Chrome of this system, driven by Playwright."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from serving import KEY, Server, serving
from test_cli_lora import write as write_lora

from mlx_zimage.images.metadata import read_origin
from mlx_zimage.request import CONTROLS
from mlx_zimage.server.guard import MAX_BODY

playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]' for tests in a browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
expect = playwright.expect

PROMPT = "a red circle on a blue background"
PROGRAMS = (
    *("chromium", "chromium-browser", "google-chrome"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
CHROME = os.environ.get("MLX_ZIMAGE_TEST_BROWSER") or next(filter(None, map(shutil.which, PROGRAMS)), None)
SLOWEST_MS = 30_000  # for an image, on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROME is None, reason="no Chromium or Chrome here; MLX_ZIMAGE_TEST_BROWSER names another one"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # with OpenBLAS loaded ahead of it, Chromium cannot start its processes
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        # root, as in CI's container, may not use Chromium's own sandbox
        flags = ["--no-sandbox"] * (os.getuid() == 0)
        browser = driver.chromium.launch(executable_path=CHROME, args=flags, env=environment)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def origin(small_pocket, tmp_path_factory) -> Iterator[Server]:
    """A server as most people start it: without a key."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "loras").mkdir()
    write_lora(folder / "loras/style.safetensors")
    options = ("--model", small_pocket, "--lora-dir", folder / "loras", "--control-model", "pocket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(folder / "hub"))  # without the networks that find poses
        with serving(*options, log=folder / "log", key=None) as server:
            yield server


@pytest.fixture
def visit(browser):
    """visit(server, ...) opens the page in a new window, which must contact no other host and log no error of its
    own."""
    contexts, faults = [], []

    def visit(server: Server, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(SLOWEST_MS)
        page = context.new_page()
        page.on("request", lambda request: foreign(request.url, server) and faults.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: "Content Security" in message.text and faults.append(message.text))
        page.goto(server.url)
        return page

    def foreign(url: str, server: Server) -> bool:
        return not url.removeprefix("blob:").startswith(f"{server.url}/")

    expect.set_options(timeout=SLOWEST_MS)
    yield visit
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(visit, origin):
    page = visit(origin, viewport={"width": 1280, "height": 900})
    expect(page.get_by_label("Model")).to_have_value("pocket")
    return page


def generate(page, prompt: str = PROMPT, **fields: str):
    """Fill in the form and generate; returns the card of the run."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label, exact=True).fill(value)
    before = page.locator(".run").count()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".run")).to_have_count(before + 1)
    return page.locator(".run").first


def generate_many(page):
    """A run that takes long enough to be looked at."""
    page.get_by_label("Size", exact=True).select_option("custom")
    return generate(page, Images="10", Width="256", Height="256")


def finished(run):
    """The same card, once all its images are there."""
    expect(run.locator(".status")).to_contain_text("Done in")
    return run


def downloaded(page, run, tmp_path, name: str = "Download this image") -> Path:
    with page.expect_download() as download:
        run.get_by_role("link", name=name).click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    return file


def photo(tmp_path, size: tuple[int, int] = (64, 64)) -> Path:
    Image.new("RGB", size, "white").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def drag(page, canvas, *places: tuple[float, float]) -> None:
    """Drag the pointer across a canvas: places are fractions of its width and height."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    across = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*across[0])
    page.mouse.down()
    for place in across[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def check_accessible(page) -> None:
    """No serious or critical fault, by axe-core's rules for WCAG 2 and its advice."""
    found = axe.Axe().run(page).response["violations"]
    serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    assert not serious, [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in serious]


# ---- generating


REMEMBER = """(selectors) => {
    window.seen = new Set();
    const visible = (selector) => document.querySelector(selector)?.checkVisibility();
    const remember = () => selectors.filter(visible).forEach((selector) => seen.add(selector));
    new MutationObserver(remember).observe(document.body, { subtree: true, childList: true, attributes: true });
}"""


def test_an_image_forms_in_previews_and_its_file_contains_its_settings(page, tmp_path):
    passing = {"img.preview", "progress"}  # on a fast machine, too short for the driver to see
    page.evaluate(REMEMBER, list(passing))
    run = finished(generate(page, Seed="18446744073709551615"))
    assert set(page.evaluate("[...seen]")) == passing
    expect(run.locator("img")).to_have_attribute("alt", PROMPT)
    file = downloaded(page, run, tmp_path)
    assert file.name == "a-red-circle-on-a-blue-background-18446744073709551615.png"
    request = read_origin(file).request
    assert (request.prompt, request.seed) == (PROMPT, 2**64 - 1), "JavaScript's numbers have 53 bits"
    assert Image.open(file).size == (64, 64)


def test_four_images_have_consecutive_seeds_and_one_of_them_can_be_made_again(page, tmp_path):
    run = finished(generate(page, Images="4", Seed="5", Steps="2"))
    expect(run.locator("figcaption span")).to_have_text([f"Seed {seed}" for seed in (5, 6, 7, 8)])
    third = downloaded(page, run, tmp_path, "Download image 3")
    page.get_by_label("Prompt", exact=True).fill("something else")
    run.get_by_role("button", name="Use the seed of image 3").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(page.get_by_label("Images", exact=True)).to_have_value("1")
    again = downloaded(page, finished(generate(page)), tmp_path)
    assert again.read_bytes() == third.read_bytes()


def test_waiting_and_running_requests_show_where_they_are_and_can_be_cancelled(page, origin):
    generate_many(page)
    second = generate(page, Images="1")
    first = page.locator(".run").last
    expect(second.locator(".status")).to_contain_text("Waiting for one other")
    expect(first.locator(".status")).to_have_text(re.compile(r"Image \d+ of 10, step \d of 8"))
    expect(second.locator(".frame")).to_have_count(0)  # so that all that wait are seen
    check_accessible(page)
    second.get_by_role("button", name="Cancel").click()
    expect(second.locator(".status")).to_have_text("Cancelled")
    origin.until(lambda health: health["running"] and not health["waiting"])
    first.get_by_role("button", name="Cancel").click()
    expect(first.locator(".status")).to_contain_text("Cancelled")
    origin.until(lambda health: not health["running"] and not health["waiting"])
    second.get_by_role("button", name="Remove").click()
    expect(page.locator(".run")).to_have_count(1)


def test_more_requests_than_a_browser_has_connections_all_end_or_are_cancelled_before_they_are_sent(page):
    generate_many(page)
    for _ in range(7):
        last = generate(page, Images="1", Steps="1", Width="64", Height="64")
    last.get_by_role("button", name="Cancel").click()
    expect(last.locator(".status")).to_have_text("Cancelled")
    page.locator(".run").last.get_by_role("button", name="Cancel").click()
    for run in page.locator(".run").all()[1:-1]:
        finished(run)


def test_an_error_is_shown_at_the_setting_that_it_concerns_until_that_is_changed(page):
    for label, value, field, words in (
        ("Prompt", " ", "prompt", "The prompt is empty"),
        ("Images", "11", "n", "from 1 to 10, got 11"),
        ("Seed", "red", "seed", "The seed must be a whole number"),
        ("Steps", "0", "steps", "steps must be from 1 to 1000"),
    ):
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_role("button", name="Generate").click()
        error = page.locator(f'[data-field="{field}"] > .error')
        expect(error).to_have_text(re.compile(words, re.IGNORECASE))
        expect(page.get_by_label(label, exact=True)).to_be_focused()
        page.get_by_label(label, exact=True).fill("1")
        expect(error).to_be_empty()
    page.get_by_label("Size", exact=True).select_option("custom")
    generate_button = page.get_by_role("button", name="Generate")
    page.get_by_label("Width").fill("100")
    generate_button.click()
    expect(page.locator('[data-field="size"] > .error')).to_contain_text("nearest are 96 and 112")
    expect(page.locator(".run")).to_have_count(0)


# ---- images to start from, masks, LoRAs


def test_an_image_is_started_from_and_a_painted_mask_keeps_the_rest(page, tmp_path):
    page.locator("#start input[type=file]").set_input_files(photo(tmp_path))
    expect(page.get_by_label("Size", exact=True)).to_have_value("64x64")
    run = finished(generate(page, Seed="1"))
    assert read_origin(downloaded(page, run, tmp_path)).request.strength == 0.6
    page.get_by_role("button", name="Paint a mask").click()
    page.get_by_label("Brush size").fill("40")
    drag(page, page.locator("#painting"), (0.3, 0.5), (0.7, 0.5))
    run = finished(generate(page))
    file = downloaded(page, run, tmp_path)
    assert read_origin(file).request.mask_image and read_origin(file).request.strength == 1
    pixels = Image.open(file).convert("RGB")
    assert {pixels.getpixel((x, y)) for x in range(64) for y in (*range(17), *range(47, 64))} == {(255, 255, 255)}
    assert any(pixels.getpixel((x, 32)) != (255, 255, 255) for x in range(64))
    for button in ("Undo", "Clear the mask"):
        expect(page.get_by_role("button", name=button)).to_be_enabled()
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("button", name="Clear the mask")).to_be_disabled()


def test_a_mask_is_painted_where_the_pointer_is_on_a_tall_image_too(page, tmp_path):
    page.locator("#start input[type=file]").set_input_files(photo(tmp_path, (64, 192)))
    page.get_by_role("button", name="Paint a mask").click()
    canvas = page.locator("#painting")
    drag(page, canvas, (0.1, 0.2), (0.3, 0.2))
    box = canvas.bounding_box()
    assert box["height"] / box["width"] == pytest.approx(3, rel=0.02), "the image fills the canvas"
    greens = """(canvas, places) => places.map(([x, y]) => canvas.getContext("2d").getImageData(
        Math.round(x * canvas.width), Math.round(y * canvas.height), 1, 1).data[1])"""
    painted, left, below = canvas.evaluate(greens, [(0.2, 0.2), (0.8, 0.2), (0.2, 0.4)])
    assert painted < 200 and left == below == 255


def test_an_image_larger_than_the_server_accepts_is_not_sent(page, tmp_path):
    side = int((MAX_BODY / 3) ** 0.5) + 16
    Image.new("RGB", (side, side)).save(tmp_path / "large.bmp")
    page.locator("#start input[type=file]").set_input_files(tmp_path / "large.bmp")
    expect(page.locator("#painting")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator('[data-field="image"] > .error')).to_contain_text("but the server accepts at most 32 MiB")
    page.get_by_label("Load settings from an image").set_input_files(tmp_path / "large.bmp")
    expect(page.locator('[data-field="load"] > .error')).to_contain_text("but the server accepts at most 32 MiB")


def test_a_variation_starts_from_one_of_the_images(page, tmp_path):
    run = finished(generate(page, Seed="1"))
    run.get_by_role("button", name="Start from this image").click()
    expect(page.locator("#painting")).to_be_visible()
    varied = finished(generate(page, "a green star on a blue background"))
    assert read_origin(downloaded(page, varied, tmp_path)).request.image


def test_loras_are_added_with_a_strength_and_a_file_of_ours_brings_its_settings_back(page, origin, tmp_path):
    page.get_by_label("Add a LoRA").select_option("style")
    page.get_by_label("Strength of style").fill("0.5")
    run = finished(generate(page, Seed="3", Steps="2"))
    file = downloaded(page, run, tmp_path)
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("pocket")
    page.get_by_label("Load settings from an image").set_input_files(file)
    expect(page.get_by_label("Strength of style")).to_have_value("0.5")
    again = downloaded(page, finished(page_generates(page)), tmp_path)
    assert again.read_bytes() == file.read_bytes()
    page.get_by_label("Load settings from an image").set_input_files(photo(tmp_path))
    expect(page.locator('[data-field="load"] > .error')).to_contain_text("contains no mlx-zimage or mflux metadata")


def page_generates(page):
    page.get_by_role("button", name="Generate").click()
    return page.locator(".run").first


def test_an_image_that_is_dropped_restores_its_settings_and_if_dropped_on_the_field_is_started_from(page, tmp_path):
    file = downloaded(page, finished(generate(page, Seed="3", Steps="2")), tmp_path)
    drop = """(target, bytes) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
        target.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: transfer }));
    }"""
    page.get_by_label("Seed").fill("4")
    page.locator("#results").evaluate(drop, list(file.read_bytes()))
    expect(page.get_by_label("Seed")).to_have_value("3")
    page.locator("#start").evaluate(drop, list(file.read_bytes()))
    expect(page.locator("#painting")).to_be_visible()


# ---- what some models and servers have


def test_a_control_image_sets_the_size_and_what_is_extracted_from_it_is_followed(page, tmp_path):
    house = Image.new("RGB", (150, 100), "white")
    ImageDraw.Draw(house).rectangle((30, 20, 110, 80), fill="black")
    house.save(tmp_path / "house.png")
    page.locator("#control input[type=file]").set_input_files(tmp_path / "house.png")
    expect(page.get_by_label("Size", exact=True)).to_have_value("80x48")
    kinds = page.get_by_label("Follow").locator("option")
    assert [kind.get_attribute("value") for kind in kinds.all()] == [*CONTROLS, ""]
    expect(page.get_by_label("Scale")).to_have_attribute("placeholder", "1")
    check_accessible(page)
    page.get_by_label("Scale").fill("0.5")
    made = []
    for kind in ("canny", "lines", ""):
        page.get_by_label("Follow").select_option(kind)
        made.append(finished(generate(page, Steps="1", Seed="1")))
        (use,) = read_origin(downloaded(page, made[-1], tmp_path)).request.controls
        assert (use.prepare, use.scale) == (kind or None, 0.5)
    expect(page.locator(".run .hint")).to_have_text([re.compile(r"image$"), re.compile("lines"), re.compile("canny")])
    page.get_by_label("Follow").select_option("pose")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator('[data-field="control"] > .error')).to_contain_text(
        "has not downloaded what it needs to make control images of kind pose"
    )
    page.get_by_role("button", name="Remove the control image").click()
    page.locator(".run").nth(1).get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Follow")).to_have_value("lines")
    expect(page.get_by_label("Scale")).to_have_value("0.5")
    expect(page.locator("#control canvas")).to_be_visible()


def test_kinds_of_control_images_whose_library_is_not_installed_are_not_offered(
    visit, small_pocket, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules |= {'cv2': None, 'onnxruntime': None}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ("--model", small_pocket, "--control-model", "pocket")
    with serving(*options, log=tmp_path / "log", key=None) as server:
        page = visit(server)
        page.locator("#control input[type=file]").set_input_files(photo(tmp_path))
        expect(page.get_by_label("Follow").locator("option")).to_have_count(5)
        offered = [kind.get_attribute("value") for kind in page.get_by_label("Follow").locator("option").all()]
        assert offered == ["canny", "gray", "scribble", "tile", ""]


def test_negative_prompts_and_guidance_are_for_models_that_take_them(visit, small_pocket, tmp_path):
    base = shutil.copytree(small_pocket, tmp_path / "base")
    config = base / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 6.0}))
    with serving("--model", base, "--model", small_pocket, log=tmp_path / "log", key=None) as server:
        page = visit(server)
        expect(page.get_by_label("Model")).to_have_value("base")
        expect(page.get_by_label("Guidance")).to_have_attribute("placeholder", "4")
        expect(page.locator("#control")).to_be_hidden()
        check_accessible(page)
        run = finished(generate(page, Seed="1", Steps="2", Guidance="2.5", **{"Negative prompt": "green"}))
        file = downloaded(page, run, tmp_path)
        request = read_origin(file).request
        assert (request.guidance_scale, request.negative_prompt) == (2.5, "green")
        page.get_by_label("Model").select_option("pocket")
        for label in ("Guidance", "Negative prompt"):
            expect(page.get_by_label(label)).to_be_hidden()
        request = read_origin(downloaded(page, finished(generate(page, Seed="2")), tmp_path)).request
        assert (request.guidance_scale, request.negative_prompt) == (0, "")
        page.get_by_label("Load settings from an image").set_input_files(file)
        expect(page.get_by_label("Model")).to_have_value("base")
        expect(page.get_by_label("Guidance")).to_have_value("2.5")
        expect(page.get_by_label("Negative prompt")).to_have_value("green")


# ---- for everyone


def test_the_button_and_a_whole_image_with_a_long_prompt_fit_in_a_small_window(visit, origin):
    page = visit(origin, viewport={"width": 1280, "height": 720})
    expect(page.get_by_label("Model")).to_have_value("pocket")
    expect(page.get_by_role("button", name="Generate")).to_be_in_viewport(ratio=1)
    run = finished(generate(page, f"{PROMPT}, " * 30, Steps="1"))
    expect(run.locator("img")).to_be_in_viewport(ratio=1)
    expect(run.get_by_role("link", name="Download this image")).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_no_serious_fault_and_nothing_is_cut_off(visit, origin, tmp_path, scheme, width):
    page = visit(origin, viewport={"width": width, "height": 740}, color_scheme=scheme)
    expect(page.get_by_label("Model")).to_have_value("pocket")
    check_accessible(page)
    page.get_by_label("Add a LoRA").select_option("style")
    file = photo(tmp_path)  # once: Chromium does not read a file that is written again meanwhile
    page.locator("#start input[type=file]").set_input_files(file)
    page.locator("#control input[type=file]").set_input_files(file)
    page.get_by_role("button", name="Paint a mask").click()
    page.locator("#painting").click()
    check_accessible(page)
    finished(generate(page, Images="2", Steps="1"))
    page.get_by_label("Images", exact=True).fill("11")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator('[data-field="n"] > .error')).not_to_be_empty()
    check_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((c) => c < 60)")
    assert dark == (scheme == "dark")


def test_the_keyboard_alone_generates_paints_a_mask_and_cancels(page, tmp_path):
    press = page.keyboard.press
    page.locator("#start input[type=file]").set_input_files(photo(tmp_path))  # the system's own dialog
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type(PROMPT)
    tab_to(page, "paint")
    press("Enter")
    expect(page.locator("#painting")).to_be_focused()
    press("ArrowLeft")
    expect(page.locator("#announcements")).to_have_text(re.compile(r"Brush at \d\d% from the left, 50% from the top"))
    press("Space")
    press("Shift+ArrowRight")
    expect(page.get_by_label("Strength", exact=False).first).to_have_value("1")
    page.get_by_label("Prompt", exact=True).focus()
    press("Control+Enter")
    run = page.locator(".run").first
    finished(run)
    expect(page.locator("#announcements")).to_contain_text("Done in")
    assert read_origin(downloaded(page, run, tmp_path)).request.mask_image
    page.get_by_label("Steps", exact=True).fill("1000")  # so that it is not done before the button is reached
    page.get_by_label("Images", exact=True).fill("10")
    press("Enter")
    tab_to(page, "Cancel")
    press("Enter")
    expect(run.locator(".status")).to_contain_text("Cancelled")
    expect(run.get_by_role("button", name="Use these settings")).to_be_focused()


def tab_to(page, name: str) -> None:
    """Press Tab until the element with this id or text is focused."""
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate("[document.activeElement.id, document.activeElement.textContent]")
        if name in found:
            return
    raise AssertionError(f"Tab does not reach {name}")


def test_a_key_is_asked_for_and_kept_in_the_tab_only(visit, server):
    page = visit(server)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This server needs its API key")
    check_accessible(page)
    page.get_by_label("API key", exact=True).fill("wrong-key")
    page.get_by_role("button", name="Use the key").click()
    expect(dialog).to_contain_text("The server did not accept this key")
    page.get_by_label("API key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Model")).to_have_value("pocket")
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [[KEY], 0, ""]
    finished(generate(page, Steps="1"))


def test_a_server_that_ends_is_reported(visit, small_pocket, tmp_path):
    with serving("--model", small_pocket, log=tmp_path / "log", key=None) as server:
        page = visit(server)
        expect(page.get_by_label("Model")).to_have_value("pocket")
        run = generate_many(page)
        expect(run.locator(".status")).to_contain_text("step")
        server.stop()
        expect(run.locator(".status")).to_contain_text(re.compile("shutting down|connection to the server was lost"))
        page.get_by_role("button", name="Generate").click()
        expect(page.locator('[data-field="generate"] > .error')).to_contain_text("The server does not answer")
