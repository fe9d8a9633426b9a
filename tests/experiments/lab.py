"""Shared parts of the experiments: failing services, a client at a fixed rate, proxies between them."""

import asyncio
import itertools
import json
import os
import pathlib
import signal
import random
import socket
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parents[2]


def free_port():
    """A free port below the ephemeral range, so that a restarted server finds it free."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Service:
    """An HTTP/1.1 server. `rule(number)` returns the treatment of a request: a status,
    'reset', 'hang', or (delay, status)."""

    def __init__(self, rule=lambda number: 200):
        self.rule, self.requests, self.port = rule, 0, None
        self.server, self.writers = None, set()

    async def start(self, port=0):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port or port, backlog=1024)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    def stop(self):
        """Down: refuses connections and cuts open ones."""
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()

    async def serve(self, reader, writer):
        self.writers.add(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.requests += 1
                act = self.rule(self.requests)
                if act == "reset":
                    writer.transport.abort()
                    return
                if act == "hang":
                    await reader.read(1)
                    return
                if isinstance(act, tuple):
                    await asyncio.sleep(act[0])
                    act = act[1]
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\nok" % act)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()


class Client:
    """HTTP/1.1 requests on kept connections. A client gives up after `patience`."""

    def __init__(self, port, patience=20):
        self.port, self.patience, self.idle = port, patience, []

    async def request(self, method, fields=""):
        """The response's status and head; 0 and "" without a response."""
        status, head = 0, ""
        try:
            async with asyncio.timeout(self.patience):
                reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    length = "" if method == "GET" else "content-length: 0\r\n"
                    writer.write(f"{method} / HTTP/1.1\r\nhost: up\r\n{fields}{length}\r\n".encode())
                    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                    status = int(head.split(" ", 2)[1])
                    if "content-length:" in head:
                        await reader.readexactly(int(head.split("content-length:")[1].split("\r")[0]))
                        if "connection: close" not in head:
                            self.idle.append((reader, writer))
                            writer = None
                finally:
                    if writer:
                        writer.close()
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            return 0, ""
        return status, head


async def at_rate(rate, send, go_on):
    """Starts `send(number)` at a fixed rate, whether or not earlier ones have finished; waits for all."""
    begin, tasks = time.monotonic(), []
    for number in itertools.count():
        await asyncio.sleep(max(0, begin + number / rate - time.monotonic()))
        if not go_on(number):
            break
        tasks.append(asyncio.create_task(send(number)))
    await asyncio.gather(*tasks)


class Load(Client):
    """Sends requests at a fixed rate, whether or not earlier ones have finished."""

    def __init__(self, port, rate, patience=20):
        super().__init__(port, patience)
        self.rate, self.results, self.statuses = rate, [], {}

    async def one(self, method):
        begin = time.monotonic()
        status, _ = await self.request(method)
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.results.append((status, time.monotonic() - begin))

    async def run(self, seconds, method="GET"):
        await at_rate(self.rate, lambda _: self.one(method), lambda number: number < int(seconds * self.rate))
        return self

    def success(self):
        return 100 * sum(status == 200 for status, _ in self.results) / len(self.results)

    def quantile(self, share):
        took = sorted(took for _, took in self.results)
        return 1000 * took[min(len(took) - 1, int(share * len(took)))]


class Proxy:
    """A proxy process, stopped at the end of the `with` block."""

    def __init__(self, command, config, suffix, ready=None):
        self.directory = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self.directory.name)
        (folder / f"config{suffix}").write_text(config)
        self.log = open(folder / "log", "w+")
        words = [word.replace("@DIR@", str(folder)) for word in command]
        self.process = subprocess.Popen(words, stdout=self.log, stderr=self.log, cwd=folder)
        self.folder, self.port = folder, ready

    async def listening(self):
        for _ in range(1000):
            if self.process.poll() is not None:
                self.log.seek(0)
                raise SystemExit(self.log.read())
            if self.port is None:
                ready = self.folder / "ready.json"
                if ready.exists() and ready.read_text().strip():
                    self.port = int(json.loads(ready.read_text())["outbound"].rsplit(":", 1)[1])
            else:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return self
                except OSError:
                    pass
            await asyncio.sleep(0.02)
        raise SystemExit("the proxy does not listen")

    async def __aenter__(self):
        return await self.listening()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.directory.cleanup()

    async def __aexit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        self.directory.cleanup()


BINARY = os.environ.get("OUTRIGGER_BIN", str(HERE / "target/release/outrigger"))


def outrigger(ports, more="", top=""):
    """Outrigger's outbound port with these endpoints as its upstream. `more`: keys of the upstream; `top`: further tables."""
    endpoints = ", ".join(f'"127.0.0.1:{port}"' for port in ports)
    return run_outrigger(
        '[inbound]\nlisten = "127.0.0.1:0"\n[outbound]\nlisten = "127.0.0.1:0"\n'
        f'{top}[[upstream]]\nname = "up"\nendpoints = [{endpoints}]\n{more}\n'
    )


def sidecar(port, service):
    """Outrigger's inbound port with this service behind it."""
    return run_outrigger(
        f'[inbound]\nlisten = "127.0.0.1:{port}"\nforward_to = "127.0.0.1:{service}"\n'
        '[outbound]\nlisten = "127.0.0.1:0"\n[runtime]\nworkers = 1\n'
    )


def run_outrigger(config):
    command = [BINARY, "run", "-c", "@DIR@/config.toml", "--ready-file", "@DIR@/ready.json"]
    return Proxy(command, f'[admin]\nlisten = "127.0.0.1:0"\n{config}', ".toml")
