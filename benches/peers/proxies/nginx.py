import ends

from .prepared import Prepared, hosts

POOL = "keepalive 256; keepalive_requests 1000000000;"
# The nearest to the others' policies; nginx has no traces.
EVERYTHING = (
    "access_log {log}; proxy_next_upstream error timeout http_502 http_503 http_504; proxy_next_upstream_tries 3; "
    "limit_conn all 1024; "
)


def prepare(stage, name, hop, to, collector):
    port = stage.free_port()
    listen = f"listen 127.0.0.1:{port} backlog=4096"
    if hop.protocol == "tcp":
        return Prepared(ends.nginx_command(stage, name, f"server {{ {listen}; proxy_pass 127.0.0.1:{to}; }}", "stream"), port)
    if hop.protocol == "grpc":
        body = f"http2_max_concurrent_streams 1024; upstream up {{ server 127.0.0.1:{to}; {POOL} }} "
        body += f"server {{ {listen} http2; location / {{ grpc_pass grpc://up; }} }}"
        return Prepared(ends.nginx_command(stage, name, body), port)
    more = EVERYTHING.format(log=stage.folder / f"{name}-access.log") if hop.everything else ""
    tls_in = ends.server_tls(stage.certs) if hop.tls_in else ""
    tls_out = ends.client_tls(stage.certs) if hop.tls_out else ""
    scheme = "https" if hop.tls_out else "http"

    def server(upstream, names):
        return (
            f"upstream {upstream} {{ server 127.0.0.1:{to} max_fails=5 fail_timeout=10s; {POOL} }} "
            f"server {{ {listen}{' ssl' if hop.tls_in else ''}; {names} {tls_in} location / {{ {more} "
            # Otherwise large responses are buffered on disk.
            f"proxy_max_temp_file_size 0; proxy_pass {scheme}://{upstream}; proxy_http_version 1.1; "
            f'proxy_set_header Connection ""; {tls_out} }} '
            f"location = /nginx-status {{ stub_status; }} }}"
        )

    servers = [server(host, f"server_name {host};") for host in hosts(hop)] or [server("up", "")]
    # The backlog may be set only once.
    servers[1:] = [one.replace(" backlog=4096", "") for one in servers[1:]]
    zone = "limit_conn_zone $server_name zone=all:1m; server_names_hash_max_size 16384; "
    return Prepared(ends.nginx_command(stage, name, zone + "\n".join(servers)), port)
