"""A ComfyUI server of our own, and what it takes to run a saved workflow on it."""

import asyncio
import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import requests
import torch

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180
PREVIEW_IMAGE = bytes([0, 0, 0, 1])  # core's kind of a binary message
BYPASSED = 4  # a node's mode
# Inputs of these types, and combos, are widgets; all others are sockets.
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC_COMBO, "COLOR")


class ServerError(RuntimeError):
    """ComfyUI did not start, refused a workflow or failed in one."""


class Server:
    """ComfyUI on a free port of 127.0.0.1 while the `with` block lasts.

    `base` becomes its base directory (models, input, output, user). Of custom nodes it loads this pack and the demo's
    stand-ins alone. Its log is in `base`/comfyui.log.
    """

    def __init__(self, comfyui: Path, base: Path):
        self.comfyui = comfyui
        self.base = base
        self.log = base / "comfyui.log"

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        (self.base / "custom_nodes").mkdir(parents=True, exist_ok=True)  # ComfyUI lists it
        nodes = [self.comfyui / "custom_nodes", ROOT / "demo" / "custom_nodes"]
        pack = [entry.name for entry in nodes[0].iterdir() if entry.resolve() == ROOT]
        if not pack:
            raise ServerError(f"This checkout is not in {nodes[0]}. Set it up with: python dev.py test")
        stand_ins = [entry.name for entry in nodes[1].iterdir()]
        paths = self.base / "extra_model_paths.yaml"
        paths.write_text(json.dumps({"demo": {"custom_nodes": "\n".join(map(str, nodes))}}), "utf-8")  # JSON is YAML
        command = [
            sys.executable, str(self.comfyui / "main.py"), "--port", self.address.split(":")[1],
            "--base-directory", str(self.base), "--extra-model-paths-config", str(paths),
            "--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes",
            "--disable-all-custom-nodes", "--whitelist-custom-nodes", *pack, *stand_ins,
        ]  # fmt: skip
        if not torch.cuda.is_available():
            # PyTorch's 3-D convolutions are ten times faster in BF16 on CPUs with units for it, ten times slower on others.
            vae = "--bf16-vae" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "--fp32-vae"
            command += ["--cpu", vae]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=self.comfyui)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                requests.get(f"http://{self.address}/system_stats", timeout=5).raise_for_status()
                return self
            except requests.RequestException:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise ServerError(f"ComfyUI did not start. The end of {self.log}:\n{self.log_tail()}") from None
                time.sleep(0.25)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    def object_info(self, node: str = "") -> dict:
        """The declarations of all nodes by their ids, as the web page gets them, or of this one."""
        return requests.get(f"http://{self.address}/object_info/{node}".rstrip("/"), timeout=60).json()

    def run(
        self,
        prompt: dict,
        progress=lambda title, value, maximum: None,
        preview=lambda jpeg: None,
        event=lambda message: None,
        **extra_data,
    ) -> dict:
        """Run a workflow in API form to its end and return its outputs by node id.

        `progress` is called with the title of a node when it starts, and with its steps as it advances; `preview` with
        the JPEG file of each preview picture; `event` with every message about this run; `extra_data` goes to ComfyUI with the prompt. Raises ServerError with
        ComfyUI's own words if the workflow is refused or fails.
        """
        with ThreadPoolExecutor(1) as thread:  # the caller's may have an event loop already: Playwright's has one
            return thread.submit(asyncio.run, self._run(prompt, progress, preview, event, extra_data)).result()

    async def _run(self, prompt: dict, progress, preview, event, extra_data: dict) -> dict:
        client = uuid.uuid4().hex
        outputs = {}
        order = {"prompt": prompt, "client_id": client, "extra_data": extra_data}
        async with aiohttp.ClientSession(f"http://{self.address}") as session:
            async with session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket:
                async with session.post("/prompt", json=order) as response:
                    answer = await response.json()
                    if response.status != 200:
                        raise ServerError(refusal(answer, prompt))
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == PREVIEW_IMAGE:
                        preview(message.data[8:])  # after 4 bytes that say JPEG
                    if message.type != aiohttp.WSMsgType.TEXT:
                        continue
                    received = json.loads(message.data)
                    data = received["data"]
                    if data.get("prompt_id") != answer["prompt_id"]:
                        continue
                    event(received)
                    node = prompt.get(data.get("node"), {}).get("_meta", {}).get("title")
                    if received["type"] in ("executing", "progress") and node:
                        progress(node, data.get("value", 0), data.get("max", 0))
                    elif received["type"] == "executed":
                        outputs[data["node"]] = data["output"]
                    elif received["type"] == "execution_error":
                        error = f"{data['exception_type']}: {data['exception_message']}"
                        raise ServerError(f"{data['node_type']} failed: {error}")
                    elif received["type"] == "execution_interrupted":
                        raise ServerError("The run was interrupted.")
                    elif received["type"] == "execution_success":
                        return outputs
        raise ServerError(f"ComfyUI went away. The end of {self.log}:\n{self.log_tail()}")


def refusal(answer: dict, prompt: dict) -> str:
    """What /prompt answered to a workflow that it does not take, as text."""
    lines = [answer["error"]["message"]]
    for node, problem in answer.get("node_errors", {}).items():
        for error in problem["errors"]:
            lines.append(f"{prompt[node]['class_type']}: {error['message']}: {error['details']}")
    return "\n".join(lines)


def default_value(type_: str | list, options: dict):
    """What the page puts into a widget that a saved workflow has no value for."""
    choices = type_ if isinstance(type_, list) else options.get("options", [])
    first = next(iter(choices), None)
    return options.get("default", first["key"] if type_ == DYNAMIC_COMBO else first)


def widget_values(declared: dict, values: Iterator, prefix: str = "") -> dict:
    """The values of a node's widgets by their names in the API form, taken from the list that a saved workflow has.

    declared: {"required": {name: [type, options]}, "optional": …} in the node's order. A dynamic combo is followed by
    the widgets of the option it has, `name.inner`, and those may be dynamic combos again. A newer ComfyUI may declare
    more widgets than the workflow has values: the last ones have their defaults, as in the page.
    """
    inputs = {}
    for kind in ("required", "optional"):
        for name, entry in declared.get(kind, {}).items():
            type_, options = (*entry, {})[:2]
            if not isinstance(type_, list) and type_ not in WIDGETS:
                continue
            value = inputs[prefix + name] = next(values, default_value(type_, options))
            if options.get("control_after_generate"):
                next(values, None)
            if type_ == DYNAMIC_COMBO:
                chosen = next(option for option in options["options"] if option["key"] == value)
                inputs |= widget_values(chosen["inputs"], values, f"{prefix}{name}.")
    return inputs


def to_api(workflow: dict, object_info: dict) -> dict:
    """The API form of a workflow saved by the web page, as the page's own graphToPrompt makes it.

    Handles what a plain graph needs: links, widgets, and bypassed nodes, which pass each output's type on from the
    first input that has it. Subgraphs, reroutes and muted nodes are an error.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}

    def source(link: int) -> list | None:
        """Where a link comes from, past bypassed nodes; None where nothing is left of it."""
        origin, output = links[link]
        node = nodes[origin]
        if node.get("mode", 0) != BYPASSED:
            return [str(origin), output]
        wanted = node["outputs"][output]["type"]
        passed = (slot["link"] for slot in node["inputs"] if slot["type"] == wanted and slot["link"] is not None)
        link = next(passed, None)
        return None if link is None else source(link)

    prompt = {}
    for node in nodes.values():
        if node["type"] in ("Note", "MarkdownNote") or node.get("mode", 0) == BYPASSED:
            continue
        if node["type"] not in object_info or node.get("mode", 0) != 0:
            raise ValueError(f"Node {node['id']}, a {node['type']}, is missing, switched off or not supported here.")
        info = object_info[node["type"]]
        declared = {
            kind: {name: info["input"][kind][name] for name in info["input_order"].get(kind, [])}
            for kind in ("required", "optional")
        }
        inputs = widget_values(declared, iter(node.get("widgets_values", [])))
        for slot in node.get("inputs", []):
            if slot["link"] is not None and (origin := source(slot["link"])):
                inputs[slot["name"]] = origin
        title = node.get("title") or info["display_name"] or node["type"]
        prompt[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return prompt
