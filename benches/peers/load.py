"""Who calls: wrk for requests, and connections that stay open and idle."""

import collections
import re
import socket
import ssl
import subprocess
import urllib.request


def wrk(port, seconds, connections):
    """Requests that were answered."""
    said = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"http://127.0.0.1:{port}/"],
        check=True, capture_output=True, text=True,
    ).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"not all answers were well:\n{said}")
    return int(re.search(r"(\d+) requests in", said)[1])


def idle(port, count, certs=None):
    """Connections that have carried a request each and are kept."""
    context = None
    if certs:
        context = ssl.create_default_context(cafile=str(certs / "ca.crt"))
        context.load_cert_chain(certs / "checkout.crt", certs / "checkout.key")
    connections = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port), 10)
        if context:
            connection = context.wrap_socket(connection, server_hostname="payments")
        connection.sendall(b"GET / HTTP/1.1\r\nHost: payments\r\n\r\n")
        seen = b""
        while not seen.endswith(b"x" * 1024):
            chunk = connection.recv(65536)
            if not chunk:
                raise SystemExit(f"closed after {seen[:200]!r}")
            seen += chunk
        connections.append(connection)
    return connections


def handshakes(admin):
    """How often Outrigger shook hands, by outcome."""
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=10).read().decode()
    counts = collections.Counter()
    for outcome, count in re.findall(r'outrigger_tls_handshakes_total\{.*outcome="(\w+)".*\} (\d+)', metrics):
        counts[outcome] += int(count)
    return {outcome: count for outcome, count in counts.items() if count}
