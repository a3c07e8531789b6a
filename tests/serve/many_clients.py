"""Many clients at once, most of them unkind: python tests/serve/many_clients.py FILE --minutes 5.

Greedy answers have to be those of the quiet server, whenever the model has its full size; memory has to come back.
"""

import argparse
import contextlib
import http.client
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import psutil

WORDS = "the a old river house town small red stone garden and of in with went saw found little".split()


class Load:
    """Clients of a server at `url`; what went wrong is in `faults`."""

    def __init__(self, url, tokens=24):
        self.address = urlsplit(url)
        self.tokens = tokens
        self.done, self.faults = Counter(), []
        self.epoch = 0  # odd while the size changes
        rng = random.Random(0)
        beginning = " ".join(rng.choices(WORDS, k=90))
        self.prompts = [
            " ".join([*([beginning] * (number % 2)), *rng.choices(WORDS, k=rng.choice([1, 5, 40, 120]))])
            for number in range(20)
        ]
        self.full = self.size()["max_mb"]
        self.wanted = [self.answer(prompt) for prompt in self.prompts]

    def request(self, method, path, body=None, timeout=300):
        connection = http.client.HTTPConnection(self.address.netloc, timeout=timeout)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def body(self, prompt, **options):
        messages = [{"role": "user", "content": prompt}]
        return json.dumps({"messages": messages, "max_tokens": self.tokens, "temperature": 0, **options}).encode()

    def answer(self, prompt, stream=False):
        """The text, or None if the server has no room."""
        status, raw = self.request("POST", "/v1/chat/completions", self.body(prompt, stream=stream))
        if status == 429:
            return None
        assert status == 200, (status, raw[:200])
        if not stream:
            return json.loads(raw)["choices"][0]["message"]["content"]
        events = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
        assert raw.endswith(b"data: [DONE]\n\n"), raw[-200:]
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    def size(self, mb=None):
        body = None if mb is None else json.dumps({"mb": mb})
        status, raw = self.request("GET" if mb is None else "POST", "/v1/budget", body)
        assert status == 200, raw
        return json.loads(raw)

    def ask(self, rng, stream):
        number, epoch = rng.randrange(len(self.prompts)), self.epoch
        found = self.answer(self.prompts[number], stream)
        if found is None:
            self.done["refused"] += 1
            time.sleep(rng.random())
        elif epoch == self.epoch and epoch % 2 == 0:
            self.done["compared"] += 1
            assert found == self.wanted[number], (number, found, self.wanted[number])
        else:
            self.done["while the size changed"] += 1

    def open(self, **options):
        connection = socket.create_connection((self.address.hostname, self.address.port), timeout=300)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        body = self.body(self.prompts[0], **options)
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        return connection

    def leave(self, rng):
        with self.open(stream=rng.random() < 0.5, max_tokens=200, n=rng.choice([1, 3])) as connection:
            connection.settimeout(rng.random())
            with contextlib.suppress(TimeoutError):
                connection.recv(rng.choice([1, 400]))
        self.done["left"] += 1

    def be_slow(self, rng):
        with self.open(stream=True, max_tokens=100) as connection:
            for _ in range(10):
                time.sleep(0.1)
                connection.recv(64)
        self.done["slow"] += 1

    def send_garbage(self, rng):
        raw = rng.choice(
            [rng.randbytes(300), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n"]
        )
        with socket.create_connection((self.address.hostname, self.address.port), timeout=300) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        status, _ = self.request("POST", rng.choice(["/v1/completions", "/v1/budget", "/x"]), rng.randbytes(200))
        assert status in (400, 404), status
        self.done["garbage"] += 1

    def send_much(self, rng):
        with contextlib.suppress(ConnectionError):
            status, _ = self.request("POST", "/v1/chat/completions", b" " * rng.choice([5, 20]) * 2**20)
            assert status == 413, status
        self.done["huge"] += 1

    def client(self, number, end):
        rng = random.Random(number)
        kinds = [lambda r: self.ask(r, True), lambda r: self.ask(r, False)] * 4
        kinds += [self.leave, self.be_slow, self.send_garbage, self.send_much]
        while time.monotonic() < end and not self.faults:
            try:
                rng.choice(kinds)(rng)
            except Exception as error:
                self.faults.append(repr(error))

    def resize(self, end, every):
        smallest, rng = self.size()["min_mb"], random.Random(1)
        while time.monotonic() + 2 * every < end and not self.faults:
            time.sleep(every)
            self.epoch += 1
            try:
                self.size(round(rng.uniform(smallest, self.full), 2))
                time.sleep(every / 4)
                self.size(self.full)
                while (now := self.size())["blocks"] != now["all_blocks"]:
                    assert now["error"] is None, now
                    time.sleep(0.05)
            except Exception as error:
                self.faults.append(repr(error))
            self.epoch += 1

    def run(self, seconds, clients=32, every=3.0):
        """Run all clients for so long."""
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(number, end)) for number in range(clients)]
        threads.append(threading.Thread(target=self.resize, args=(end, every)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main():
    from conftest import Server

    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--minutes", type=int, default=5)
    parser.add_argument("--cache-mb", default="4")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two changes of the size")
    given = parser.parse_args()
    server = Server(given.file, "--queue", "40", "--cache-mb", given.cache_mb)
    process = psutil.Process(server.process.pid)
    load = Load(server.url)
    memory = []
    for _ in range(2 + given.minutes):  # two minutes of warm-up
        load.run(60, every=given.every)
        time.sleep(2)
        memory.append(process.memory_info().rss / 2**20)
        kept = load.request("GET", "/metrics")[1].decode().partition("\nbstack_prompt_cache_bytes ")[2].split()[0]
        print(
            f"{memory[-1]:.1f} MB, of them {float(kept) / 2**20:.2f} of kept prompts",
            dict(load.done),
            load.faults,
            flush=True,
        )
    print("exit code", server.stop(), server.log)
    return bool(load.faults) or memory[-1] - memory[1] > 5


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
    sys.exit(main())
