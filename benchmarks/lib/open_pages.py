"""Open pages: connections that listen to live states as browsers do, and one in Chromium; what they cost."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil

# Until a page has drawn what was there when it was opened.
_SETTLE_SECONDS = 3.0


def cpu_seconds(process: int) -> float:
    times = psutil.Process(process).cpu_times()
    return float(times.user + times.system)


@contextmanager
def listeners(port: int, count: int) -> Iterator[list[int]]:
    """So many connections that read `/live`; gives the bytes that each has read."""
    read, stop = [0] * count, threading.Event()
    with ExitStack() as opened:
        connections = []
        for _ in range(count):
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            connection.settimeout(0.0)
            connections.append(connection)

        def drain() -> None:
            while not stop.is_set():
                for number, connection in enumerate(connections):
                    try:
                        read[number] += len(connection.recv(1 << 20))
                    except BlockingIOError:
                        continue
                time.sleep(0.2)

        thread = threading.Thread(target=drain)
        thread.start()
        try:
            yield read
        finally:
            stop.set()
            thread.join()


class ChromiumPage:
    """A page in Chromium."""

    def __init__(self, page: Any) -> None:
        self._page = page

    def open(self, url: str, shown: str) -> None:
        """Go there and wait until an element is shown, and a little longer."""
        self._page.goto(url)
        self._page.wait_for_selector(shown, timeout=120_000)
        self._page.wait_for_timeout(1000 * _SETTLE_SECONDS)

    def share(self, seconds: float) -> float:
        """The share of a core that all processes of Chromium take in so many seconds."""
        children = psutil.Process().children(recursive=True)
        processes = [child for child in children if "chrom" in child.name()]
        before = _total(processes)
        # The page's thread of Playwright must turn.
        self._page.wait_for_timeout(1000 * seconds)
        return (_total(processes) - before) / seconds


@contextmanager
def chromium_page(chromium: str) -> Iterator[ChromiumPage]:
    """A page of 1280 x 900 pixels; needs Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield ChromiumPage(browser.new_page(viewport={"width": 1280, "height": 900}))
        browser.close()


def _total(processes: list[psutil.Process]) -> float:
    return sum(cpu_seconds(process.pid) for process in processes if process.is_running())
