#!/usr/bin/env python3
"""One slow endpoint of five: its share of the requests, and the latency at the clients.

    cargo build --release && python3 tests/experiments/slow_endpoint.py [--rate 200] [--seconds 6]

Four endpoints respond after 5 ms, one after a second. The first two seconds, before it is known as slow, are not counted.
"""

import argparse
import asyncio

from lab import Load, Service, outrigger

SETS = [
    ("round-robin", 'balance = "round-robin"'),
    ("round-robin, outlier detection (attempt_timeout 250 ms)",
     'balance = "round-robin"\nattempt_timeout = "250ms"\nbreaker = false'),
    ("round-robin, the same without outlier detection",
     'balance = "round-robin"\nattempt_timeout = "250ms"\nbreaker = false\noutlier = false'),
    ("least-request", 'balance = "least-request"'),
    ("p2c (default)", ""),
    ("p2c, hedge after p95", 'hedge = { after = "p95" }'),
    ("round-robin, hedge after 50 ms", 'balance = "round-robin"\nhedge = { after = "50ms" }'),
]


async def measure(keys, rate, seconds):
    slow = await Service(lambda _: (1.0, 200)).start()
    others = [await Service(lambda _: (0.005, 200)).start() for _ in range(4)]
    async with outrigger([slow.port, *(service.port for service in others)], keys) as proxy:
        await Load(proxy.port, rate).run(2)
        before = [service.requests for service in (slow, *others)]
        load = await Load(proxy.port, rate).run(seconds)
        got = [service.requests - had for service, had in zip((slow, *others), before)]
    for service in (slow, *others):
        service.stop()
    return 100 * got[0] / len(load.results), 100 * sum(got) / len(load.results) - 100, load


async def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rate", type=int, default=200)
    options.add_argument("--seconds", type=int, default=6)
    options = options.parse_args()
    print(f"{options.rate} calls a second for {options.seconds} s; 5 endpoints, one answers after 1 s instead of 5 ms\n")
    print("| balance, policies | calls sent to the slow one | extra load | p50 | p95 | p99 | success |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, keys in SETS:
        share, extra, load = await measure(keys, options.rate, options.seconds)
        p50, p95, p99 = (load.quantile(share) for share in (0.5, 0.95, 0.99))
        print(f"| {name} | {share:.1f} % | {extra:+.1f} % | {p50:.0f} ms | {p95:.0f} ms | {p99:.0f} ms "
              f"| {load.success():.1f} % |", flush=True)


asyncio.run(main())
