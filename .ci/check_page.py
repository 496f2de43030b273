#!/usr/bin/env python3
"""Checks a report in headless Chromium: check_page.py PAGE FOLDER (for the screenshots).

Asked of the page, at the widths of a phone and of a desktop, light and dark: no error in the console, nothing requested
but the page itself, no horizontal scrolling of the page, every drawing and table with a name and a size, and a screenshot
that is not blank. The same is then asked of pages with one planted fault each, which have to be found.

Only the standard library: the DevTools protocol goes through two pipes, JSON with a zero byte after each message.
"""

import base64
import json
import os
import pathlib
import shlex
import struct
import subprocess
import sys
import tempfile
import time
import zlib

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe""".split()
PHONE, DESKTOP = (390, 844), (1280, 900)
# A page of text alone has the shades of its letters; a blank one has one colour or two.
LEAST_COLOURS = 24
LOOK = """JSON.stringify({
  wide: document.documentElement.scrollWidth, viewport: innerWidth,
  drawings: document.querySelectorAll('svg').length, tables: document.querySelectorAll('table').length,
  unnamed: [...document.querySelectorAll('svg')].filter(e => !e.getAttribute('aria-label') || !e.querySelector('title'))
      .length + [...document.querySelectorAll('table')].filter(e => !e.caption).length,
  unseen: [...document.querySelectorAll('svg, table')].filter(e => !e.closest('details:not([open])'))
      .filter(e => e.getBoundingClientRect().width < 20 || e.getBoundingClientRect().height < 20).length,
  scripts: document.querySelectorAll('script, main [onload], main img, main b > b').length,
})"""


class Browser:
    """A headless Chromium and its one tab."""

    def __init__(self, profile):
        to_browser, self.send_end = os.pipe()
        self.receive_end, from_browser = os.pipe()
        command = shlex.join(["chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"])
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {command} 3<&{to_browser} 4>&{from_browser}"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.buffer, self.count, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            block = os.read(self.receive_end, 1 << 16)
            if not block:
                raise SystemExit("chromium ended: start it by hand to see why")
            self.buffer += block
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def load(self, url):
        """Loads a page and returns what happened on the way."""
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        time.sleep(0.1)
        self.call("Runtime.evaluate", expression="1")
        return self.events

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=20)


def colours(png):
    """The number of different colours of a PNG of 8 bits, RGB or RGBA, and its size."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    if depth != 8 or kind not in (2, 6):
        raise SystemExit(f"a screenshot with {depth} bits of kind {kind}")
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at:at + 4])
        if png[at + 4:at + 8] == b"IDAT":
            data += png[at + 8:at + 8 + length]
        at += length + 12
    data, size = zlib.decompress(data), 3 if kind == 2 else 4
    before, found = bytearray(width * size), set()
    for row in range(height):
        start = row * (width * size + 1)
        line, way = bytearray(data[start + 1:start + 1 + width * size]), data[start]
        for i in range(width * size):
            left, up = line[i - size] if i >= size else 0, before[i]
            corner = before[i - size] if i >= size else 0
            if way == 1:
                guess = left
            elif way == 2:
                guess = up
            elif way == 3:
                guess = (left + up) // 2
            elif way == 4:
                guess = min((left, up, corner), key=lambda near: abs(left + up - corner - near))
            else:
                guess = 0
            line[i] = (line[i] + guess) & 255
        found.update(bytes(line[i:i + 3]) for i in range(0, width * size, size))
        before = line
    return len(found), (width, height)


def faults(browser, page, size, scheme, screenshot):
    """What is wrong with a page, in words."""
    width, height = size
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=size == PHONE)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    url, found = page.resolve().as_uri(), []
    for event in browser.load(url):
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded" and parameters["entry"]["level"] in ("warning", "error"):
            found.append(f"console: {parameters['entry']['text']}")
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("warning", "error", "assert"):
            found.append(f"console: {parameters['args']}")
        elif method == "Runtime.exceptionThrown":
            found.append(f"console: {parameters['exceptionDetails']['text']}")
        elif method == "Network.requestWillBeSent" and parameters["request"]["url"] != url:
            found.append(f"requested: {parameters['request']['url']}")
    looked = json.loads(browser.call("Runtime.evaluate", expression=LOOK)["result"]["value"])
    if looked["viewport"] > width or looked["wide"] > width:
        found.append(f"wide: it has {max(looked['wide'], looked['viewport'])} pixels, the screen {width}")
    if looked["drawings"] < 5 or looked["tables"] < 5:
        found.append(f"empty: {looked['drawings']} drawings and {looked['tables']} tables")
    if looked["unnamed"] or looked["unseen"]:
        found.append(f"unnamed: {looked['unnamed']} drawings and tables have no name, {looked['unseen']} no size")
    if looked["scripts"]:
        found.append(f"obeyed: {looked['scripts']} elements come from the data")
    png = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
    screenshot.write_bytes(png)
    number, found_size = colours(png)
    if number < LEAST_COLOURS or found_size != size:
        found.append(f"blank: {number} colours in a screenshot of {found_size[0]} by {found_size[1]}")
    return found


def planted(html):
    """Pages with one fault each, and the word that must be found about it."""
    body = html.index("<main>")
    policy = html.index("<meta http-equiv"), html.index(">", html.index("<meta http-equiv")) + 1
    free = html[:policy[0]] + html[policy[1]:]
    put = lambda text, what: text.replace("<main>", "<main>" + what, 1)
    return {
        "blank": (html[:body] + "</body></html>", "blank"),
        "hidden": (html.replace("<body>", "<body style='visibility:hidden'>", 1), "blank"),
        "throws": (put(free, "<script>throw new Error('planted')</script>"), "console"),
        "forbidden": (put(html, "<script>1</script>"), "console"),
        "fetches": (put(free, "<img alt='' src='missing.png'>"), "requested"),
        "wide": (put(html, "<p style='width:2000px'>wide</p>"), "wide"),
        "unnamed": (html.replace("<caption>", "<!--", 1).replace("</caption>", "-->", 1), "unnamed"),
        "obeys": (put(html, "<p onload='1'>data</p>"), "obeyed"),
    }


def main():
    page, folder = map(pathlib.Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        shots = set()
        for name, size in (("phone", PHONE), ("desktop", DESKTOP)):
            for scheme in ("light", "dark"):
                shot = folder / f"{name}-{scheme}.png"
                found = faults(browser, page, size, scheme, shot)
                if found:
                    raise SystemExit(f"{page} on a {name}, {scheme}:\n  " + "\n  ".join(found))
                shots.add(shot.read_bytes())
        if len(shots) != 4:
            raise SystemExit(f"{page} looks the same on a phone and a desktop, or light and dark")
        pages = planted(page.read_text())
        for name, (html, word) in pages.items():
            broken = folder / f"planted-{name}.html"
            broken.write_text(html)
            found = faults(browser, broken, PHONE, "light", folder / f"planted-{name}.png")
            if not any(fault.startswith(word) for fault in found):
                raise SystemExit(f"the check does not see the fault planted in {broken}: it found {found}")
        browser.close()
    print(f"{page}: no fault on phone and desktop, light and dark; {len(pages)} planted faults are seen")


main()
