"""A page in headless Chromium, over its debugging protocol: how wide it is, what it asks for, what goes wrong."""

import asyncio
import json
import shutil
import subprocess
import time
from dataclasses import dataclass

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OVERFLOWING = """
[...document.querySelectorAll("body *")]
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .filter(e => !e.closest(".scroll, pre, svg"))  // these scroll by themselves, or are drawn to scale
    .map(e => e.outerHTML.slice(0, 80))
"""
LOUD = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


@dataclass(frozen=True)
class Opened:
    """``overflowing`` elements are too wide; ``requests`` are addresses; ``errors`` is what the browser said."""

    overflowing: list
    scroll_width: int
    requests: list
    errors: list


def open_page(path, width, profile):
    """Open a file ``width`` pixels wide; ``profile`` is a folder for the browser's own files."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen([*command, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL)
    try:
        told = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 30
        while not (told.exists() and told.read_text().count("\n")):
            assert process.poll() is None, "the browser ended"
            assert time.monotonic() < deadline, "the browser does not start"
            time.sleep(0.05)
        return asyncio.run(_open(int(told.read_text().split()[0]), path, width))
    finally:
        process.kill()
        process.wait()


async def _open(port, path, width):
    events = []
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(tab for tab in await answer.json(content_type=None) if tab["type"] == "page")
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:

            async def until(wanted):
                while True:
                    told = json.loads((await asyncio.wait_for(socket.receive(), 30)).data)
                    events.append(told)
                    if wanted(told):
                        return told.get("result")

            async def call(method, **given):
                await socket.send_str(json.dumps({"id": len(events) + 1000, "method": method, "params": given}))
                number = len(events) + 1000
                return await until(lambda told: told.get("id") == number)

            for domain in ("Page", "Network", "Log", "Runtime"):
                await call(f"{domain}.enable")
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            await call("Emulation.setDeviceMetricsOverride", **size)
            await call("Page.navigate", url=path.as_uri())
            if not any(told.get("method") == "Page.loadEventFired" for told in events):
                await until(lambda told: told.get("method") == "Page.loadEventFired")
            values = [
                (await call("Runtime.evaluate", expression=asked, returnByValue=True))["result"]["value"]
                for asked in (OVERFLOWING, "document.documentElement.scrollWidth")
            ]
    sent = [told["params"]["request"]["url"] for told in events if told.get("method") == "Network.requestWillBeSent"]
    return Opened(*values, sent, [told for told in events if told.get("method") in LOUD])
