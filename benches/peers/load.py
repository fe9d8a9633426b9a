"""The load: wrk and h2load for requests, open idle connections, and a client that waits for a first response."""

import collections
import http.client
import json
import re
import socket
import ssl
import subprocess
import time
import urllib.request

# For h2load, whose connections send at once: few at a fixed rate.
CLIENTS = 16
# The limit for a counted round, in seconds.
LONGEST = 300
# wrk's own output is rounded, and it has no option for a number of requests.
SCRIPT = """
done = function(summary)
  local e = summary.errors
  io.write(string.format('{"requests": %d, "bytes": %d, "errors": %d}',
    summary.requests, summary.bytes, e.connect + e.read + e.write + e.status + e.timeout))
end
"""
# Its main thread sleeps until the time is over or it is interrupted.
COUNTED = """
local ffi = require("ffi")
ffi.cdef("int getpid(void); int kill(int, int);")
local left = %d
response = function()
  left = left - 1
  if left == 0 then
    wrk.thread:stop()
    ffi.C.kill(ffi.C.getpid(), 2)
  end
end
"""


def wrk(stage, port, scenario, seconds, requests=0):
    """Runs for `seconds`, or until `requests` are completed. Completed requests, and bytes."""
    script = stage.folder / "wrk.lua"
    script.write_text(SCRIPT + (COUNTED % requests if requests else ""))
    limit = LONGEST if requests else seconds
    command = ["wrk", "-t1", f"-c{scenario.connections}", f"-d{limit}s", "--timeout", "30s", "-s", script]
    command += [f"http://127.0.0.1:{port}{scenario.path}"]
    command += ["-H", f"Host: {scenario.host}"] if scenario.host else []
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(said[said.rindex("{") :])
    if found["errors"]:
        raise SystemExit(f"not all answers were well:\n{said}")
    if found["requests"] < requests:
        raise SystemExit(f"{found['requests']} of {requests} requests in {limit} s:\n{said}")
    return found["requests"], found["bytes"]


def h2load(stage, port, scenario, call, seconds, rate=0, requests=0):
    """Runs for `seconds`, or until `requests` are completed. Completed requests and, at a fixed rate, their sorted
    latencies in microseconds."""
    http2 = scenario.load == "h2load"
    command = ["h2load", f"-c{CLIENTS}", f"-n{requests}" if requests else f"-D{seconds}", *(["-m32", *call] if http2 else ["--h1"])]
    log = stage.folder / "h2load.log"
    log.unlink(missing_ok=True)
    if rate:
        command += [f"--rps={rate // CLIENTS}", f"--log-file={log}"]
    path = "/call.grpc" if http2 else scenario.path
    command += [f"http://127.0.0.1:{port}{path}"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST).stdout
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", said)
    good, *bad = (int(count) for count in counts.groups())
    if any(bad) or ", 0 3xx, 0 4xx, 0 5xx" not in said:
        raise SystemExit(f"not all answers were well:\n{said}")
    micros = [int(line.split("\t")[2]) for line in log.read_text().splitlines()] if rate else []
    return good, sorted(micros)


def context(certs):
    made = ssl.create_default_context(cafile=str(certs / "ca.crt"))
    made.load_cert_chain(certs / "checkout.crt", certs / "checkout.key")
    return made


def answered(port, tls, host):
    """A connection that has carried a request and is kept open."""
    connection = socket.create_connection(("127.0.0.1", port), 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls:
        connection = tls.wrap_socket(connection, server_hostname="payments")
    connection.sendall(f"GET / HTTP/1.1\r\nHost: {host or 'payments'}\r\n\r\n".encode())
    seen = b""
    while not seen.endswith(b"x" * 1024):
        chunk = connection.recv(65536)
        if not chunk:
            raise ConnectionError(f"closed after {seen[:200]!r}")
        seen += chunk
    return connection


def idle(port, count, certs=None):
    tls = context(certs) if certs else None
    return [answered(port, tls, "") for _ in range(count)]


def first_answer(begin, port, certs=None, host=""):
    """Starts a proxy; the milliseconds until its first response."""
    tls = context(certs) if certs else None
    began = time.perf_counter()
    begin()
    while time.perf_counter() - began < 30:
        try:
            answered(port, tls, host).close()
            return (time.perf_counter() - began) * 1000
        except OSError:
            time.sleep(0.0002)
    raise SystemExit("no answer within 30 s of the start")


def until(port, host, status):
    """Sends requests until a response has this status: the milliseconds until then, and the longest request."""
    connection, longest, began = http.client.HTTPConnection("127.0.0.1", port, timeout=60), 0, time.perf_counter()
    while True:
        sent = time.perf_counter()
        connection.request("GET", "/", headers={"Host": host})
        answer = connection.getresponse()
        answer.read()
        now = time.perf_counter()
        longest = max(longest, now - sent)
        if answer.status == status:
            return (now - began) * 1000, longest * 1000
        if now - began > 60:
            raise SystemExit(f"no {status} within a minute")
        time.sleep(0.0005)


def metrics(admin):
    return urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=10).read().decode()


def counted(admin, pattern):
    """The sum of Outrigger's matching counters."""
    return sum(int(count) for count in re.findall(pattern, metrics(admin)))


def handshakes(admin):
    """Outrigger's TLS handshakes, by outcome."""
    counts = collections.Counter()
    for outcome, count in re.findall(r'outrigger_tls_handshakes_total\{.*outcome="(\w+)".*\} (\d+)', metrics(admin)):
        counts[outcome] += int(count)
    return {outcome: count for outcome, count in counts.items() if count}
