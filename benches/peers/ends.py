"""What is not measured: servers with answers of 1 KiB, callers by mutual TLS for wrk, which has none, a gRPC-like server, a
collector of traces."""

import os
import shutil

ANSWER = "x" * 1024
CIPHER = "ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384; ssl_protocols TLSv1.3; ssl_ecdh_curve X25519;"

NGINX = """
daemon off; master_process off; pid {dir}/{name}.pid; error_log {dir}/{name}.log; worker_processes 1;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;
  client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c; uwsgi_temp_path {dir}/d;
  scgi_temp_path {dir}/e;
  {body}
}}
"""


def nginx(run, name, body):
    """An nginx of one process, with this in its http section."""
    (run.folder / f"{name}.conf").write_text(NGINX.format(dir=run.folder, name=name, body=body))
    conf, log = str(run.folder / f"{name}.conf"), str(run.folder / f"{name}.log")
    return run.start("nginx", "-c", conf, "-p", str(run.folder), "-e", log)


def server_tls(certs):
    return (
        f"ssl_certificate {certs}/payments.crt; ssl_certificate_key {certs}/payments.key; {CIPHER} "
        f"ssl_client_certificate {certs}/ca.crt; ssl_verify_client on;"
    )


def client_tls(certs):
    return (
        f"proxy_ssl_certificate {certs}/checkout.crt; proxy_ssl_certificate_key {certs}/checkout.key; "
        f"proxy_ssl_trusted_certificate {certs}/ca.crt; proxy_ssl_verify on; proxy_ssl_name payments; "
        "proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3;"
    )


class Servers:
    """By whether TLS is spoken, and what becomes of connections."""

    def __init__(self, run):
        kept, closing = "", "keepalive_timeout 0;"
        no_tickets = "ssl_session_tickets off; ssl_session_cache off;"
        kinds = {
            (False, "kept"): kept,
            (True, "kept"): kept,
            (True, "full"): closing + no_tickets,
            (True, "resumed"): closing,
        }
        self.ports = {kind: run.free_port() for kind in kinds}
        blocks = []
        for (tls, reuse), more in kinds.items():
            listen = f"listen 127.0.0.1:{self.ports[tls, reuse]}{' ssl' if tls else ''} backlog=4096;"
            blocks.append(
                f"server {{ {listen} {server_tls(run.certs) if tls else ''} {more} "
                f'location / {{ return 200 "{ANSWER}"; }} }}'
            )
        self.process = nginx(run, "servers", "\n".join(blocks))
        for port in self.ports.values():
            run.wait_for(port)


def caller(run, name, target, calling):
    """A port for wrk that leads to `target` by mutual TLS."""
    port = run.free_port()
    kept = calling == "kept"
    pool = "keepalive 256; keepalive_requests 1000000000;" if kept else ""
    cipher = "proxy_ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;"
    reuse = f"proxy_ssl_session_reuse {'off' if calling == 'full' else 'on'};"
    connection = '""' if kept else "close"
    nginx(
        run,
        name,
        f"upstream up {{ server 127.0.0.1:{target}; {pool} }} server {{ listen 127.0.0.1:{port} backlog=4096; "
        f"location / {{ proxy_pass https://up; proxy_http_version 1.1; proxy_set_header Connection {connection}; "
        f"proxy_set_header Host payments; {client_tls(run.certs)} {cipher} {reuse} }} }}",
    )
    run.wait_for(port)
    return port


# A message of 5 + 95 bytes each way.
MESSAGE = bytes([0, 0, 0, 0, 95]) + b"x" * 95
GRPC_CALL = ["-d", "{message}", "-H", "content-type: application/grpc", "-H", "te: trailers"]


def grpc_server(run):
    """HTTP/2 without TLS, answers like a unary gRPC service at /call.grpc; and what h2load is told to call it so."""
    folder, port = run.folder / "grpc", run.free_port()
    folder.mkdir()
    (folder / "call.grpc").write_bytes(MESSAGE)
    (folder / "types").write_text("application/grpc grpc\n")
    run.start(
        "nghttpd", "--no-tls", "--no-content-length", "-a", "127.0.0.1", "-d", str(folder), "-m", "1024",
        "--mime-types-file", str(folder / "types"), "--trailer", "grpc-status: 0", str(port),
    )
    run.wait_for(port)
    return port, [part.format(message=folder / "call.grpc") for part in GRPC_CALL]


def collector(run):
    """Takes traces by OTLP and forgets them; the port for gRPC."""
    tools = os.environ.get("OUTRIGGER_TOOLS", os.path.expanduser("~/.cache/outrigger"))
    rotel = shutil.which("rotel-agent") or f"{tools}/bin/rotel-agent"
    grpc, http = run.free_port(), run.free_port()
    ports = ["--otlp-grpc-endpoint", f"127.0.0.1:{grpc}", "--otlp-http-endpoint", f"127.0.0.1:{http}"]
    run.start(rotel, "start", *ports, "--exporter", "blackhole")
    run.wait_for(grpc)
    return grpc
