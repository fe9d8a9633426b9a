#!/usr/bin/env python3
"""CPU and memory of a sidecar and of the webhook: the source of the resource requests in `k8s/` and the defaults of `inject`.

    benches/release && python3 tests/experiments/resource_requests.py [BINARY]     # needs h2load and nginx; two minutes

Two sidecars as `inject` makes them, one worker each: the client's, to which h2load sends requests at a fixed rate, and,
over mutual TLS, the service's, with an nginx behind it that responds with 1 KiB. One in ten requests is traced, without a
collector: spans are made and dropped. CPU is that of the whole process over the wall time, in thousandths of a core; memory
is resident memory after the load. The webhook answers the reviews of a real API server (`tests/it/kubernetes/admission`),
one after the other on one connection, and each on a new one.
"""

import http.client
import json
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/measured/outrigger")
SECONDS = int(os.environ.get("SECONDS_EACH", "20"))
TICKS = os.sysconf("SC_CLK_TCK")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident(pid, key="VmRSS"):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def wait_for(port):
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def row(name, *cells):
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


class Lab:
    def __init__(self, folder):
        self.folder, self.running = folder, []

    def start(self, *words, **more):
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
        self.running.append(child)
        return child

    def end(self):
        for child in reversed(self.running):
            child.terminate()
        for child in self.running:
            child.wait()

    def sidecar(self, name, inbound, outbound, admin, service, more=""):
        config = self.folder / f"{name}.toml"
        certs = self.folder / "certs"
        config.write_text(
            f"""
[runtime]
workers = 1
[inbound]
listen = "127.0.0.1:{inbound}"
forward_to = "127.0.0.1:{service}"
[outbound]
listen = "127.0.0.1:{outbound}"
[admin]
listen = "127.0.0.1:{admin}"
[identity]
cert = "{certs}/{name}.crt"
key = "{certs}/{name}.key"
ca = "{certs}/ca.crt"
[telemetry]
otlp = "http://127.0.0.1:9"
"""
            + more
        )
        child = self.start(BINARY, "run", "-c", str(config))
        wait_for(admin)
        return child


def sidecars(lab):
    web, ports = free_port(), [free_port() for _ in range(6)]
    (lab.folder / "www").mkdir()
    (lab.folder / "www/index.html").write_text("x" * 1024)
    nginx = lab.folder / "nginx.conf"
    nginx.write_text(
        f"daemon off; master_process off; pid {lab.folder}/pid; error_log /dev/null; events {{}}\n"
        f"http {{ access_log off; keepalive_requests 1000000;\n"
        f"server {{ listen 127.0.0.1:{web}; root {lab.folder}/www; }} }}\n"
    )
    lab.start(shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(nginx))
    wait_for(web)
    subprocess.run([BINARY, "certs", "--out", lab.folder / "certs", "--trust-domain", "lab", "caller", "hello"], check=True, capture_output=True)
    there = lab.sidecar("hello", *ports[:3], web)
    here = lab.sidecar(
        "caller",
        *ports[3:],
        web,
        f'[[upstream]]\nname = "hello"\nendpoints = ["127.0.0.1:{ports[0]}"]\nidentity = ["spiffe://lab/ns/default/sa/hello"]\n',
    )
    print(f"\nThe sidecar, {SECONDS} s each:\n")
    row("requests a second", "client's: CPU", "memory", "service's: CPU", "memory")
    row("---", "---", "---", "---", "---")
    for rate in [0, 100, 1000]:
        before, began = [cpu(child.pid) for child in (here, there)], time.monotonic()
        if rate:
            connections = 10
            load = subprocess.run(
                ["h2load", "--h1", "-c", str(connections), "--rps", str(rate / connections), "-n", str(rate * SECONDS),
                 f"--connect-to=127.0.0.1:{ports[4]}", "http://hello/"],
                capture_output=True, text=True, check=True,
            )
            done = next(line for line in load.stdout.splitlines() if line.startswith("requests:"))
            assert f"{rate * SECONDS} succeeded, 0 failed" in done, done
        else:
            time.sleep(SECONDS)
        wall = time.monotonic() - began
        cells = []
        for child, start in zip((here, there), before):
            cells += [f"{(cpu(child.pid) - start) / wall * 1000:.1f}m", f"{resident(child.pid):.1f} MiB"]
        row(f"{rate or 'none'}", *cells)


def webhook(lab):
    port = free_port()
    subprocess.run([BINARY, "certs", "--out", lab.folder / "webhook", "--trust-domain", "lab", "webhook"], check=True, capture_output=True)
    certs = lab.folder / "webhook"
    child = lab.start(BINARY, "webhook", "--listen", f"127.0.0.1:{port}", "--tls-cert", str(certs / "webhook.crt"), "--tls-key", str(certs / "webhook.key"))
    wait_for(port)
    context = ssl.create_default_context(cafile=certs / "ca.crt")
    recorded = [json.loads(path.read_text()) for path in sorted((ROOT / "tests/it/kubernetes/admission").iterdir())]
    reviews = [(one["path"], json.dumps(one["review"])) for one in recorded]

    def ask(connection, number):
        path, body = reviews[number % len(reviews)]
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.status
        assert json.loads(answer.read())["response"]["allowed"]

    def connect():
        return http.client.HTTPSConnection("localhost", port, context=context)

    print("\nThe webhook:\n")
    row("", "reviews", "p50", "p99", "CPU each", "memory", "at most")
    row("---", "---", "---", "---", "---", "---", "---")
    time.sleep(1)
    row("idle", "", "", "", "", f"{resident(child.pid):.1f} MiB", f"{resident(child.pid, 'VmHWM'):.1f} MiB")
    for name, count, each in [("on one connection", 5000, False), ("a new connection each", 500, True)]:
        connection, times, before = connect(), [], cpu(child.pid)
        ask(connection, 0)
        for number in range(count):
            began = time.perf_counter()
            if each:
                connection.close()
                connection = connect()
            ask(connection, number)
            times.append(time.perf_counter() - began)
        times.sort()
        at = lambda share: f"{times[int(len(times) * share)] * 1000:.2f} ms"
        spent = (cpu(child.pid) - before) / count * 1e6
        row(name, str(count), at(0.5), at(0.99), f"{spent:.0f} µs", f"{resident(child.pid):.1f} MiB", f"{resident(child.pid, 'VmHWM'):.1f} MiB")
    # The largest review that it accepts, from eight clients at a time.
    path, body = reviews[0]
    review = json.loads(body)
    review["request"]["object"]["metadata"]["annotations"] = {"big": "x" * (3 << 20)}
    clients = [connect() for _ in range(8)]
    for client in clients:
        client.request("POST", path, json.dumps(review), {"content-type": "application/json"})
    for client in clients:
        assert client.getresponse().read()
    row("eight reviews of 3 MiB at a time", "8", "", "", "", f"{resident(child.pid):.1f} MiB", f"{resident(child.pid, 'VmHWM'):.1f} MiB")


def main():
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(pathlib.Path(folder))
        try:
            sidecars(lab)
            webhook(lab)
        finally:
            lab.end()


main()
