"""What is measured, by name.

A scenario is a row of hops, each a proxy of the same kind; CPU is counted over all of them. Where TLS is mutual, keys are
ECDSA P-256, the cipher is TLS_AES_256_GCM_SHA384 and the group X25519, whoever is measured: the two ends that are not, an
nginx each, insist.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hop:
    """Whether TLS is spoken to the caller, and to the next one."""

    tls_in: bool = False
    tls_out: bool = False


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    hops: tuple
    # Of connections into the first hop, and from the last one to the server: "kept", or made anew for each request,
    # with a "full" or a "resumed" handshake.
    calling: str = "kept"
    serving: str = "kept"
    connections: int = 64
    # Connections that stay open and idle: memory is measured, not CPU.
    idle: int = 0


PLAIN, OUT, IN = Hop(), Hop(tls_out=True), Hop(tls_in=True)

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("S1", "HTTP/1.1, 1 KiB, plaintext", (PLAIN,)),
        Scenario("S2", "plain in, mTLS out", (OUT,)),
        Scenario("S3", "mTLS in, plain out", (IN,)),
        Scenario("S4", "both hops, mTLS between", (OUT, IN)),
        Scenario("in-full", "a connection with one request, mTLS in, full handshake", (IN,), calling="full", connections=16),
        Scenario("in-resumed", "the same, resumed", (IN,), calling="resumed", connections=16),
        Scenario("out-full", "a connection with one request, mTLS out, full handshake", (OUT,), serving="full", connections=16),
        Scenario("out-resumed", "the same, resumed", (OUT,), serving="resumed", connections=16),
        Scenario("idle", "idle plaintext connections", (PLAIN,), idle=1000),
        Scenario("idle-mtls", "idle mTLS connections", (IN,), idle=1000),
    )
}
