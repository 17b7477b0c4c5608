"""Servers on this machine: chat completions as told to, and a hub of models: what an endpoint may do, without a network."""

import contextlib
import hashlib
import http.server
import json
import threading


class Server(http.server.ThreadingHTTPServer):
    """Answers with `reply(body, number)`: (status, headers, bytes), number counting the requests from 0.

    bodies: list of dict, the requests in order; headers: those of the last one.
    """

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.bodies, self.headers, self.lock = reply, [], {}, threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands the body to the server's function."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.headers = {name.lower(): value for name, value in self.headers.items()} | {"path": self.path}
        status, headers, data = self.server.reply(body, number)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *words):
        """Nothing is printed."""


def completion(*texts):
    """A response with some choices."""
    choices = [{"index": n, "message": {"role": "assistant", "content": text}} for n, text in enumerate(texts)]
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": choices, "usage": usage}).encode()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Gives models as huggingface.co does: models = {"owner/name": {file: bytes}}; asked: paths of all requests."""

    daemon_threads = True

    def __init__(self, models):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.models, self.asked, self.url = models, [], f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks: the files of a revision, then each file's header and content."""

    def do_GET(self):
        self.server.asked.append(self.path)
        words = self.path.split("?")[0].strip("/").split("/")
        if words[:2] != ["api", "models"]:
            return self.give(self.server.models.get("/".join(words[:2]), {}).get("/".join(words[4:])))
        held = self.server.models.get("/".join(words[2:4]))
        told = {"revision": {"id": "/".join(words[2:4]), "sha": COMMIT, "siblings": [{"rfilename": one} for one in held or ()]},
                "tree": [{"type": "file", "path": one, "size": len(held[one]), "oid": COMMIT} for one in held or ()]}
        self.give(None if held is None else json.dumps(told[words[4]]).encode(), "application/json")

    do_HEAD = do_GET

    def give(self, content, kind="application/octet-stream"):
        """Answer with these bytes; None: not found."""
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", kind)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", hashlib.sha256(content or b"").hexdigest())
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    def log_message(self, format, *words):
        """Nothing is printed."""


@contextlib.contextmanager
def serving(reply, kind=Server):
    """A running Server, or another kind of one."""
    server = kind(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
