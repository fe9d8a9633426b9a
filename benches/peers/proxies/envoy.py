import json

from .prepared import Prepared, hosts

TYPE = "type.googleapis.com/envoy."
TLS = f"{TYPE}extensions.transport_sockets.tls.v3."
FILTERS = f"{TYPE}extensions.filters."
HTTP2 = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
    "@type": f"{TYPE}extensions.upstreams.http.v3.HttpProtocolOptions",
    "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 1024}},
}}


def at(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def tls(stage, kind, identity, more):
    file = lambda name: {"filename": str(stage.certs / name)}
    common = {
        "tls_certificates": [{"certificate_chain": file(f"{identity}.crt"), "private_key": file(f"{identity}.key")}],
        "validation_context": {"trusted_ca": file("ca.crt")},
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3",
                       "ecdh_curves": ["X25519"]},
    }
    config = {"@type": f"{TLS}{kind}TlsContext", "common_tls_context": common, **more}
    return {"name": "envoy.transport_sockets.tls", "typed_config": config}


def cluster(stage, hop, name, to):
    found = {"name": name, "connect_timeout": "5s", "load_assignment": {
        "cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at(to)}}]}]}}
    if hop.tls_out:
        found["transport_socket"] = tls(stage, "Upstream", "checkout", {"sni": "payments"})
    if hop.protocol == "grpc":
        found["typed_extension_protocol_options"] = HTTP2
    if hop.everything:
        found["outlier_detection"] = {"consecutive_5xx": 5, "base_ejection_time": "10s"}
        found["circuit_breakers"] = {"thresholds": [
            {"max_connections": 1024, "max_requests": 1024, "max_pending_requests": 256, "max_retries": 100}]}
    return found


def manager(stage, hop, name):
    retry = {"retry_on": "5xx,reset,connect-failure", "num_retries": 2} if hop.everything else None
    route = lambda to: {"match": {"prefix": "/"}, "route": {"cluster": to, **({"retry_policy": retry} if retry else {})}}
    named = [{"name": host, "domains": [host, f"{host}:*"], "routes": [route(host)]} for host in hosts(hop)]
    found = {
        "@type": f"{FILTERS}network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": named or [{"name": "all", "domains": ["*"], "routes": [route("up")]}]},
        "http_filters": [{"name": "envoy.filters.http.router",
                          "typed_config": {"@type": f"{FILTERS}http.router.v3.Router"}}],
    }
    if hop.protocol == "grpc":
        found["codec_type"] = "HTTP2"
    if hop.everything:
        found["access_log"] = [{"name": "envoy.access_loggers.file", "typed_config": {
            "@type": f"{TYPE}extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(stage.folder / f"{name}-access.log")}}]
        found["tracing"] = {"random_sampling": {"value": 1}, "provider": {
            "name": "envoy.tracers.opentelemetry", "typed_config": {
                "@type": f"{TYPE}config.trace.v3.OpenTelemetryConfig", "service_name": "bench",
                "grpc_service": {"envoy_grpc": {"cluster_name": "collector"}}}}}
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": found}


def prepare(stage, name, hop, to, collector):
    port = stage.free_port()
    if hop.protocol == "tcp":
        proxy = {"@type": f"{FILTERS}network.tcp_proxy.v3.TcpProxy", "stat_prefix": "in", "cluster": "up"}
        chain = {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}
    else:
        chain = {"filters": [manager(stage, hop, name)]}
    if hop.tls_in:
        chain["transport_socket"] = tls(stage, "Downstream", "payments", {"require_client_certificate": True})
    clusters = [cluster(stage, hop, one, to) for one in hosts(hop) or ["up"]]
    if hop.everything:
        clusters.append({**cluster(stage, hop, "collector", collector), "typed_extension_protocol_options": HTTP2})
    listener = {"address": at(port), "filter_chains": [chain], "tcp_backlog_size": 4096}
    path = stage.folder / f"{name}.json"
    path.write_text(json.dumps({"static_resources": {"listeners": [listener], "clusters": clusters}}))
    return Prepared(["envoy", "-c", str(path), "--concurrency", "1", "-l", "off", "--use-dynamic-base-id"], port)
