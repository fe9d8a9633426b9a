"""How each proxy is set up for a hop: one thread, connections kept where the next one keeps them, no access log.

Each function starts one and returns its process and port. `to`: the port that it leads to.
"""

import json
import time

import ends

HAPROXY = """
global
  nbthread 1
  maxconn 8000
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 60s
  http-reuse always
frontend f
  bind 127.0.0.1:{port} backlog 4096 {tls_in}
  default_backend b
backend b
  server s 127.0.0.1:{to} {tls_out}
"""


def nginx(run, name, hop, to):
    port = run.free_port()
    tls_in = ends.server_tls(run.certs) if hop.tls_in else ""
    tls_out = ends.client_tls(run.certs) if hop.tls_out else ""
    process = ends.nginx(
        run,
        name,
        f"upstream up {{ server 127.0.0.1:{to}; keepalive 256; keepalive_requests 1000000000; }} "
        f"server {{ listen 127.0.0.1:{port}{' ssl' if hop.tls_in else ''} backlog=4096; {tls_in} "
        f"location / {{ proxy_pass {'https' if hop.tls_out else 'http'}://up; proxy_http_version 1.1; "
        f'proxy_set_header Connection ""; {tls_out} }} }}',
    )
    return process, port


def haproxy(run, name, hop, to):
    port = run.free_port()
    for who in ("payments", "checkout"):
        both = (run.certs / f"{who}.crt").read_text() + (run.certs / f"{who}.key").read_text()
        (run.certs / f"{who}.pem").write_text(both)
    ca = f"ca-file {run.certs}/ca.crt"
    tls_in = f"ssl crt {run.certs}/payments.pem {ca} verify required alpn http/1.1 ssl-min-ver TLSv1.3"
    tls_out = f"ssl crt {run.certs}/checkout.pem {ca} verify required verifyhost payments ssl-min-ver TLSv1.3"
    config = HAPROXY.format(
        port=port, to=to, tls_in=tls_in if hop.tls_in else "", tls_out=tls_out if hop.tls_out else ""
    )
    (run.folder / f"{name}.cfg").write_text(config)
    return run.start("haproxy", "-db", "-f", str(run.folder / f"{name}.cfg")), port


def envoy(run, name, hop, to):
    port = run.free_port()
    tls = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
    filters = "type.googleapis.com/envoy.extensions.filters."

    def socket(kind, who, more):
        file = lambda name: {"filename": str(run.certs / name)}
        common = {
            "tls_certificates": [{"certificate_chain": file(f"{who}.crt"), "private_key": file(f"{who}.key")}],
            "validation_context": {"trusted_ca": file("ca.crt")},
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3",
                           "ecdh_curves": ["X25519"]},
        }
        config = {"@type": f"{tls}{kind}TlsContext", "common_tls_context": common, **more}
        return {"name": "envoy.transport_sockets.tls", "typed_config": config}

    at = lambda port: {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    manager = {
        "@type": f"{filters}network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [
            {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "up"}}]}]},
        "http_filters": [{"name": "envoy.filters.http.router",
                          "typed_config": {"@type": f"{filters}http.router.v3.Router"}}],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    if hop.tls_in:
        chain["transport_socket"] = socket("Downstream", "payments", {"require_client_certificate": True})
    endpoint = {"endpoint": {"address": at(to)}}
    cluster = {"name": "up", "connect_timeout": "5s",
               "load_assignment": {"cluster_name": "up", "endpoints": [{"lb_endpoints": [endpoint]}]}}
    if hop.tls_out:
        cluster["transport_socket"] = socket("Upstream", "checkout", {"sni": "payments"})
    config = {"static_resources": {"listeners": [{"address": at(port), "filter_chains": [chain]}], "clusters": [cluster]}}
    path = run.folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return run.start("envoy", "-c", str(path), "--concurrency", "1", "-l", "off", "--use-dynamic-base-id"), port


def outrigger(run, name, hop, to):
    """With its shipped defaults: metrics, retries, budget, breaker, ejection, limits."""
    who = "payments" if hop.tls_in else "checkout"
    identity = "".join(f'{key} = "{run.certs}/{file}"\n' for key, file in
                       (("cert", f"{who}.crt"), ("key", f"{who}.key"), ("ca", "ca.crt")))
    expected = 'identity = ["spiffe://shop.example/ns/default/sa/payments"]\n' if hop.tls_out else ""
    # A folder of its own: it is watched for changes, and the others' files are opened all the time.
    own = run.folder / name
    own.mkdir()
    config, ready = own / "outrigger.toml", own / "ready.json"
    config.write_text(
        "[runtime]\nworkers = 1\n" + (f"[identity]\n{identity}" if hop.tls_in or hop.tls_out else "")
        + f'[inbound]\nlisten = "127.0.0.1:0"\nforward_to = "127.0.0.1:{to}"\n'
        + '[outbound]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n'
        + f'[[upstream]]\nname = "up"\nhosts = ["*"]\nendpoints = ["127.0.0.1:{to}"]\n{expected}'
    )
    process = run.start(run.binary, "run", "-c", str(config), "--ready-file", str(ready))
    for _ in range(1000):
        if ready.exists() and ready.read_text().strip():
            break
        time.sleep(0.01)
    bound = json.loads(ready.read_text())
    # A sidecar has a way in for each direction.
    way = "inbound" if hop.tls_in else "outbound"
    process.admin = int(bound["admin"].rsplit(":", 1)[1])
    return process, int(bound[way].rsplit(":", 1)[1])


PROXIES = {"nginx": nginx, "HAProxy": haproxy, "Envoy": envoy, "Outrigger": outrigger}
