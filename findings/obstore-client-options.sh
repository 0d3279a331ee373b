#!/usr/bin/env bash
# obstore 0.12.1: a client option given in the program switches off AWS_ALLOW_HTTP of the environment.
#
# Expected: what the environment says (AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, AWS_REGION, keys) holds unless the program says
#   otherwise; a time-out in client_options is about time-outs.
# Happens: with any client_options, an empty dictionary too, AWS_ALLOW_HTTP=true is dropped while AWS_ENDPOINT_URL and the
#   keys still hold, and each request to an http:// endpoint ends with "HTTP error: builder error", after which nobody looks for
#   a time-out. client_options={"allow_http": True, ...} is needed beside the variable.
# Seen: 30 November 2026.
# Output, from which any difference ends this script with 1:
#> no client_options: stored
#> client_options={'timeout': '30s'}: GenericError, builder error
#> client_options={}: GenericError, builder error
#> client_options={'timeout': '30s', 'allow_http': True}: stored
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
sed -n 's/^#> //p' "$0" >"$directory/expected"
"${PYTHON:-python3.11}" -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check obstore==0.12.1
cat >"$directory/program.py" <<'PROGRAM'
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import obstore
from obstore.exceptions import GenericError
from obstore.store import from_url


class Store(BaseHTTPRequestHandler):
    """Takes every object."""

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        """Nothing."""


server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
    "AWS_ALLOW_HTTP": "true",
    "AWS_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
}
for options in (None, {"timeout": "30s"}, {}, {"timeout": "30s", "allow_http": True}):
    arguments = {} if options is None else {"client_options": options}
    told = "no client_options" if options is None else f"client_options={options}"
    try:
        obstore.put(from_url("s3://bucket/prefix", **arguments), "key", b"bytes")
        print(f"{told}: stored")
    except GenericError as error:
        print(f"{told}: GenericError, {'builder error' if 'builder error' in str(error) else error}")
PROGRAM
"$directory/venv/bin/python" "$directory/program.py" >"$directory/seen"
cat "$directory/seen"
diff "$directory/expected" "$directory/seen"
