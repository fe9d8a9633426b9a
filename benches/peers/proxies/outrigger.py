"""With its shipped defaults: metrics, retries, budget, breaker, ejection, limits."""

from .prepared import Prepared, hosts


def prepare(stage, name, hop, to, collector):
    identity = "payments" if hop.tls_in else "checkout"
    inbound, outbound, admin, own_port = (stage.free_port() for _ in range(4))
    # Its own folder, since it is watched for changes and the others' files are opened all the time.
    own = stage.folder / name
    own.mkdir()
    lines = ["[runtime]", "workers = 1"]
    if hop.tls_in or hop.tls_out:
        lines += ["[identity]", f'cert = "{stage.certs}/{identity}.crt"', f'key = "{stage.certs}/{identity}.key"']
        lines += [f'ca = "{stage.certs}/ca.crt"']
    lines += ["[inbound]", f'listen = "127.0.0.1:{inbound}"', f'forward_to = "127.0.0.1:{to}"']
    lines += ["[outbound]", f'listen = "127.0.0.1:{outbound}"', "[admin]", f'listen = "127.0.0.1:{admin}"']
    if hop.everything:
        lines += ["[telemetry]", 'access_log = "all"', f'access_log_file = "{own}.log"']
        lines += [f'otlp = "http://127.0.0.1:{collector}"', "sample = 0.01", 'protocol = "grpc"']
    for one in hosts(hop) or ["up"]:
        lines += ["[[upstream]]", f'name = "{one}"', f'endpoints = ["127.0.0.1:{to}"]']
        if not hop.hosts:
            lines += ['hosts = ["*"]']
        if hop.tls_out:
            lines += ['identity = ["spiffe://shop.example/ns/default/sa/payments"]']
        if hop.protocol == "tcp":
            lines += ['protocol = "tcp"', f'listen = "127.0.0.1:{own_port}"']
    (own / "outrigger.toml").write_text("\n".join(lines) + "\n")
    # A sidecar has a listener for each direction, and may have one for an upstream.
    port = inbound if hop.tls_in else own_port if hop.protocol == "tcp" else outbound
    return Prepared([stage.binary, "run", "-c", str(own / "outrigger.toml")], port, admin)
