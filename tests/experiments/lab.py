"""What the experiments share: services that misbehave, a caller at a fixed rate, proxies in front of them."""

import asyncio
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service:
    """An HTTP/1.1 server. `rule(number)` says what to do with a request: a status,
    'reset', 'hang', or (delay, status)."""

    def __init__(self, rule=lambda number: 200):
        self.rule, self.requests, self.port = rule, 0, None
        self.server, self.writers = None, set()

    async def start(self, port=0):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port or port, backlog=1024)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    def stop(self):
        """Gone: refuses connections and cuts those that are open."""
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


class Load:
    """Calls at a fixed rate, whether or not earlier ones are answered. A caller gives up after `patience`."""

    def __init__(self, port, rate, patience=20):
        self.port, self.rate, self.patience = port, rate, patience
        self.idle, self.results, self.answers = [], [], {}

    async def one(self, method):
        begin, status = time.monotonic(), 0
        try:
            async with asyncio.timeout(self.patience):
                reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    writer.write(f"{method} / HTTP/1.1\r\nhost: up\r\n\r\n".encode())
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
            status = 0
        self.answers[status] = self.answers.get(status, 0) + 1
        self.results.append((status, time.monotonic() - begin))

    async def run(self, seconds, method="GET"):
        begin, tasks = time.monotonic(), []
        for number in range(int(seconds * self.rate)):
            await asyncio.sleep(max(0, begin + number / self.rate - time.monotonic()))
            tasks.append(asyncio.create_task(self.one(method)))
        await asyncio.gather(*tasks)
        return self

    def success(self):
        return 100 * sum(status == 200 for status, _ in self.results) / len(self.results)

    def quantile(self, share):
        took = sorted(took for _, took in self.results)
        return 1000 * took[min(len(took) - 1, int(share * len(took)))]


class Proxy:
    """A proxy process; ended with the `with` block."""

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

    async def __aexit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        self.directory.cleanup()


def outrigger(ports, more="", top=""):
    """Outrigger's outbound port before these endpoints. `more`: keys of the upstream; `top`: further tables."""
    binary = os.environ.get("OUTRIGGER_BIN", str(HERE / "target/release/outrigger"))
    endpoints = ", ".join(f'"127.0.0.1:{port}"' for port in ports)
    config = (
        '[inbound]\nlisten = "127.0.0.1:0"\n[outbound]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n'
        f'{top}[[upstream]]\nname = "up"\nendpoints = [{endpoints}]\n{more}\n'
    )
    return Proxy([binary, "run", "-c", "@DIR@/config.toml", "--ready-file", "@DIR@/ready.json"], config, ".toml")
