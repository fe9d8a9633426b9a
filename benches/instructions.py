#!/usr/bin/env python3
"""Instructions per request, with the policies and without, or with traces, counted by valgrind's callgrind.

    cargo build --release && python3 benches/instructions.py [policies|traces]

Counts, unlike times, repeat on a busy machine. HTTP/1.1 with keep-alive, 8 connections, answers of 1 KiB, one worker,
by an upstream's own port. Needs valgrind, nginx and h2load (apt: valgrind nginx nghttp2-client).
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

BINARY = os.environ.get("OUTRIGGER_BIN", "target/release/outrigger")
REQUESTS = 4000
OFF = "[defaults]\nretry = false\nbreaker = false\noutlier = false\nlimits = false\n"
CASES = {
    "shipped defaults (retry, budget, breaker, ejection, limits)": "",
    "all of them off": OFF,
    "defaults, and rate limit, hedge, fault (ratio 0), fallback": (
        "[defaults.rate_limit]\nrate = 1000000\nburst = 1000000\n"
        '[defaults.hedge]\nafter = "p99"\n'
        "[defaults.fault]\nabort = 503\nabort_ratio = 0.0\n"
        "[defaults.fallback]\nstatus = 200\n"
    ),
    'defaults, and `access_log = "all"`, the thread that writes it included': '[telemetry]\naccess_log = "all"\n',
}
# Exported to rotel (pip install rotel), by gRPC; the thread that does it is counted, too.
TRACED = '[telemetry]\notlp = "http://127.0.0.1:{port}"\nprotocol = "grpc"\nsample = '
TRACES = {
    "no traces": "",
    "traces, 1 % sampled": TRACED + "0.01\n",
    "traces, 10 % sampled": TRACED + "0.1\n",
    "traces, all sampled": TRACED + "1.0\n",
}
ROTEL = os.environ.get("ROTEL", os.path.expanduser("~/.cache/outrigger/bin/rotel-agent"))
NGINX = """
daemon off; pid {d}/pid; error_log {d}/error.log; worker_processes 1;
events {{ worker_connections 512; }}
http {{
  access_log off; keepalive_requests 1000000;
  client_body_temp_path {d}/b; proxy_temp_path {d}/p; fastcgi_temp_path {d}/f; uwsgi_temp_path {d}/u; scgi_temp_path {d}/s;
  server {{ listen 127.0.0.1:{port}; root {d}; }}
}}
"""


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def load(port, requests):
    command = ["h2load", "--h1", "-n", str(requests), "-c", "8", f"http://127.0.0.1:{port}/k"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if f"{requests} succeeded" not in said:
        sys.exit(f"the load did not go well:\n{said}")


def count(folder, upstream, policies):
    # A folder of its own: it is watched for changes, and nginx opens its file for each answer.
    own = folder / "own"
    own.mkdir(exist_ok=True)
    ready = own / "ready.json"
    ready.unlink(missing_ok=True)
    config = own / "outrigger.toml"
    config.write_text(
        '[inbound]\nlisten = "127.0.0.1:0"\n[outbound]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n'
        f'{policies}[[upstream]]\nname = "up"\nendpoints = ["127.0.0.1:{upstream}"]\nlisten = "127.0.0.1:0"\n'
    )
    out = folder / "callgrind.out"
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--instr-atstart=no"]
    command += [BINARY, "run", "-c", str(config), "--ready-file", str(ready), "--log", "error"]
    proxy = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            if time.monotonic() > deadline or proxy.poll() is not None:
                sys.exit("the proxy did not start under valgrind")
            time.sleep(0.05)
        port = json.loads(ready.read_text())["upstreams"]["up"].rsplit(":", 1)[1]
        load(port, 500)
        subprocess.run(["callgrind_control", "-i", "on", str(proxy.pid)], capture_output=True, check=True)
        load(port, REQUESTS)
        subprocess.run(["callgrind_control", "-i", "off", str(proxy.pid)], capture_output=True, check=True)
    finally:
        proxy.terminate()
        proxy.wait(60)
    # One part per dump; only the one that was counted in is not empty.
    parts = [file.read_text() for file in folder.glob("callgrind.out*")]
    lines = [line for part in parts for line in part.splitlines() if line.startswith(("summary:", "totals:"))]
    return max(int(line.split()[1]) for line in lines) / REQUESTS


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)  # nginx reads it as another user
        (folder / "k").write_bytes(b"x" * 1024)
        port = free_port()
        (folder / "nginx.conf").write_text(NGINX.format(d=folder, port=port))
        nginx = subprocess.Popen(["nginx", "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL)
        collector, rotel = None, free_port()
        if sys.argv[1:] == ["traces"]:
            ports = ["--otlp-grpc-endpoint", f"127.0.0.1:{rotel}", "--otlp-http-endpoint", f"127.0.0.1:{free_port()}"]
            collector = subprocess.Popen([ROTEL, "start", *ports, "--exporter", "blackhole"], stdout=subprocess.DEVNULL)
        try:
            cases = TRACES if sys.argv[1:] == ["traces"] else CASES
            print("| | instructions per request |\n| --- | --- |")
            for title, policies in cases.items():
                print(f"| {title} | {count(folder, port, policies.replace('{port}', str(rotel))):,.0f} |", flush=True)
        finally:
            nginx.terminate()
            nginx.wait(10)
            if collector:
                collector.terminate()
                collector.wait(10)


main()
