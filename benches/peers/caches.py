#!/usr/bin/env python3
"""Cache cost of a request: instructions, and cache lines of code and data that miss the first-level cache.

    benches/release && python3 benches/peers/caches.py [--only S1] [--page docs/performance.md]

Counted by valgrind's cachegrind, which simulates caches (32 KiB each for code and data, 1 MiB behind them) and branches of
user code alone; the difference of two runs, of the same proxies under the same load of 64 connections. It explains why
two proxies with equal instruction counts differ in time. Loopback only, a minute. Needs valgrind.
"""

import argparse
import os
import pathlib
import re
import subprocess
import time

import report
from measure import Bench
from proxies import PROXIES
from scenarios import SCENARIOS
from stage import Stage

HERE = pathlib.Path(__file__).resolve().parents[2]
FEW, MANY = 2000, 8000
SIMULATED = ["--cache-sim=yes", "--branch-sim=yes", "--I1=32768,8,64", "--D1=32768,8,64", "--LL=1048576,16,64"]
COUNTED = {
    "instructions": r"I\s+refs",
    "code cache lines missed": r"I1\s+misses",
    "data cache lines missed": r"D1\s+misses",
    "branches": r"Branches",
    "mispredicted": r"Mispredicts",
}


def counts(scenario, options, kind, requests):
    """Counts for one run of a proxy with this many requests."""
    with Stage(options.binary) as stage:
        bench = Bench(scenario, options, stage)
        prepared = PROXIES[kind].prepare(stage, "counted", scenario.hops[0], bench.server(scenario.hops[-1]), bench.collector)
        command = ["valgrind", "--tool=cachegrind", "--cachegrind-out-file=/dev/null", *SIMULATED, *prepared.command]
        process = stage.start(*command)
        said = stage.folder / f"said-{len(stage.started) - 1}"
        time.sleep(2)  # valgrind starts slowly
        stage.wait_for(prepared.port)
        load = ["h2load", "--h1", "-c64", f"-n{requests}", f"http://127.0.0.1:{prepared.port}/"]
        answered = subprocess.run(load, check=True, capture_output=True, text=True).stdout
        if f" {requests} 2xx" not in answered:
            raise SystemExit(f"not all answers were well:\n{answered}")
        stage.end(process)
        text = said.read_text()
    number = lambda found: int(found.replace(",", ""))
    return {name: sum(map(number, re.findall(rf"\b{what}:\s+([\d,]+)", text))) for name, what in COUNTED.items()}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plain = [name for name, scenario in SCENARIOS.items() if scenario.load == "wrk" and len(scenario.hops) == 1 and not scenario.hops[0].tls_in]
    options.add_argument("--only", choices=plain, default="S1")
    options.add_argument("--proxies", type=lambda text: text.split(","), default=["nginx", "HAProxy", "Outrigger"], metavar=",".join(PROXIES))
    options.add_argument("--binary", default=os.environ.get("OUTRIGGER_BIN", HERE / "target/measured/outrigger"))
    options.add_argument("--page", type=pathlib.Path, help="a page whose table between the markers of `caches` is replaced")
    options = options.parse_args()
    os.environ["PATH"] += ":/usr/sbin"
    rows = [f"| {options.only} | {' | '.join(COUNTED)} |", f"| {' | '.join(['---'] * (len(COUNTED) + 1))} |"]
    for kind in options.proxies:
        few, many = (counts(SCENARIOS[options.only], options, kind, requests) for requests in (FEW, MANY))
        cells = (f"{(many[name] - few[name]) / (MANY - FEW):,.0f}" for name in COUNTED)
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    print(table := "\n".join(rows))
    if options.page:
        report.paste(options.page, "caches", table)


if __name__ == "__main__":
    main()
