"""The unmeasured ends: servers with responses of 1 KiB and more, a mutual TLS client for wrk, which has none, a gRPC-like
server, a trace collector."""

import os
import shutil

ANSWER = "x" * 1024
# By path.
BODIES = {"0b": 0, "1k": 1 << 10, "16k": 16 << 10, "64k": 64 << 10, "256k": 256 << 10}
BODIES |= {"1m": 1 << 20, "4m": 4 << 20, "16m": 16 << 20}
CIPHER = "ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384; ssl_protocols TLSv1.3; ssl_ecdh_curve X25519;"

NGINX = """
{module}
daemon off; master_process off; pid {dir}/{name}.pid; error_log {dir}/{name}.log; worker_processes 1;
events {{ worker_connections {connections}; }}
{section} {{
  {kept}
  {body}
}}
"""
KEPT = """
  access_log off; keepalive_requests 1000000000; keepalive_timeout 1h; tcp_nopush on; sendfile on;
  client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c; uwsgi_temp_path {dir}/d;
  scgi_temp_path {dir}/e;
"""
STREAM = "load_module /usr/lib/nginx/modules/ngx_stream_module.so;"


def nginx_command(run, name, body, section="http", connections=8192):
    """The configuration of a one-process nginx with this http or stream section."""
    conf, log = run.folder / f"{name}.conf", run.folder / f"{name}.log"
    module, kept = (STREAM, "") if section == "stream" else ("", KEPT.format(dir=run.folder))
    conf.write_text(NGINX.format(
        dir=run.folder, name=name, body=body, section=section, kept=kept, module=module, connections=connections
    ))
    return ["nginx", "-c", str(conf), "-p", str(run.folder), "-e", str(log)]


def nginx(run, name, body, **more):
    return run.start(*nginx_command(run, name, body, **more))


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


def bodies(run):
    """The locations with responses of 1 KiB, and of other sizes by path."""
    folder = run.folder / "bodies"
    folder.mkdir()
    for name, size in BODIES.items():
        (folder / name).write_bytes(b"x" * size)
    return f'location / {{ return 200 "{ANSWER}"; }} location ~ ^/[0-9]+[kmb]$ {{ root {folder}; }}'


class Servers:
    """By TLS, and by connection reuse."""

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
        locations = bodies(run)
        blocks = ["open_file_cache max=100;"]
        for (tls, reuse), more in kinds.items():
            listen = f"listen 127.0.0.1:{self.ports[tls, reuse]}{' ssl' if tls else ''} backlog=4096;"
            blocks.append(
                f"server {{ {listen} {server_tls(run.certs) if tls else ''} {more} "
                f"{locations} }}"
            )
        nginx(run, "servers", "\n".join(blocks), connections=65536)
        for port in self.ports.values():
            run.wait_for(port)


def mtls_client(run, name, target, calling):
    """A port for wrk that forwards to `target` over mutual TLS."""
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
    """HTTP/2 without TLS that responds like a unary gRPC service at /call.grpc; and the arguments for h2load."""
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
    """Accepts traces over OTLP and drops them; the gRPC port."""
    tools = os.environ.get("OUTRIGGER_TOOLS", os.path.expanduser("~/.cache/outrigger"))
    rotel = shutil.which("rotel-agent") or f"{tools}/bin/rotel-agent"
    grpc, http = run.free_port(), run.free_port()
    ports = ["--otlp-grpc-endpoint", f"127.0.0.1:{grpc}", "--otlp-http-endpoint", f"127.0.0.1:{http}"]
    run.start(rotel, "start", *ports, "--exporter", "blackhole")
    run.wait_for(grpc)
    return grpc
