"""What the tests of real servers and pages rest on."""

import pytest
from web_page import is_pages_own
from worldstereo_fp8.demo.server import to_api

CRF = ["FLOAT", {"default": 23.0}]
ENCODING = {"options": [{"key": "auto", "inputs": {}}, {"key": "re-encode", "inputs": {"required": {"crf": CRF}}}]}
CODEC = {
    "options": [
        {"key": "auto", "inputs": {"required": {}}},
        {"key": "h264", "inputs": {"optional": {"encoding": ["COMFY_DYNAMICCOMBO_V3", ENCODING]}}},
    ]
}
SAVE_VIDEO = {
    "input": {"required": {"video": ["VIDEO"], "prefix": ["STRING", {}], "codec": ["COMFY_DYNAMICCOMBO_V3", CODEC]}},
    "input_order": {"required": ["video", "prefix", "codec"]},
    "display_name": "Save Video",
}


@pytest.mark.parametrize(
    "values, inputs",
    [
        (["auto"], {"codec": "auto"}),
        (["h264", "auto"], {"codec": "h264", "codec.encoding": "auto"}),
        (["h264", "re-encode", 18], {"codec": "h264", "codec.encoding": "re-encode", "codec.encoding.crf": 18}),
        (["h264", "re-encode"], {"codec": "h264", "codec.encoding": "re-encode", "codec.encoding.crf": 23.0}),
        ([], {"codec": "auto"}),  # saved before the widget was there
    ],
)
def test_nested_dynamic_combos(values, inputs):
    """As core's Save Video has them, and as the page writes them."""
    node = {"id": 3, "type": "SaveVideo", "widgets_values": ["v", *values], "inputs": [{"name": "video", "link": 1}]}
    nodes = [node, {"id": 2, "type": "Note"}]
    prompt = to_api({"nodes": nodes, "links": [[1, 2, 0, 3, 0, "VIDEO"]]}, {"SaveVideo": SAVE_VIDEO})
    assert prompt["3"]["inputs"] == {"video": ["2", 0], "prefix": "v"} | inputs


def test_a_bypassed_node_passes_its_type_on():
    def node(id, kind, inputs=(), outputs=(), mode=0):
        slots = [{"name": type_.lower(), "type": type_, "link": link} for type_, link in inputs]
        return {
            "id": id,
            "type": kind,
            "mode": mode,
            "inputs": slots,
            "outputs": [{"type": type_} for type_ in outputs],
        }

    info = {kind: {"input": {}, "input_order": {}, "display_name": kind} for kind in ("Source", "Filter", "Sink")}
    nodes = [
        node(1, "Source", outputs=["IMAGE"]),
        node(2, "Filter", inputs=[("MODEL", None), ("IMAGE", 1)], outputs=["MASK", "IMAGE"], mode=4),
        node(3, "Sink", inputs=[("IMAGE", 2), ("MASK", 3)]),
    ]
    links = [[1, 1, 0, 2, 1, "IMAGE"], [2, 2, 1, 3, 0, "IMAGE"], [3, 2, 0, 3, 1, "MASK"]]
    prompt = to_api({"nodes": nodes, "links": links}, info)
    assert set(prompt) == {"1", "3"} and prompt["3"]["inputs"] == {"image": ["1", 0]}  # no mask is left


@pytest.mark.parametrize(
    "text, url, own",
    [
        ("Failed to load resource: net::ERR_NAME_NOT_RESOLVED", "https://api.example.org/features", True),
        ("Failed to load resource: net::ERR_CONNECTION_REFUSED", "http://127.0.0.1:9/x.js", True),
        ("Failed to load resource: the server responded with a status of 404", "http://127.0.0.1:8188/user.css", True),
        ("Failed to load resource: status of 404", "http://127.0.0.1:8188/extensions/pack/js/ours.js", False),
        ("Access to fetch at 'https://example.org/a' from origin 'http://127.0.0.1:8188' is blocked", "", True),
        ("Connecting to 'https://example.org/a.bin' violates the policy", "http://127.0.0.1:8188/assets/a.js", True),
        ("Fetch API cannot load https://example.org/a.bin. Refused", "http://127.0.0.1:8188/assets/a.js", True),
        ("Fetch API cannot load http://127.0.0.1:8188/ours. Refused", "http://127.0.0.1:8188/assets/a.js", False),
        ("TypeError: x is undefined at https://example.org", "http://127.0.0.1:8188/assets/a.js", False),
    ],
)
def test_whose_error_it_is(text, url, own):
    assert is_pages_own(text, url, "127.0.0.1:8188") == own


def test_a_list_without_choices_keeps_the_saved_value():
    """As the list of a loader is where its folder is empty."""
    declared = {"required": {"clip_name": [[]], "type": [["wan"]]}}
    info = {"CLIPLoader": {"input": declared, "input_order": {"required": ["clip_name", "type"]}}}
    nodes = [{"id": 1, "type": "CLIPLoader", "title": "Text", "widgets_values": ["umt5.safetensors"]}]
    prompt = to_api({"nodes": nodes, "links": []}, info)
    assert prompt["1"]["inputs"] == {"clip_name": "umt5.safetensors", "type": "wan"}
