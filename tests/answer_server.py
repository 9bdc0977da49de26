"""A real server with the chat API of OpenAI around a model of this workbook, in a process of its own:

    python tests/answer_server.py [PORT] [MODEL]

Without a port it takes a free one; the first line that it prints is its address. For trying things and for tests:
`--faults 429,500,html,cut,slow` makes it fail once in each way before it replies to the requests that follow, and
`--dies N` makes it end, with SIGKILL, instead of giving reply N + 1.
"""
import argparse
import base64
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sfa_core.documents.samples import Sample
from sfa_core.models.answers import answer
from sfa_core.models.load import load_model
from sfa_core.models.sequences import prompt_suffix


class AnswerServer(ThreadingHTTPServer):
    "A model, and what is to go wrong."

    daemon_threads = True

    def __init__(self, port, model, *, faults=(), dies=None, key="", host="127.0.0.1"):
        super().__init__((host, port), Handler)
        self.bundle, self.name, self.key = load_model(model), model.rpartition("/")[2], key
        self.faults, self.dies, self.answered, self.lock = list(faults), dies, 0, threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return self.send({"error": {"message": "no such key"}}, 401)
        card = {"id": self.server.name, "object": "model", "prompt_suffix": prompt_suffix(self.server.bundle)}
        return self.send({"object": "list", "data": [card]} if self.path.endswith("/models") else {}, 200)

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault:
            return self.fail(fault)
        with self.server.lock:  # one model, one question at a time
            if self.server.answered == self.server.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            self.server.answered += 1
            picture, text = sent["messages"][0]["content"]
            page = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
            asked = Sample("1", "1", "served", text["text"], ("?",), page)
            reply, = answer(self.server.bundle, [asked], 1, sent["max_tokens"], suffix="")
        if reply.error:
            return self.send({"error": {"message": reply.error}}, 400)
        choice = {"index": 0, "finish_reason": "length" if reply.truncated else "stop",
                  "message": {"role": "assistant", "content": reply.prediction}}
        used = {"prompt_tokens": 1, "completion_tokens": len(reply.tokens), "total_tokens": 1 + len(reply.tokens)}
        return self.send({"id": "1", "object": "chat.completion", "created": 0, "model": self.server.name,
                          "choices": [choice], "usage": used}, 200)

    def fail(self, fault):
        if fault == "html":
            return self.send("<html>Bad gateway</html>", 502, "text/html")
        if fault == "page":
            return self.send("<html>Welcome</html>", 200, "text/html")
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"id": "1", "choi')
            self.close_connection = True
            return None
        if fault == "slow":
            self.connection.settimeout(60)
            self.close_connection = not self.connection.recv(1)  # nothing is sent until the client gives up
            return None
        return self.send({"error": {"message": f"no {fault}"}}, int(fault))

    def send(self, value, status, kind="application/json"):
        content = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        "Print nothing."


def main():
    options = argparse.ArgumentParser(description="Serve a model through the chat API of OpenAI.")
    options.add_argument("port", type=int, nargs="?", default=0)
    options.add_argument("model", nargs="?", default="embedded")
    options.add_argument("--faults", default="")
    options.add_argument("--dies", type=int)
    options.add_argument("--key", default="")
    given = options.parse_args()
    server = AnswerServer(given.port, given.model, faults=filter(None, given.faults.split(",")), dies=given.dies,
                          key=given.key)
    print(f"http://127.0.0.1:{server.server_port}/v1#{server.name}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
