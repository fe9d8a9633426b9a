#!/usr/bin/env python3
"""Cost of a request as the number of connections, endpoints, routes, upstreams and the body size grow.

    benches/release && python3 benches/peers/growth.py [--only routes] [--rounds 3] [--seconds 1] [--json FILE]

One sidecar for each size, all of them running together, rounds alternate. A cost that grows with the size bends the curve
up. Then a sidecar with 10,000 upstreams of 10 endpoints each: memory, start, and how long a reload takes and
delays requests. Loopback only, some minutes. Needs nginx, wrk, HAProxy.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import re
import socket
import statistics
import time
from dataclasses import dataclass

import ends
import load
import machine
import report
from stage import Stage

HERE = pathlib.Path(__file__).resolve().parents[2]
MANY = {
    "start_ms": "start to the first response, ms",
    "resident_mib": "resident, MiB",
    "applied_ms": "a change of the file until it is applied, ms",
    "cpu_of_change_ms": "CPU of it, ms",
    "of_worker_ms": "of that, the worker thread's, ms",
    "longest_call_ms": "longest request meanwhile, ms",
    "resident_after_mib": "resident after it, MiB",
}
ENDPOINTS, UPSTREAMS, EACH = 1000, 10_000, 10


@dataclass(frozen=True)
class Call:
    """Arguments of wrk."""

    connections: int = 64
    path: str = "/"
    host: str = "svc-0"


class Sidecar:
    def __init__(self, stage, name, config):
        self.stage, self.port, self.admin = stage, stage.free_port(), stage.free_port()
        # Its own folder, since it is watched for changes.
        (stage.folder / f"sidecar-{name}").mkdir()
        self.file = stage.folder / f"sidecar-{name}" / "outrigger.toml"
        self.head = (
            f'[runtime]\nworkers = 1\n[inbound]\nlisten = "127.0.0.1:{stage.free_port()}"\n'
            f'[outbound]\nlisten = "127.0.0.1:{self.port}"\n[admin]\nlisten = "127.0.0.1:{self.admin}"\n'
        )
        self.write(config)

    def write(self, config):
        beside = self.file.with_suffix(".new")
        beside.write_text(self.head + config)
        beside.rename(self.file)

    def start(self):
        self.process = self.stage.start(self.stage.binary, "run", "-c", str(self.file))
        self.pids = [self.process.pid]

    def spent(self):
        """CPU seconds and requests so far."""
        return machine.cpu_seconds(self.pids), load.counted(self.admin, r"http_client_request_duration_seconds_count\{.*\} (\d+)")

    def up(self):
        self.start()
        self.stage.wait_for(self.port)
        return self


class HaProxy:
    """For comparison: with as many connections to the server as a sidecar makes."""

    def __init__(self, stage, name, target):
        self.stage, self.port = stage, stage.free_port()
        self.socket, self.file = (stage.folder / f"haproxy-{name}.{kind}" for kind in ("socket", "cfg"))
        self.file.write_text(
            f"global\n nbthread 1\n no strict-limits\n maxconn 12000\n stats socket {self.socket}\ndefaults\n mode http\n maxconn 12000\n"
            " http-reuse always\n timeout connect 1m\n timeout client 1m\n timeout server 1m\n timeout queue 1m\n"
            f"frontend calls\n bind 127.0.0.1:{self.port} backlog 4096\n default_backend server\n"
            f"backend server\n server one {target} maxconn 1024\n"
        )

    def spent(self):
        """CPU seconds and requests so far."""
        with socket.socket(socket.AF_UNIX) as asks:
            asks.connect(str(self.socket))
            asks.sendall(b"show info\n")
            said = b"".join(iter(lambda: asks.recv(65536), b"")).decode()
        return machine.cpu_seconds(self.pids), int(re.search(r"^CumReq: (\d+)", said, re.M)[1])

    def up(self):
        self.pids = [self.stage.start("haproxy", "-f", str(self.file)).pid]
        self.stage.wait_for(self.port)
        return self


def upstream(name, endpoints, more=""):
    return f'[[upstream]]\nname = "{name}"\nendpoints = {json.dumps(endpoints)}\n{more}'


def addresses(port, count):
    """Ports of one server that listens on all of them."""
    return [f"127.0.{number // 250}.{number % 250 + 1}:{port}" for number in range(count)]


def server(stage):
    """On a thousand addresses."""
    port = stage.free_port()
    listens = "".join(f"listen {address} backlog=4096;" for address in addresses(port, ENDPOINTS))
    bodies = ends.bodies(stage)
    ends.nginx(stage, "server", f"open_file_cache max=100; server {{ {listens} {bodies} }}", connections=65536)
    stage.wait_for(port)
    return port


# The growing dimensions: a sidecar and a request for each size.
def connections(stage, port):
    # One limit is not the default: more than 256 requests are queued.
    queue = '[upstream.limits]\nmax_pending = 20000\npending_timeout = "1m"\n'
    config = upstream("svc-0", addresses(port, 1), queue)
    # One each: closing thousands must not be counted with the next.
    return {size: (Sidecar(stage, f"connections-{size}", config).up(), Call(size)) for size in (10, 100, 1000, 10_000)}


def haproxy(stage, port):
    target = addresses(port, 1)[0]
    return {size: (HaProxy(stage, size, target).up(), Call(size)) for size in (10, 100, 1000, 10_000)}


def endpoints(stage, port):
    # Not the default here either: every endpoint has a connection or two.
    limit = "[upstream.limits]\nmax_connections = 8000\n"
    return {
        size: (Sidecar(stage, f"endpoints-{size}", upstream("svc-0", addresses(port, size), limit)).up(), Call())
        for size in (1, 10, 100, ENDPOINTS)
    }


def routes(stage, port):
    def config(size):
        many = "".join(f'[[upstream.route]]\nmatch = {{ path = "/r{number}/*" }}\ntimeout = "9s"\n' for number in range(size))
        return upstream("svc-0", addresses(port, 1), many)

    return {
        size: (Sidecar(stage, f"routes-{size}", config(size)).up(), Call(path=f"/r{size - 1}/"))
        for size in (1, 10, 100, 1000, 10_000)
    }


def upstreams(stage, port):
    def config(size):
        return "".join(upstream(f"svc-{number}", addresses(port, EACH)) for number in range(size))

    return {size: (Sidecar(stage, f"upstreams-{size}", config(size)).up(), Call()) for size in (1, 10, 100, 1000, UPSTREAMS)}


def bodies(stage, port):
    sidecar = Sidecar(stage, "bodies", upstream("svc-0", addresses(port, 1))).up()
    return {size: (sidecar, Call(16, f"/{path}")) for path, size in ends.BODIES.items()}


GROWING = {
    "connections": (connections, "client connections, all active"),
    "haproxy": (haproxy, "the same, through HAProxy"),
    "endpoints": (endpoints, "endpoints of the upstream"),
    "routes": (routes, "routes of the upstream, requests to the last one"),
    "upstreams": (upstreams, f"upstreams of {EACH} endpoints, requests to one"),
    "bodies": (bodies, "bytes of the response"),
}


def grow(make, options):
    """CPU microseconds a request, of each round, by size."""
    with Stage(options.binary) as stage:
        sizes, found = make(stage, server(stage)), collections.defaultdict(list)
        for sidecar, call in sizes.values():
            load.wrk(stage, sidecar.port, call, 1 + call.connections // 2000)  # warm
        for _ in range(options.rounds):
            for size, (sidecar, call) in sizes.items():
                found[size].append(micros(stage, sidecar, call, options.seconds))
        return found


def micros(stage, sidecar, call, seconds):
    """CPU per request. With thousands of connections, only while all are connected."""
    if call.connections <= 100:
        before = machine.cpu_seconds(sidecar.pids)
        requests, _ = load.wrk(stage, sidecar.port, call, seconds)
        return (machine.cpu_seconds(sidecar.pids) - before) / requests * 1e6
    connecting = 1 + call.connections // 1000
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        calling = beside.submit(load.wrk, stage, sidecar.port, call, connecting + seconds + 1)
        time.sleep(connecting)
        cpu, requests = sidecar.spent()
        time.sleep(seconds)
        cpu_after, requests_after = sidecar.spent()
        calling.result()
    return (cpu_after - cpu) / (requests_after - requests) * 1e6


def many(options):
    """10,000 upstreams beside one: start, memory, a change of the file."""
    with Stage(options.binary) as stage:
        port, found = server(stage), {}
        for size in (1, UPSTREAMS):
            rest = "".join(upstream(f"svc-{number}", addresses(port, EACH)) for number in range(1, size))
            sidecar = Sidecar(stage, f"many-{size}", upstream("svc-0", addresses(port, EACH)) + rest)
            start = load.first_answer(sidecar.start, sidecar.port, host="svc-0")
            resident = machine.resident_kib(sidecar.pids) / 1024
            cpu, on_worker = machine.cpu_seconds(sidecar.pids), machine.cpu_seconds(sidecar.pids, "worker")
            refusing = '[upstream.fault]\nabort = 503\nabort_ratio = 1.0\n'
            sidecar.write(upstream("svc-0", addresses(port, EACH), refusing) + rest)
            applied, longest = load.until(sidecar.port, "svc-0", 503)
            found[size] = {"start_ms": start, "resident_mib": resident, "applied_ms": applied, "longest_call_ms": longest,
                           "cpu_of_change_ms": (machine.cpu_seconds(sidecar.pids) - cpu) * 1000,
                           "of_worker_ms": (machine.cpu_seconds(sidecar.pids, "worker") - on_worker) * 1000,
                           "resident_after_mib": machine.resident_kib(sidecar.pids) / 1024}
        return found


def table(found):
    lines = []
    for name, sizes in found.items():
        if name == "many":
            lines += ["", "| | 1 upstream | 10,000 |", "| --- | --- | --- |"]
            one, all_of_them = sizes.values()
            lines += [f"| {title} | {one[key]:,.1f} | {all_of_them[key]:,.1f} |" for key, title in MANY.items()]
            continue
        medians = {int(size): statistics.median(rounds) for size, rounds in sizes.items()}
        row = lambda title, cells: f"| {' | '.join([title, *cells])} |"
        lines += ["", row(GROWING[name][1], [f"{size:,}" for size in medians]), row("---", ["---"] * len(medians))]
        lines.append(row("CPU µs a request", [report.number(micros) for micros in medians.values()]))
        if name == "bodies":
            # Meaningless for small ones.
            each = [f"{micros / size * 1e6:,.0f}" if size >= 1 << 16 else "" for size, micros in medians.items()]
            lines.append(row("CPU µs a MB", each))
    return "\n".join(lines[1:])


def main():
    known = [*GROWING, "many"]
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", type=lambda text: text.split(","), default=known, metavar=",".join(known))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=int, default=1, help="of each round")
    options.add_argument("--binary", default=os.environ.get("OUTRIGGER_BIN", HERE / "target/measured/outrigger"))
    options.add_argument("--json", type=pathlib.Path, help="every round of every number")
    options.add_argument("--plots", type=pathlib.Path, help="a folder for an SVG of each")
    options.add_argument("--page", type=pathlib.Path, help="a page whose tables between the markers of `growth` are replaced")
    options = options.parse_args()
    os.environ["PATH"] += ":/usr/sbin"
    found, began = {}, time.monotonic()
    for name in options.only:
        found[name] = many(options) if name == "many" else grow(GROWING[name][0], options)
        print(f"{name}: measured, at {time.monotonic() - began:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(made := table(found))
    if options.page:
        report.paste(options.page, "growth", made)
    if options.plots:
        import plots

        for name, sizes in found.items():
            if name != "many":
                plots.curve(sizes, "CPU µs a request", GROWING[name][1], options.plots, f"growth-{name}", log=name == "bodies")


if __name__ == "__main__":
    main()
