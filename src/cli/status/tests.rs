//! The text of `outrigger status`.

use super::*;

#[test]
fn the_status_is_rendered_as_text() {
    let status: Status = serde_json::from_value(serde_json::json!({
        "service": "checkout", "build": {"version": "0.1.0"}, "pid": 7, "uptime_seconds": 61,
        "phase": "running", "ready": true,
        "config": {"files": ["a.toml"], "loaded_seconds_ago": 5, "reloads": 1, "refused": 2,
                   "rejected": "a.toml:3: no such key", "restart_needed": ["inbound.listen"]},
        "listeners": {"outbound": ["127.0.0.1:4140", "[::1]:4140"], "inbound": ["[::]:4143"], "upstreams": {}, "admin": "127.0.0.1:4191"},
        "jwt": {"source": "https://id.example/jwks", "known": 2, "fetched": 1, "failed": 1, "last_seconds_ago": 61, "error": "refused"},
        "connections": {"inbound": {"open": 1, "total": 2}, "outbound": {"open": 3, "total": 4}},
        "workers": [{"connections": 3, "busy_ms": 61000}, {"connections": 1, "busy_ms": 999}],
        "ways": {"inbound": {"count": 3, "last_seconds_ago": 61}, "proxy": {"count": 0, "last_seconds_ago": null}},
        "traces": {"to": "http://c:4317 (OTLP over gRPC)", "sample": 0.1, "sample_errors": true, "waiting": 3, "queue": 2048,
                   "spans": {"exported": 11, "queue_full": 5, "failed": 6}, "last_error": "refused", "failed_seconds_ago": 61},
        "inbound": {"name": "checkout", "source": "[127.0.0.1:8080]", "discovery": "ready",
                    "endpoints": [{"address": "127.0.0.1:8080", "weight": 1, "state": "healthy", "success": 0.987,
                                   "last_error": "503"}],
                    "breaker": {"state": "closed", "mode": "off", "since_seconds_ago": 61, "why": "start", "until_in_seconds": null},
                    "budget": null, "limits": null, "retries": {}, "rejected": {}},
        "inbound_addresses": {"known": 3, "addresses": [{"name": "10.0.0.7:9090", "source": "[10.0.0.7:9090]", "discovery": "ready",
                    "endpoints": [{"address": "10.0.0.7:9090", "weight": 1, "state": "healthy"}],
                    "breaker": {"state": "open", "mode": "open", "since_seconds_ago": 1, "why": "by hand", "until_in_seconds": 8},
                    "budget": null, "limits": {"in_flight": 3, "pending": 0, "max_requests": 8, "connections": 2, "max_connections": 8},
                    "retries": {}, "rejected": {"limit_full": 4}}]},
        "upstreams": [{"name": "payments", "source": "dns://payments:80", "discovery": "failed: no such name",
                       "endpoints": [{"address": "10.0.0.1:80", "weight": 1, "state": "ejected", "until_in_seconds": 8}],
                       "breaker": {"state": "half_open", "mode": "auto", "since_seconds_ago": 2, "why": "time to try again", "until_in_seconds": null},
                       "budget": {"available": 7},
                       "limits": {"in_flight": 1, "pending": 0, "max_requests": 1024, "connections": 2, "max_connections": 4294967295_u32},
                       "retries": {"sent": 12, "budget": 3}, "rejected": {"breaker_open": 90},
                       "token": {"good_for_seconds": 61, "fetched": 2, "failed": 1, "error": "the token endpoint answered with 503"}}],
        "unknown": {"known": 7, "hosts": [], "not_found": {"count": 3, "last": ["no such name: paymets (NXDOMAIN)"]}},
        "queues": [{"name": "orders", "messages": {"queued": 12, "waiting": 1, "delivering": 5, "done": 70, "dead": 2, "cancelled": 0},
                        "bytes": 2048, "in_flight": 5, "oldest_seconds": 61, "paused": "connect_refused"}],
            "store": {"used_bytes": 40960, "failure": "the disk is full: nothing is accepted"},
            "access_log": {"mode": "errors", "written": 1, "dropped": 2, "failed": 0},
        "trouble": [{"ended_seconds_ago": 61, "direction": "outbound", "method": "GET", "upstream": "payments",
                     "status": 200, "attempts": 2, "trace_id": "0af7", "why": "10.0.0.1:80 answered 503, second attempt answered 200"}],
    }))
    .unwrap();
    let text = show(&status);
    for part in [
        "checkout: ready, up 1m1s",
        "traces: to http://c:4317 (OTLP over gRPC), 0.1 of those that start here and all that fail",
        "11 spans exported, 5 dropped, 6 failed; 3 of 2048 requests queued",
        "FAILING, 1m1s ago: refused",
        "a.toml:3: no such key",
        "inbound.listen",
        "tokens: 2 keys from https://id.example/jwks, fetched 1m1s ago\n  FAILING: refused",
        "payments  valid for 1m1s  the token endpoint answered with 503",
        "loaded 5s ago, 1 reload, 2 rejected",
        "0       3     1m1s\n1       1     0s",
        "127.0.0.1:4140 [::1]:4140",
        "dns://payments:80 (failed: no such name)",
        "admin     127.0.0.1:4191",
        "(the service)",
        "inbound      3         1m1s ago\nproxy        0         never",
        "ejected, restored in 8s",
        "healthy, 98 % succeed, last error 503",
        "half open for 2s (time to try again)  7             1 of 1024  0        2            budget 3, sent 12  breaker_open 90",
        "(the service)                   off",
        "(the service at 10.0.0.7:9090)  open for 1s (by hand), 8s left        off           3 of 8     0        2 of 8       ",
        "limit_full 4",
        "and 2 more addresses of the service",
        "and 7 more hosts that no upstream names",
        "orders  12      1        5           70    2     1m1s    paused: connect_refused",
        "store: FAILING, the disk is full: nothing is accepted",
        "five minutes:\n  no such name: paymets (NXDOMAIN)\n  and 2 more",
        "access log: 2 lines were not read in time, 0 could not be written",
        "1m1s ago       outbound GET  payments  200       2         10.0.0.1:80 answered 503, second attempt answered 200",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
}
