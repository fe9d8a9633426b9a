#!/usr/bin/env python3
"""CPU and memory of Outrigger beside nginx, HAProxy and Envoy, in one run.

    cargo build --release && python3 benches/peers/run.py [S1 S2 S3 S4 in-full …] [--rounds 5] [--seconds 3] [--json FILE]

All proxies of a scenario are up together, each on one thread, in front of the same server. Rounds are short and
alternate, so that a slow spell of the machine hits all of them; what counts is utime + stime of the process tree over
requests answered, the median of the rounds, and the ratio, not the absolute number. Without names: all scenarios.
`.ci/tools` installs the others. What each scenario is: scenarios.py.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics

import ends
import load
import machine
from proxies import PROXIES
from scenarios import SCENARIOS
from stage import Stage

HERE = pathlib.Path(__file__).resolve().parents[2]


class Proxy:
    """The hops of one scenario, all of one kind."""

    def __init__(self, run, kind, scenario, servers):
        slug = kind.lower()
        to = servers.ports[scenario.hops[-1].tls_out, scenario.serving]
        self.pids, self.admin = [], None
        for number, hop in reversed(list(enumerate(scenario.hops))):
            process, to = PROXIES[kind](run, f"{slug}-{number}", hop, to)
            run.wait_for(to)
            self.pids.append(process.pid)
            self.admin = getattr(process, "admin", None)
        # Where connections lead that are TLS's own business, and where wrk calls.
        self.port = self.way_in = to
        if scenario.hops[0].tls_in and not scenario.idle:
            self.way_in = ends.caller(run, f"{slug}-caller", to, scenario.calling)


def micros(proxies, scenario, options):
    """CPU microseconds a request, and requests a second, of each round."""
    cpu, rates = {kind: [] for kind in proxies}, {kind: [] for kind in proxies}
    for proxy in proxies.values():
        load.wrk(proxy.way_in, 1, scenario.connections)  # warm
    for _ in range(options.rounds):
        for kind, proxy in proxies.items():
            before = machine.cpu_seconds(proxy.pids)
            requests = load.wrk(proxy.way_in, options.seconds, scenario.connections)
            cpu[kind].append((machine.cpu_seconds(proxy.pids) - before) / requests * 1e6)
            rates[kind].append(requests / options.seconds)
    return {
        kind: {
            "cpu_us": cpu[kind],
            "per_second": rates[kind],
            "resident_kib": machine.resident_kib(proxy.pids),
            "handshakes": load.handshakes(proxy.admin) if proxy.admin else {},
        }
        for kind, proxy in proxies.items()
    }


def kibibytes(proxies, scenario, certs):
    """Resident memory of each idle connection."""
    found = {}
    for kind, proxy in proxies.items():
        load.idle(proxy.port, 50, certs if scenario.hops[0].tls_in else None)  # warm
        before = machine.resident_kib(proxy.pids)
        held = load.idle(proxy.port, scenario.idle, certs if scenario.hops[0].tls_in else None)
        after = machine.resident_kib(proxy.pids)
        found[kind] = {"kib_a_connection": (after - before) / len(held), "resident_kib": before}
    return found


def table(scenario, found):
    """Markdown."""
    lines = [f"\n**{scenario.name}**: {scenario.title}\n"]
    if scenario.idle:
        lines += ["| proxy | KiB a connection | resident MiB before |", "| --- | --- | --- |"]
        for kind, of in found.items():
            lines.append(f"| {kind} | {of['kib_a_connection']:.1f} | {of['resident_kib'] / 1024:.1f} |")
        return "\n".join(lines)
    median = {kind: statistics.median(of["cpu_us"]) for kind, of in found.items()}
    best = min((median[kind] for kind in median if kind != "Outrigger"), default=median.get("Outrigger"))
    lines += ["| proxy | CPU µs a request (min–max) | to the cheapest peer | requests/s | resident MiB |",
              "| --- | --- | --- | --- | --- |"]
    for kind, of in found.items():
        spread = of["cpu_us"]
        lines.append(
            f"| {kind} | {median[kind]:.1f} ({min(spread):.1f}–{max(spread):.1f}) | {median[kind] / best:.2f} | "
            f"{statistics.median(of['per_second']):,.0f} | {of['resident_kib'] / 1024:.1f} |"
        )
    for kind, of in found.items():
        if counts := of["handshakes"]:
            share = counts.get("resumed", 0) / max(sum(counts.values()), 1)
            said = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
            lines.append(f"\n{kind}'s handshakes: {said}; {share:.2%} resumed")
    return "\n".join(lines)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=int, default=3)
    options.add_argument("--proxies", default=",".join(PROXIES))
    options.add_argument("--binary", default=str(HERE / "target/release/outrigger"))
    options.add_argument("--json", type=pathlib.Path)
    options = options.parse_args()
    tools = os.environ.get("OUTRIGGER_TOOLS", os.path.expanduser("~/.cache/outrigger"))
    os.environ["PATH"] += f":/usr/sbin:{tools}/bin"
    kinds = options.proxies.split(",")
    for tool in ["nginx", "wrk", *(kind.lower() for kind in kinds if kind != "Outrigger")]:
        if not shutil.which(tool):
            raise SystemExit(f"{tool} is not installed")
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        raise SystemExit(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")

    print(f"One thread each, rounds of {options.seconds} s that alternate: {options.rounds}", flush=True)
    everything = {}
    for name in options.scenarios or SCENARIOS:
        scenario = SCENARIOS[name]
        with Stage(options.binary) as stage:
            servers = ends.Servers(stage)
            proxies = {kind: Proxy(stage, kind, scenario, servers) for kind in kinds}
            if scenario.idle:
                found = kibibytes(proxies, scenario, stage.certs)
            else:
                found = micros(proxies, scenario, options)
        everything[name] = found
        print(table(scenario, found), flush=True)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
