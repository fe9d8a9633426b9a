//! EndpointSlices (`discovery.k8s.io/v1`): which of their endpoints may be called, where, and how gladly.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::Deserialize;

use super::super::source::Target;
use crate::config::HostPort;

/// How much more often an endpoint is chosen that is meant for callers of this zone. Others stay for when those fail.
const SAME_ZONE: u32 = 100;
/// Of endpoints that are on their way out and still serve: called only where there are no others.
const LEAVING: u16 = 1;

/// A list, as far as it matters here.
#[derive(Debug, Deserialize)]
pub struct List {
    pub metadata: Metadata,
    #[serde(default)]
    pub items: Vec<Slice>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Metadata {
    pub name: String,
    pub resource_version: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Slice {
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

/// What happened, as a watch tells it.
#[derive(Debug, Deserialize)]
pub struct Event {
    #[serde(rename = "type")]
    pub kind: Kind,
    pub object: serde_json::Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Kind {
    Added,
    Modified,
    Deleted,
    Bookmark,
    Error,
    /// Of a later version.
    #[serde(other)]
    Unknown,
}

/// What a failure says of itself (`Status`).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Failure {
    pub message: String,
    pub code: u16,
}

/// The endpoints of one service's port, by slice; nothing else of the slices is kept.
#[derive(Debug)]
pub struct Slices {
    port: String,
    /// Where this proxy runs.
    zone: Option<String>,
    found: BTreeMap<String, Found>,
}

/// What a slice has.
#[derive(Debug, Default, PartialEq)]
struct Found {
    targets: Vec<Target>,
    /// Its ports, where the one that is asked for is not among them.
    other_ports: Option<String>,
}

/// Endpoints that would be called, were it not for the port.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no port `{port}` over TCP; its endpoints have {there}. Slices do not tell a Service's own numbers: write the port's name, or the number where the pods listen"
)]
pub struct NoSuchPort {
    port: String,
    there: String,
}

impl Slices {
    pub fn new(port: String, zone: Option<String>) -> Self {
        Self { port, zone, found: BTreeMap::new() }
    }

    /// Takes a whole list in the place of what was known.
    pub fn replace(&mut self, slices: &[Slice]) {
        self.found.clear();
        for slice in slices {
            self.update(slice);
        }
    }

    /// Takes one slice; whether that changed anything.
    pub fn update(&mut self, slice: &Slice) -> bool {
        let found = self.of(slice);
        let changed = self.found.get(&slice.metadata.name) != Some(&found);
        self.found.insert(slice.metadata.name.clone(), found);
        changed
    }

    /// Forgets one; whether that changed anything.
    pub fn remove(&mut self, name: &str) -> bool {
        self.found.remove(name).is_some_and(|found| found != Found::default())
    }

    /// All that may be called.
    ///
    /// # Errors
    ///
    /// Where there are endpoints, and none has the port.
    pub fn targets(&self) -> Result<Vec<Target>, NoSuchPort> {
        let targets: Vec<Target> = self.found.values().flat_map(|found| &found.targets).cloned().collect();
        match self.found.values().find_map(|found| found.other_ports.clone()) {
            Some(there) if targets.is_empty() => Err(NoSuchPort { port: self.port.clone(), there }),
            _ => Ok(targets),
        }
    }

    fn of(&self, slice: &Slice) -> Found {
        let ports = slice.ports.as_deref().unwrap_or_default();
        let endpoints = || slice.endpoints.iter().flatten();
        match self.port(ports) {
            Some(port) => {
                let targets = endpoints().filter_map(|endpoint| self.target(endpoint, port)).collect();
                Found { targets, other_ports: None }
            }
            None if endpoints().next().is_some() => {
                Found { other_ports: Some(told(ports)), ..Found::default() }
            }
            None => Found::default(),
        }
    }

    /// By its name, else by its number; the number of a service with one port may be the service's own.
    fn port(&self, ports: &[Port]) -> Option<u16> {
        let tcp: Vec<&Port> =
            ports.iter().filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP").collect();
        let named = tcp.iter().find(|port| port.name.as_deref() == Some(self.port.as_str()));
        let number = self.port.parse::<u16>().ok();
        let numbered = || tcp.iter().find(|port| number.is_some() && port.port == number);
        let only = || if let ([only], Some(_)) = (&tcp[..], number) { Some(only) } else { None };
        named.or_else(numbered).or_else(only).and_then(|port| port.port)
    }

    /// `None`: it is not to be called.
    fn target(&self, endpoint: &Endpoint, port: u16) -> Option<Target> {
        let Conditions { ready, serving } = endpoint.conditions;
        // What is not said is taken for good (the API's own words).
        let ready = ready.unwrap_or(true);
        if !ready && !serving.unwrap_or(ready) {
            return None;
        }
        // All addresses of an endpoint are one and the same; consumers use the first.
        let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        let zones = endpoint.hints.iter().flat_map(|hints| hints.for_zones.iter().flatten());
        let here = self.zone.as_ref().is_some_and(|own| zones.into_iter().any(|zone| zone.name == *own));
        let address = SocketAddr::new(ip, port);
        let target = Target::new(HostPort::new(ip.to_string(), port), if here { SAME_ZONE } else { 1 });
        Some(Target { priority: if ready { 0 } else { LEAVING }, known: vec![address.ip()], ..target })
    }
}

/// Most ports that are named in an error; a service has one or two.
const TOLD_PORTS: usize = 8;

fn told(ports: &[Port]) -> String {
    let each = ports.iter().take(TOLD_PORTS).map(|port| {
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

    fn slice(name: &str, endpoints: serde_json::Value, ports: serde_json::Value) -> Slice {
        let slice = json!({"metadata": {"name": name}, "addressType": "IPv4", "endpoints": endpoints, "ports": ports});
        serde_json::from_value(slice).unwrap()
    }

    fn told(slices: &Slices) -> Vec<String> {
        let told = |target: Target| format!("{}*{}@{}", target.address, target.weight, target.priority);
        slices.targets().into_iter().flatten().map(told).collect()
    }

    #[test]
    fn who_is_ready_is_called_and_who_leaves_only_if_need_be() {
        let mut slices = Slices::new("http".to_owned(), None);
        let endpoint = |last: u8, conditions: serde_json::Value| json!({"addresses": [format!("10.0.0.{last}")], "conditions": conditions});
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
            told(&slices),
            ["10.0.0.1:8080*1@0", "10.0.0.2:8080*1@0", "10.0.0.3:8080*1@1", "10.0.0.6:8080*1@0"]
        );
        assert!(!slices.update(&slice("a", all, ports)), "nothing has changed");
        assert!(slices.remove("a") && !slices.remove("a"));
        assert!(!slices.update(&slice("b", json!(null), json!(null))) || told(&slices).is_empty());
    }

    #[test]
    fn ports_have_names_or_numbers() {
        let ports = json!([{"name": "http", "port": 8080}, {"name": "dns", "protocol": "UDP", "port": 53}, {"name": "grpc", "port": 9090}]);
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
            let mut slices = Slices::new(asked.to_owned(), None);
            slices.update(&slice("a", json!([{"addresses": ["10.0.0.1"]}]), ports.clone()));
            assert_eq!(told(&slices).first().map(String::as_str), expected, "{asked} of {ports}");
        }
    }

    #[test]
    fn a_port_that_nobody_has_is_told_with_those_there_are() {
        let ports = json!([{"name": "http", "port": 8080}, {"name": "dns", "protocol": "UDP", "port": 53}]);
        let endpoints = json!([{"addresses": ["10.0.0.1"]}]);
        let mut slices = Slices::new("80".to_owned(), None);
        assert_eq!(slices.targets().ok(), Some(Vec::new()), "nobody is there yet");
        slices.update(&slice("a", json!(null), ports.clone()));
        assert_eq!(slices.targets().ok(), Some(Vec::new()), "nobody is there now");
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
        // Another slice has it: one rollout may change a port.
        slices.update(&slice("b", endpoints, json!([{"name": "x", "port": 80}, {"name": "y", "port": 81}])));
        assert_eq!(told(&slices), ["10.0.0.1:80*1@0"]);
        assert!(slices.remove("b") && slices.targets().is_err() && slices.remove("a"));
    }

    #[test]
    fn those_for_this_zone_weigh_more() {
        let mut slices = Slices::new("80".to_owned(), Some("a".to_owned()));
        let hinted = |address: &str, zones: &[&str]| {
            let zones: Vec<_> = zones.iter().map(|zone| json!({"name": zone})).collect();
            json!({"addresses": [address], "hints": {"forZones": zones}})
        };
        let endpoints =
            json!([hinted("10.0.0.1", &["a"]), hinted("10.0.0.2", &["b", "a"]), hinted("fd00::3", &["b"])]);
        slices.update(&slice("a", endpoints, json!([{"port": 80}])));
        assert_eq!(told(&slices), ["10.0.0.1:80*100@0", "10.0.0.2:80*100@0", "[fd00::3]:80*1@0"]);
    }
}
