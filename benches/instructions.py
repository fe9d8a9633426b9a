#!/usr/bin/env python3
"""Instructions per request, counted by valgrind's callgrind: unlike times, they repeat on a busy machine.

    benches/release
    python3 benches/instructions.py policies         what the policies cost when nothing fails
    python3 benches/instructions.py traces           what traces cost
    python3 benches/instructions.py check            against benches/instructions.json; exit 1 if a request got more expensive
    python3 benches/instructions.py check --store    stores the counts as the new reference

One worker, all threads counted. Needs valgrind, nginx, h2load, nghttpd (apt: valgrind nginx nghttp2-client nghttp2-server)
and, for traces and S7, rotel (pip); `.ci/tools` installs them. OUTRIGGER_BIN names another binary.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))

import ends  # noqa: E402
from stage import Stage  # noqa: E402

BINARY = os.environ.get("OUTRIGGER_BIN", str(HERE.parent / "target/measured/outrigger"))
REFERENCE = HERE / "instructions.json"
TOLERANCE = 0.03
WARM, REQUESTS = 500, 4000
OFF = "[defaults]\nretry = false\nbreaker = false\noutlier = false\nlimits = false\n"
LOGGED = '[telemetry]\naccess_log = "all"\naccess_log_file = "{folder}/access.log"\n'
TRACED = 'otlp = "http://127.0.0.1:{collector}"\nprotocol = "grpc"\n'


@dataclass(frozen=True)
class Case:
    title: str
    # Configuration before the upstream: `{folder}` is its directory, `{collector}` a port.
    config: str = ""
    # To the upstream: "plain", "mtls" or "grpc" (HTTP/2 both ways, 16 connections with 32 streams each).
    upstream: str = "plain"
    # The client is remote and uses mutual TLS, instead of local.
    inbound: bool = False


POLICIES = [
    Case("shipped defaults (retry, budget, breaker, ejection, limits)"),
    Case("all of them off", OFF),
    Case(
        "defaults, and rate limit, hedge, fault (ratio 0), fallback",
        "[defaults.rate_limit]\nrate = 1000000\nburst = 1000000\n"
        '[defaults.hedge]\nafter = "p99"\n'
        "[defaults.fault]\nabort = 503\nabort_ratio = 0.0\n"
        "[defaults.fallback]\nstatus = 200\n",
    ),
    Case('defaults, and `access_log = "all"` to a file, the thread that writes it included', LOGGED),
]
TRACES = [Case("none")] + [
    Case(f"{name} sampled", f"[telemetry]\n{TRACED}sample = {ratio}\n")
    for name, ratio in (("1 %", 0.01), ("10 %", 0.1), ("all", 1.0))
]
CHECKS = {
    "S1": Case("HTTP/1.1, 1 KiB"),
    "S2": Case("the same, mutual TLS to the upstream", upstream="mtls"),
    "S3": Case("the same, mutual TLS from the caller", inbound=True),
    "S5": Case("HTTP/2 without TLS, gRPC-like", upstream="grpc"),
    "S7": Case("S1 with access log to a file and 1 % traces", f"{LOGGED}{TRACED}sample = 0.01\n"),
}


class Bench:
    """The servers, which run for all cases."""

    def __init__(self, stage):
        self.stage, self.number = stage, 0
        self.servers = ends.Servers(stage).ports
        self.collector = None

    def config(self, case, folder):
        more = case.config
        if "{collector}" in more:
            self.collector = self.collector or ends.collector(self.stage)
        more = more.format(folder=folder, collector=self.collector)
        port, upstream = self.servers[case.upstream == "mtls", "kept"], ""
        if case.upstream == "grpc":
            port, self.call = ends.grpc_server(self.stage)
        if case.inbound or case.upstream == "mtls":
            own = f"{self.stage.certs}/{'payments' if case.inbound else 'checkout'}"
            more += f'[identity]\ncert = "{own}.crt"\nkey = "{own}.key"\nca = "{self.stage.certs}/ca.crt"\n'
        if case.upstream == "mtls":
            upstream = 'identity = ["spiffe://shop.example/ns/default/sa/payments"]\n'
        any_port = 'listen = "127.0.0.1:0"\n'
        return (
            f"[runtime]\nworkers = 1\n[inbound]\n{any_port}forward_to = \"127.0.0.1:{port}\"\n[outbound]\n{any_port}[admin]\n{any_port}{more}"
            f'[[upstream]]\nname = "up"\nendpoints = ["127.0.0.1:{port}"]\n{any_port}{upstream}'
        )

    def load(self, case, port, requests):
        how = ["--h1", "-c8", f"http://127.0.0.1:{port}/k"]
        if case.upstream == "grpc":
            how = ["-c16", "-m32", *self.call, f"http://127.0.0.1:{port}/call.grpc"]
        said = subprocess.run(["h2load", "-n", str(requests), *how], capture_output=True, text=True, check=True).stdout
        if f" {requests} 2xx" not in said:
            sys.exit(f"the load did not go well:\n{said}")

    def count(self, case):
        """User instructions per request."""
        # Its own folder, since it is watched for changes.
        self.number += 1
        own = self.stage.folder / f"own-{self.number}"
        own.mkdir()
        ready, out = own / "ready.json", self.stage.folder / f"callgrind-{self.number}"
        (own / "outrigger.toml").write_text(self.config(case, own))
        proxy = self.stage.start(
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--instr-atstart=no",
            BINARY, "run", "-c", str(own / "outrigger.toml"), "--ready-file", str(ready), "--log", "error",
        )
        control = lambda on: subprocess.run(
            ["callgrind_control", "-i", on, str(proxy.pid)], capture_output=True, check=True
        )
        deadline = time.monotonic() + 60
        while not ready.exists():
            if time.monotonic() > deadline or proxy.poll() is not None:
                sys.exit("the proxy did not start under valgrind")
            time.sleep(0.05)
        said = json.loads(ready.read_text())
        port = (said["inbound"] if case.inbound else said["upstreams"]["up"]).rsplit(":", 1)[1]
        if case.inbound:
            port = ends.mtls_client(self.stage, f"caller-{self.number}", port, "kept")
        self.load(case, port, WARM)
        control("on")
        self.load(case, port, REQUESTS)
        control("off")
        self.stage.end(proxy)
        # One part per dump; only the one of the counted interval is not empty.
        parts = [part.read_text() for part in self.stage.folder.glob(f"{out.name}*")]
        lines = [line for part in parts for line in part.splitlines() if line.startswith(("summary:", "totals:"))]
        return round(max(int(line.split()[1]) for line in lines) / REQUESTS)


def version(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(" (")[0].strip()


def check(bench, store):
    """Whether every request costs the same as before. Everything but the source that affects the count is stored with it."""
    made_by = {"rustc": version("rustc", "--version"), "valgrind": version("valgrind", "--version")}
    found = {name: bench.count(case) for name, case in CHECKS.items()}
    if store:
        REFERENCE.write_text(json.dumps({"instructions": found, **made_by}, indent=2) + "\n")
        print(f"Stored as the reference: {found}")
        return 0
    reference = json.loads(REFERENCE.read_text())
    dearer, cheaper = [], []
    print("| | | instructions per request | reference | change |\n| --- | --- | --- | --- | --- |")
    for name, count in found.items():
        was = reference["instructions"][name]
        change = count / was - 1
        print(f"| {name} | {CHECKS[name].title} | {count:,} | {was:,} | {change:+.1%} |")
        if abs(change) > TOLERANCE:
            (dearer if change > 0 else cheaper).append(f"{name} by {abs(change):.1%}")
    how = "`python3 benches/instructions.py check --store` on a release build, committed with the reason"
    others = [f"{key} {reference[key]}" for key in made_by if reference.get(key) not in (None, made_by[key])]
    if (dearer or cheaper) and others:
        print(f"The reference was counted with {', '.join(others)}; that alone may be the difference.")
    if cheaper:
        print(f"A request became cheaper: {', '.join(cheaper)}. Keep the gain by a new reference: {how}.")
    if dearer:
        print(f"A request became dearer than the {TOLERANCE:.0%} that are tolerated: {', '.join(dearer)}. Make it cheaper or, "
              f"where that is the price of something, store a new reference: {how}.")
    return 1 if dearer else 0


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=["policies", "traces", "check"], nargs="?", default="policies")
    options.add_argument("--store", action="store_true", help="with check: write the counts down as the new reference")
    options = options.parse_args()
    os.environ["PATH"] += ":/usr/sbin"
    with Stage(BINARY) as stage:
        bench = Bench(stage)
        if options.what == "check":
            sys.exit(check(bench, options.store))
        print("| | instructions per request |\n| --- | --- |")
        for case in POLICIES if options.what == "policies" else TRACES:
            print(f"| {case.title} | {bench.count(case):,} |", flush=True)


main()
