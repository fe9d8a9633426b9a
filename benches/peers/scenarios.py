"""The scenarios, by name.

A scenario is a row of hops, each a proxy of the same kind; CPU is counted over all of them. Where TLS is mutual, keys are
ECDSA P-256, the cipher is TLS_AES_256_GCM_SHA384 and the group X25519, for every proxy: the two unmeasured ends, an
nginx each, require it.
"""

from dataclasses import dataclass

HOSTS = 1000
LAST = f"svc-{HOSTS - 1}"


@dataclass(frozen=True)
class Hop:
    """The protocols towards client and server, and the configuration of the proxy."""

    tls_in: bool = False
    tls_out: bool = False
    # "http1", "grpc" (HTTP/2 without TLS) or "tcp", opaque.
    protocol: str = "http1"
    # Retries, ejection, limits, access log to a file, metrics, and 1 % traces where the proxy supports them.
    everything: bool = False
    # This many upstreams, each with its own host; 0: one for all.
    hosts: int = 0


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    hops: tuple
    # "wrk": requests over kept connections; "h2load": gRPC-like requests in streams; "bytes": bodies, counted in MB;
    # "idle": connections that stay open, memory is measured; "start": until the first response.
    load: str = "wrk"
    path: str = "/"
    host: str = ""
    connections: int = 64
    # Also at a fixed rate, for CPU and latency.
    rate: bool = False
    # Connections into the first hop, and from the last one to the server: "kept", or new for each request,
    # with a "full" or a "resumed" handshake.
    calling: str = "kept"
    serving: str = "kept"
    # With `--counted`: requests in a round. About what an instrumented proxy completes in two seconds on a quiet machine,
    # so that each scenario has the same share of the profile on a busy one.
    requests: int = 0
    # Outrigger a second time in the same run, with these hops.
    beside: tuple = ()


PLAIN, OUT, IN = Hop(), Hop(tls_out=True), Hop(tls_in=True)
BY_HOST = Hop(hosts=HOSTS)
GRPC, TCP = Hop(protocol="grpc"), Hop(protocol="tcp")
ONCE = {"connections": 16}

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("S1", "HTTP/1.1, 1 KiB, plaintext, 64 connections", (PLAIN,), rate=True, requests=32_000),
        Scenario("S2", "plain in, mTLS out", (OUT,), rate=True, requests=24_000),
        Scenario("S3", "mTLS in, plain out", (IN,), requests=24_000),
        Scenario("S4", "both hops, mTLS between", (OUT, IN), requests=13_000),
        Scenario("S5", "h2c, gRPC-like, 16 connections with 32 streams", (GRPC,), "h2load", rate=True, requests=24_000),
        Scenario("S6", "responses of 1 MiB, 16 connections", (PLAIN,), "bytes", "/1m", connections=16, requests=1200),
        Scenario("TCP", "opaque TCP, 8 connections", (TCP,), "bytes", "/16m", connections=8, requests=100),
        Scenario("S7", "S1 with everything on", (Hop(everything=True),), rate=True, requests=24_000),
        Scenario(
            "S8", f"S1 by one of {HOSTS:,} hosts, each with an upstream", (BY_HOST,), host=LAST, beside=(PLAIN,), requests=32_000
        ),
        Scenario(
            "in-full", "a connection with one request, mTLS in, full handshake", (IN,), calling="full", requests=1100, **ONCE
        ),
        Scenario("in-resumed", "the same, resumed", (IN,), calling="resumed", requests=1700, **ONCE),
        Scenario(
            "out-full", "a connection with one request, mTLS out, full handshake", (OUT,), serving="full", requests=900, **ONCE
        ),
        Scenario("out-resumed", "the same, resumed", (OUT,), serving="resumed", requests=1300, **ONCE),
        Scenario("idle", "idle plaintext connections", (PLAIN,), "idle", connections=1000),
        Scenario("idle-mtls", "idle mTLS connections", (IN,), "idle", connections=1000),
        Scenario("start", "start to the first response", (PLAIN,), "start"),
        Scenario("start-mtls", "the same by mTLS", (IN,), "start"),
        Scenario("start-hosts", f"the same with {HOSTS:,} upstreams", (BY_HOST,), "start", host=LAST),
    )
}
