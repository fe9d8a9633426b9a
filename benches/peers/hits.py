#!/usr/bin/env python3
"""CPU of a response from the cache, beside nginx's proxy_cache, in one run.

    benches/release && python3 benches/peers/hits.py [--rounds 5] [--seconds 4] [--page docs/performance.md]

Three proxies of one thread each in front of the same server, all up at once, rounds alternating: Outrigger with a cache,
Outrigger without one (S1), and nginx whose store is in memory (/dev/shm). 64 connections, responses of 1 KiB. The server
counts what reaches it: a hit must not. Loopback only, a minute, on a machine without other load. Needs nginx, wrk.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import urllib.request

import ends
import load
import machine
import report
from scenarios import SCENARIOS
from stage import Stage

HERE = pathlib.Path(__file__).resolve().parents[2]
STORED, FORWARDED, NGINX = "Outrigger, from its cache", "Outrigger, forwarded (S1)", "nginx, from its cache"


def outrigger(stage, name, origin, cache):
    own, port = stage.folder / name, stage.free_port()
    own.mkdir()
    (own / "outrigger.toml").write_text(
        f'[runtime]\nworkers = 1\n[inbound]\nlisten = "127.0.0.1:{stage.free_port()}"\n'
        f'[outbound]\nlisten = "127.0.0.1:{port}"\n[admin]\nlisten = "127.0.0.1:{stage.free_port()}"\n'
        f'[[upstream]]\nname = "up"\nhosts = ["*"]\nendpoints = ["127.0.0.1:{origin}"]\ncache = {cache}\n'
    )
    return port, stage.start(stage.binary, "run", "-c", str(own / "outrigger.toml")).pid


def nginx(stage, name, origin, store):
    port = stage.free_port()
    body = (
        f"proxy_cache_path {store} levels=1:2 keys_zone=hits:8m max_size=64m inactive=1h use_temp_path=off; "
        f"open_file_cache max=1000; upstream up {{ server 127.0.0.1:{origin}; keepalive 256; }} "
        f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ proxy_cache hits; proxy_pass http://up; "
        f'proxy_http_version 1.1; proxy_set_header Connection ""; }} }}'
    )
    return port, ends.nginx(stage, name, body).pid


def requests_of(status):
    """Requests that the server has had; this one is among them."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{status}/status").read().decode()
    return int(text.splitlines()[2].split()[2])


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=int, default=4)
    options.add_argument("--binary", default=os.environ.get("OUTRIGGER_BIN", HERE / "target/measured/outrigger"))
    options.add_argument("--page", type=pathlib.Path, help="a page whose table between the markers of `hits` is replaced")
    options = options.parse_args()
    os.environ["PATH"] += ":/usr/sbin"
    scenario = SCENARIOS["S1"]
    with Stage(options.binary) as stage, tempfile.TemporaryDirectory(dir="/dev/shm") as store:
        origin, status = stage.free_port(), stage.free_port()
        ends.nginx(
            stage, "server",
            f"server {{ listen 127.0.0.1:{origin} backlog=4096; add_header Cache-Control max-age=3600; "
            f'location / {{ return 200 "{ends.ANSWER}"; }} }} '
            f"server {{ listen 127.0.0.1:{status}; location / {{ stub_status; }} }}",
        )
        stage.wait_for(origin)
        proxies = {
            STORED: outrigger(stage, "stored", origin, "{}"),
            FORWARDED: outrigger(stage, "forwarded", origin, "false"),
            NGINX: nginx(stage, "nginx", origin, store),
        }
        found = {name: [] for name in proxies}
        for port, _ in proxies.values():
            stage.wait_for(port)
            load.wrk(stage, port, scenario, 1)  # warm
        for _ in range(options.rounds):
            for name, (port, pid) in proxies.items():
                cpu, before = machine.cpu_seconds([pid]), requests_of(status)
                requests, _ = load.wrk(stage, port, scenario, options.seconds)
                found[name].append((machine.cpu_seconds([pid]) - cpu) / requests * 1e6)
                reached = requests_of(status) - before - 1
                if name != FORWARDED and reached:
                    raise SystemExit(f"{name}: {reached} requests reached the server")
    micros = {name: statistics.median(values) for name, values in found.items()}
    rows = ["| | CPU µs a request | Outrigger's cache is | target |", "| --- | --- | --- | --- |"]
    targets = {STORED: "", FORWARDED: "≤ 0.6", NGINX: "≤ 1.0"}
    for name, micro in micros.items():
        ratio = "" if name == STORED else f"{micros[STORED] / micro:.2f} × it"
        rows.append(f"| {name} | {micro:.1f} | {ratio} | {targets[name]} |")
    print(table := "\n".join(rows))
    if options.page:
        report.paste(options.page, "hits", table)


if __name__ == "__main__":
    main()
