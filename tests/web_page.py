"""ComfyUI's web page in a headless browser."""

import re
import shutil
from contextlib import contextmanager

import pytest

# Without --in-process-gpu a page takes a fifth more CPU time.
CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--in-process-gpu",
)  # fmt: skip
# WebGL on the CPU; the rest of the page is put together without it, which takes half the time.
WEBGL_FLAGS = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-gpu-compositing")
# What ComfyUI's page itself reports as an error on a fresh server, without any custom node: it asks for the user's own
# files, of which there are none, for its graph too early, and for the sizes of the models of its own first workflow.
PAGES_OWN_ERRORS = (
    "/user.css", "/userdata", "ComfyApp graph accessed before initialization", "/missingModelDownload-",
)  # fmt: skip


def is_pages_own(text: str, url: str, address: str) -> bool:
    """Whether a console error is one of ComfyUI's page itself: see above, and what it asks of other hosts, which a
    machine without a network does not reach."""
    if any(own in f"{text} ({url})" for own in PAGES_OWN_ERRORS):
        return True
    asked = re.match(r"(?:Access to .* at |Connecting to |Fetch API cannot load )'?(https?://[^/']+)", text)
    if asked is None and not text.startswith("Failed to load resource"):
        return False
    return not (asked[1] if asked else url).startswith(f"http://{address}")


def launch_browser(sync_api, playwright, webgl=False):
    """A headless Chromium, Chrome or Edge. The test is skipped where there is none."""
    flags = [flag for flag in CHROMIUM_FLAGS if not (webgl and flag == "--disable-gpu")]
    flags += WEBGL_FLAGS if webgl else ()
    for name in ("chromium", "chromium-browser"):
        if path := shutil.which(name):
            return playwright.chromium.launch(executable_path=path, args=flags)
    for channel in ("chrome", "msedge"):
        try:
            return playwright.chromium.launch(channel=channel, args=flags)
        except sync_api.Error:  # not installed
            continue
    return pytest.skip("there is no Chromium, Chrome or Edge on this machine, so the web page was not tested")


@contextmanager
def page_of(comfyui, errors, webgl=False):
    """ComfyUI's web page, ready, in a fresh browser; its console errors and exceptions go to `errors`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="install tests/requirements.txt")
    with sync_api.sync_playwright() as playwright:
        browser = launch_browser(sync_api, playwright, webgl)
        # A larger page is drawn slowly, and one whose spinners turn is drawn all the time.
        page = browser.new_page(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")

        def on_console(message):
            url = message.location["url"]
            if message.type == "error" and not is_pages_own(message.text, url, comfyui.address):
                errors.append(f"{message.text} ({url})")

        def on_exception(error):
            if error.stack:  # the page itself now and then rejects a promise with no reason at all
                errors.append(str(error))

        page.on("console", on_console)
        page.on("pageerror", on_exception)
        page.goto(f"http://{comfyui.address}")
        page.wait_for_function("window.app?.extensionManager?.workflow?.activeWorkflow", timeout=90_000)
        page.wait_for_load_state("networkidle")
        yield page
        browser.close()


def open_workflow(page, workflow):
    """Load a saved workflow into the page. Returns the types of the nodes that it does not know or marks as faulty (a
    file that is not there, for one), and the API form that Run would post."""
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
    page.wait_for_load_state("networkidle")
    faulty = page.evaluate("""window.app.graph.nodes
        .filter(node => node.has_errors || !(node.type in window.LiteGraph.registered_node_types))
        .map(node => node.type)""")
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    for node in prompt.values():
        node["inputs"].pop("video-preview", None)  # the page's player in Load Video, present once it has loaded
    return faulty, prompt
