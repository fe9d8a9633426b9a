//! Active health checks against the health service of gRPC's own library.

use std::net::SocketAddr;

use outrigger::{
    config::{HealthCheck, Protocol},
    units::HumanDuration,
    upstream::{
        DiscoveredEndpoint, Upstream,
        health::{self, CheckSettings},
    },
};

use crate::support::{Daemon, eventually, free_port, peer_script, python_with};

#[test]
fn grpc_health_checks_agree_with_the_grpcio_health_service() {
    let Some(python) = python_with("grpc_health") else { return };
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let script = peer_script("health_server.py");
    let port = address.port().to_string();
    let _server = Daemon::start(&python.display().to_string(), &[&script.display().to_string(), &port], &[])
        .listening(address);

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    for (service, expected) in [("", true), ("good", true), ("bad", false), ("nobody", false)] {
        let upstream = Upstream::new("grpc");
        upstream.publish(vec![DiscoveredEndpoint { address, host: None, weight: 1 }]);
        let endpoint = upstream.endpoints().endpoints[0].clone();
        // A check must reach the opposite verdict first, so that every verdict comes from a completed check.
        endpoint.set_healthy(!expected);
        let settings = HealthCheck {
            grpc: Some(service.to_owned()),
            interval: HumanDuration::from_millis(20),
            timeout: HumanDuration::from_secs(5),
            unhealthy_after: 2,
            healthy_after: 2,
            ..HealthCheck::default()
        };
        let _checks = health::spawn(
            CheckSettings { health: settings, protocol: Protocol::Auto, tls: None },
            upstream,
            runtime.handle(),
        );
        eventually(&format!("{service:?} healthy: {expected}"), || endpoint.is_healthy() == expected);
    }
}
