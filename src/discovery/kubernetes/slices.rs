//! EndpointSlices (`discovery.k8s.io/v1`): which of their endpoints to use, with address, weight and priority.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::Deserialize;

use super::super::source::UnresolvedEndpoint;
use crate::config::HostPort;

/// How much more often an endpoint with a hint for this zone is chosen. Others are used when those fail.
const SAME_ZONE: u32 = 100;
/// The priority of terminating endpoints that still serve: used only if there are no others.
const TERMINATING: u16 = 1;

/// A list, as far as it is used here.
#[derive(Debug, Deserialize)]
pub struct SliceList {
    pub metadata: Metadata,
    #[serde(default)]
    pub items: Vec<EndpointSlice>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Metadata {
    pub name: String,
    pub resource_version: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    pub metadata: Metadata,
    #[serde(default)]
    endpoints: Option<Vec<Endpoint>>,
    #[serde(default)]
    ports: Option<Vec<Port>>,
}

#[derive(Debug, Deserialize)]
struct Endpoint {
    addresses: Vec<String>,
    #[serde(default)]
    conditions: Conditions,
    #[serde(default)]
    hints: Option<Hints>,
}

#[derive(Debug, Default, Deserialize)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Hints {
    #[serde(default)]
    for_zones: Option<Vec<Zone>>,
}

#[derive(Debug, Deserialize)]
struct Zone {
    name: String,
}

#[derive(Debug, Deserialize)]
struct Port {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    protocol: Option<String>,
    #[serde(default)]
    port: Option<u16>,
}

/// An event of a watch.
#[derive(Debug, Deserialize)]
pub struct WatchEvent {
    #[serde(rename = "type")]
    pub kind: EventKind,
    pub object: serde_json::Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EventKind {
    Added,
    Modified,
    Deleted,
    Bookmark,
    Error,
    /// Of a later version.
    #[serde(other)]
    Unknown,
}

/// The fields of a `Status` object that are used here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ApiStatus {
    pub message: String,
    pub code: u16,
}

/// The endpoints of one service's port, by slice. Nothing else of the slices is stored.
#[derive(Debug)]
pub struct ServiceSlices {
    port: String,
    /// The zone of this proxy.
    zone: Option<String>,
    slices: BTreeMap<String, SliceEndpoints>,
}

/// The endpoints of one slice.
#[derive(Debug, Default, PartialEq)]
struct SliceEndpoints {
    targets: Vec<UnresolvedEndpoint>,
    /// Its ports, if the configured one is not among them.
    other_ports: Option<String>,
}

/// There are endpoints, but none has the configured port.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no port `{port}` over TCP; its endpoints have {available}. EndpointSlices do not contain the port numbers of the \
     Service itself: write the port's name, or the number on which the pods listen"
)]
pub struct NoSuchPort {
    port: String,
    available: String,
}

impl ServiceSlices {
    pub fn new(port: String, zone: Option<String>) -> Self {
        Self { port, zone, slices: BTreeMap::new() }
    }

    /// Replaces everything by a whole list.
    pub fn replace(&mut self, slices: &[EndpointSlice]) {
        self.slices.clear();
        for slice in slices {
            self.update(slice);
        }
    }

    /// Applies one slice; returns whether it changed anything.
    pub fn update(&mut self, slice: &EndpointSlice) -> bool {
        let endpoints = self.endpoints_of(slice);
        let changed = self.slices.get(&slice.metadata.name) != Some(&endpoints);
        self.slices.insert(slice.metadata.name.clone(), endpoints);
        changed
    }

    /// Removes one slice; returns whether it changed anything.
    pub fn remove(&mut self, name: &str) -> bool {
        self.slices.remove(name).is_some_and(|endpoints| endpoints != SliceEndpoints::default())
    }

    /// All endpoints to use.
    ///
    /// # Errors
    ///
    /// If there are endpoints, but none has the port.
    pub fn targets(&self) -> Result<Vec<UnresolvedEndpoint>, NoSuchPort> {
        let targets: Vec<UnresolvedEndpoint> =
            self.slices.values().flat_map(|slice| &slice.targets).cloned().collect();
        match self.slices.values().find_map(|slice| slice.other_ports.clone()) {
            Some(available) if targets.is_empty() => Err(NoSuchPort { port: self.port.clone(), available }),
            _ => Ok(targets),
        }
    }

    fn endpoints_of(&self, slice: &EndpointSlice) -> SliceEndpoints {
        let ports = slice.ports.as_deref().unwrap_or_default();
        let endpoints = || slice.endpoints.iter().flatten();
        match self.port(ports) {
            Some(port) => {
                let targets = endpoints().filter_map(|endpoint| self.target(endpoint, port)).collect();
                SliceEndpoints { targets, other_ports: None }
            }
            None if endpoints().next().is_some() => {
                SliceEndpoints { other_ports: Some(describe_ports(ports)), ..SliceEndpoints::default() }
            }
            None => SliceEndpoints::default(),
        }
    }

    /// By name, else by number; if a service has one port, the number may also be that of the service.
    fn port(&self, ports: &[Port]) -> Option<u16> {
        let tcp: Vec<&Port> =
            ports.iter().filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP").collect();
        let named = tcp.iter().find(|port| port.name.as_deref() == Some(self.port.as_str()));
        let number = self.port.parse::<u16>().ok();
        let numbered = || tcp.iter().find(|port| number.is_some() && port.port == number);
        let only = || if let ([only], Some(_)) = (&tcp[..], number) { Some(only) } else { None };
        named.or_else(numbered).or_else(only).and_then(|port| port.port)
    }

    /// `None`: it is not used.
    fn target(&self, endpoint: &Endpoint, port: u16) -> Option<UnresolvedEndpoint> {
        let Conditions { ready, serving } = endpoint.conditions;
        // Unspecified readiness counts as ready, as the API documents it.
        let ready = ready.unwrap_or(true);
        if !ready && !serving.unwrap_or(ready) {
            return None;
        }
        // All addresses of an endpoint are equivalent; the API documents that consumers use the first.
        let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        let zones = endpoint.hints.iter().flat_map(|hints| hints.for_zones.iter().flatten());
        let is_same_zone =
            self.zone.as_ref().is_some_and(|own| zones.into_iter().any(|zone| zone.name == *own));
        let address = SocketAddr::new(ip, port);
        let target = UnresolvedEndpoint::new(
            HostPort::new(ip.to_string(), port),
            if is_same_zone { SAME_ZONE } else { 1 },
        );
        Some(UnresolvedEndpoint {
            priority: if ready { 0 } else { TERMINATING },
            known_addresses: vec![address.ip()],
            ..target
        })
    }
}

/// The most ports in an error message; a service has one or two.
const MAX_PORTS_SHOWN: usize = 8;

fn describe_ports(ports: &[Port]) -> String {
    let each = ports.iter().take(MAX_PORTS_SHOWN).map(|port| {
        let name = port.name.as_deref().filter(|name| !name.is_empty()).map(|name| format!("`{name}` "));
        let number = port.port.map_or_else(|| "any".to_owned(), |number| number.to_string());
        format!("{}{number}/{}", name.unwrap_or_default(), port.protocol.as_deref().unwrap_or("TCP"))
    });
    let all: Vec<String> = each.collect();
    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn slice(name: &str, endpoints: serde_json::Value, ports: serde_json::Value) -> EndpointSlice {
        let slice = json!({"metadata": {"name": name}, "addressType": "IPv4", "endpoints": endpoints, "ports": ports});
        serde_json::from_value(slice).unwrap()
    }

    fn describe(slices: &ServiceSlices) -> Vec<String> {
        let text =
            |target: UnresolvedEndpoint| format!("{}*{}@{}", target.address, target.weight, target.priority);
        slices.targets().into_iter().flatten().map(text).collect()
    }

    #[test]
    fn ready_endpoints_are_used_and_terminating_ones_as_a_last_resort() {
        let mut slices = ServiceSlices::new("http".to_owned(), None);
        let endpoint = |last: u8, conditions: serde_json::Value| {
            let address = format!("10.0.0.{last}");
            json!({"addresses": [address], "conditions": conditions})
        };
        let all = json!([
            endpoint(1, json!({"ready": true, "serving": true, "terminating": false})),
            endpoint(2, json!({})),
            endpoint(3, json!({"ready": false, "serving": true, "terminating": true})),
            endpoint(4, json!({"ready": false, "serving": false, "terminating": true})),
            endpoint(5, json!({"ready": false})),
            json!({"addresses": ["10.0.0.6"]}),
            json!({"addresses": []}),
        ]);
        let ports = json!([{"name": "http", "protocol": "TCP", "port": 8080}]);
        assert!(slices.update(&slice("a", all.clone(), ports.clone())));
        assert_eq!(
            describe(&slices),
            ["10.0.0.1:8080*1@0", "10.0.0.2:8080*1@0", "10.0.0.3:8080*1@1", "10.0.0.6:8080*1@0"]
        );
        assert!(!slices.update(&slice("a", all, ports)), "nothing has changed");
        assert!(slices.remove("a") && !slices.remove("a"));
        assert!(!slices.update(&slice("b", json!(null), json!(null))) || describe(&slices).is_empty());
    }

    #[test]
    fn ports_have_names_or_numbers() {
        let ports = json!([
            {"name": "http", "port": 8080},
            {"name": "dns", "protocol": "UDP", "port": 53},
            {"name": "grpc", "port": 9090},
        ]);
        let one = json!([{"name": "", "port": 8080}]);
        for (asked, ports, expected) in [
            ("http", &ports, Some("10.0.0.1:8080*1@0")),
            ("9090", &ports, Some("10.0.0.1:9090*1@0")),
            ("dns", &ports, None),
            ("53", &ports, None),
            ("80", &ports, None),
            ("80", &one, Some("10.0.0.1:8080*1@0")),
            ("http", &one, None),
        ] {
            let mut slices = ServiceSlices::new(asked.to_owned(), None);
            slices.update(&slice("a", json!([{"addresses": ["10.0.0.1"]}]), ports.clone()));
            assert_eq!(describe(&slices).first().map(String::as_str), expected, "{asked} of {ports}");
        }
    }

    #[test]
    fn a_missing_port_is_reported_with_the_available_ones() {
        let ports = json!([{"name": "http", "port": 8080}, {"name": "dns", "protocol": "UDP", "port": 53}]);
        let endpoints = json!([{"addresses": ["10.0.0.1"]}]);
        let mut slices = ServiceSlices::new("80".to_owned(), None);
        assert_eq!(slices.targets().ok(), Some(Vec::new()), "no endpoint yet");
        slices.update(&slice("a", json!(null), ports.clone()));
        assert_eq!(slices.targets().ok(), Some(Vec::new()), "no endpoint now");
        slices.update(&slice(
            "a",
            endpoints.clone(),
            json!([{"name": "a", "port": 1}, {"name": "b", "port": 2}]),
        ));
        assert!(slices.update(&slice(
            "a",
            endpoints.clone(),
            json!([{"name": "http", "port": 8080}, {"name": "b", "port": 2}])
        )));
        let error = slices.targets().unwrap_err().to_string();
        assert!(error.contains("no port `80`") && error.contains("`http` 8080/TCP, `b` 2/TCP"), "{error}");
        // Another slice has the port: a rollout may change it.
        slices.update(&slice("b", endpoints, json!([{"name": "x", "port": 80}, {"name": "y", "port": 81}])));
        assert_eq!(describe(&slices), ["10.0.0.1:80*1@0"]);
        assert!(slices.remove("b") && slices.targets().is_err() && slices.remove("a"));
    }

    #[test]
    fn endpoints_for_this_zone_weigh_more() {
        let mut slices = ServiceSlices::new("80".to_owned(), Some("a".to_owned()));
        let hinted = |address: &str, zones: &[&str]| {
            let zones: Vec<_> = zones.iter().map(|zone| json!({"name": zone})).collect();
            json!({"addresses": [address], "hints": {"forZones": zones}})
        };
        let endpoints =
            json!([hinted("10.0.0.1", &["a"]), hinted("10.0.0.2", &["b", "a"]), hinted("fd00::3", &["b"])]);
        slices.update(&slice("a", endpoints, json!([{"port": 80}])));
        assert_eq!(describe(&slices), ["10.0.0.1:80*100@0", "10.0.0.2:80*100@0", "[fd00::3]:80*1@0"]);
    }
}
