from .prepared import Prepared, hosts

CONFIG = """
global
  nbthread 1
  maxconn 8000
  {log}
defaults
  mode {mode}
  timeout connect 5s
  timeout client 1h
  timeout server 60s
  {more}
frontend f
  bind 127.0.0.1:{port} backlog 4096 {tls_in}
  {routes}
{backends}
"""
# It logs to a descriptor, which here is a file; it has no traces. Metrics are its own counters.
EVERYTHING = """log global
  option httplog
  retries 2
  option redispatch
  retry-on conn-failure empty-response response-timeout 502 503 504"""


def prepare(stage, name, hop, to, collector):
    port = stage.free_port()
    for identity in ("payments", "checkout"):
        both = (stage.certs / f"{identity}.crt").read_text() + (stage.certs / f"{identity}.key").read_text()
        (stage.certs / f"{identity}.pem").write_text(both)
    ca = f"ca-file {stage.certs}/ca.crt"
    tls_in = f"ssl crt {stage.certs}/payments.pem {ca} verify required alpn http/1.1 ssl-min-ver TLSv1.3"
    tls_out = f"ssl crt {stage.certs}/checkout.pem {ca} verify required verifyhost payments ssl-min-ver TLSv1.3"
    server = f"server s 127.0.0.1:{to}"
    if hop.tls_out:
        server += f" {tls_out}"
    if hop.protocol == "grpc":
        server += " proto h2"
    if hop.everything:
        server += " check inter 10s observe layer7 error-limit 5 on-error mark-down maxconn 1024"
    routes, backends = "default_backend b", f"backend b\n  {server}\n"
    if hop.hosts:
        table = stage.folder / f"{name}.map"
        table.write_text("".join(f"{host} {host}\n" for host in hosts(hop)))
        routes = f"use_backend %[req.hdr(host),field(1,:),lower,map({table})]"
        backends = "".join(f"backend {host}\n  {server}\n" for host in hosts(hop))
    mode = "tcp" if hop.protocol == "tcp" else "http"
    config = CONFIG.format(
        port=port,
        mode=mode,
        log="log stdout format raw local0" if hop.everything else "",
        more=(EVERYTHING if hop.everything else "") + ("" if mode == "tcp" else "\n  http-reuse always"),
        tls_in=tls_in if hop.tls_in else "proto h2" if hop.protocol == "grpc" else "",
        routes=routes,
        backends=backends,
    )
    path = stage.folder / f"{name}.cfg"
    path.write_text(config)
    return Prepared(["haproxy", "-db", "-f", str(path)], port)
