#!/usr/bin/env python3
"""CPU per request of Outrigger, nginx and HAProxy as a reverse proxy, in one run.

    cargo build --release && python3 benches/peers/first.py [--rounds 5] [--seconds 3] [--connections 64]

Each proxies HTTP/1.1 with keep-alive on one thread to the same server with answers of 1 KiB. Rounds are short and
alternate, so that a slow spell of the machine hits all of them; what counts is utime + stime of the process tree over
requests answered, the median of the rounds, and the ratio, not the absolute number.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import socket
import statistics
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parents[2]
TICK = os.sysconf("SC_CLK_TCK")

NGINX = """
daemon off; master_process off; pid {dir}/{name}.pid; error_log {dir}/{name}.log; worker_processes 1;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;
  client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c; uwsgi_temp_path {dir}/d;
  scgi_temp_path {dir}/e;
  {body}
}}
"""
HAPROXY = """
global
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
frontend f
  bind 127.0.0.1:{port}
  default_backend b
backend b
  server s 127.0.0.1:{upstream}
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port):
    for _ in range(1000):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.01)
    raise SystemExit(f"nothing listens on {port}")


def tree(pid):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in tree(int(child)))]


def cpu_seconds(pid):
    total = 0
    for member in tree(pid):
        fields = pathlib.Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def resident_mib(pid):
    pages = sum(int(pathlib.Path(f"/proc/{member}/statm").read_text().split()[1]) for member in tree(pid))
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def wrk(port, seconds, connections):
    said = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"http://127.0.0.1:{port}/"],
        check=True, capture_output=True, text=True,
    ).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"not all answers were well:\n{said}")
    return int(re.search(r"(\d+) requests in", said)[1])


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=int, default=3)
    options.add_argument("--connections", type=int, default=64)
    options.add_argument("--binary", default=str(HERE / "target/release/outrigger"))
    options = options.parse_args()
    os.environ["PATH"] += ":/usr/sbin"
    for tool in ("nginx", "haproxy", "wrk"):
        if not shutil.which(tool):
            raise SystemExit(f"{tool} is not installed")

    started = []
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)

        def start(*command):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
            started.append(process)
            return process

        def nginx(name, body):
            (folder / name).write_text(NGINX.format(dir=folder, name=name, body=body))
            return start("nginx", "-c", str(folder / name), "-p", str(folder), "-e", str(folder / f"{name}.log"))

        try:
            upstream, nginx_port, haproxy_port = free_port(), free_port(), free_port()
            answer = "x" * 1024
            nginx("server", f'server {{ listen 127.0.0.1:{upstream}; location / {{ return 200 "{answer}"; }} }}')
            wait_for(upstream)
            peers = {}
            proxying = (
                f"upstream up {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}"
                f"server {{ listen 127.0.0.1:{nginx_port}; location / {{ proxy_pass http://up;"
                f' proxy_http_version 1.1; proxy_set_header Connection ""; }} }}'
            )
            peers["nginx"] = (nginx("proxy", proxying), nginx_port)
            (folder / "haproxy").write_text(HAPROXY.format(port=haproxy_port, upstream=upstream))
            peers["HAProxy"] = (start("haproxy", "-db", "-f", str(folder / "haproxy")), haproxy_port)
            (folder / "outrigger.toml").write_text(
                "[runtime]\nworkers = 1\n"
                f'[inbound]\nlisten = "127.0.0.1:0"\nforward_to = "127.0.0.1:{upstream}"\n'
                '[outbound]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n'
                f'[[upstream]]\nname = "up"\nhosts = ["*"]\nendpoints = ["127.0.0.1:{upstream}"]\n'
            )
            ready = folder / "ready.json"
            process = start(options.binary, "run", "-c", str(folder / "outrigger.toml"), "--ready-file", str(ready))
            for _ in range(1000):
                if ready.exists() and ready.read_text().strip():
                    break
                time.sleep(0.01)
            bound = json.loads(ready.read_text())
            for way in ("outbound", "inbound"):
                peers[f"Outrigger {way}"] = (process, int(bound[way].rsplit(":", 1)[1]))

            micros, rates = {name: [] for name in peers}, {name: [] for name in peers}
            for process, port in peers.values():
                wait_for(port)
                wrk(port, 1, options.connections)  # warm
            for _ in range(options.rounds):
                for name, (process, port) in peers.items():
                    before = cpu_seconds(process.pid)
                    requests = wrk(port, options.seconds, options.connections)
                    micros[name].append((cpu_seconds(process.pid) - before) / requests * 1e6)
                    rates[name].append(requests / options.seconds)

            best = min(statistics.median(micros[name]) for name in ("nginx", "HAProxy"))
            print(f"{options.connections} connections, 1 KiB answers, HTTP/1.1, one thread each, "
                  f"{options.rounds} rounds of {options.seconds} s\n")
            print("| proxy | CPU µs a request (min–max) | to the cheaper peer | requests/s | resident MiB |")
            print("| --- | --- | --- | --- | --- |")
            for name, (process, _) in peers.items():
                median, spread = statistics.median(micros[name]), micros[name]
                print(f"| {name} | {median:.1f} ({min(spread):.1f}–{max(spread):.1f}) | {median / best:.2f} | "
                      f"{statistics.median(rates[name]):,.0f} | {resident_mib(process.pid):.1f} |")
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


if __name__ == "__main__":
    main()
