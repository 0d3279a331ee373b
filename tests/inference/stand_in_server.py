"""A stand-in for the vLLM server process: takes its arguments, answers /health, has a child, dies when told to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()


def main() -> None:
    arguments = sys.argv[1:]
    how = os.environ["STAND_IN"]
    print("started with", *arguments, flush=True)
    if how == "dies":
        sys.exit("the model's folder is empty")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path("child.pid").write_text(str(child.pid))
    if how == "sleeps":
        time.sleep(600)
    HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Health).serve_forever()


main()
