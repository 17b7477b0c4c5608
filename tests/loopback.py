"""A server on this machine that speaks chat completions as it is told to: what an endpoint may do, without a network."""

import contextlib
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


@contextlib.contextmanager
def serving(reply):
    """A running Server."""
    server = Server(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
