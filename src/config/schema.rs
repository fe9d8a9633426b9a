//! The types of the file's sections. Their field docs become the descriptions in the JSON Schema.

use std::{fmt, path::PathBuf, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    AdminListen, HostMatch, HostPattern, HostPort, ListenAddr, Network, Policy, Route, hints,
    security::{Identity, Jwt, Mtls, Oauth2, UpstreamTls},
    user_timeout::UserTimeout,
};
use crate::{
    authorization::AllowSettings,
    queue::store::settings::StoreSettings,
    redact::Secret,
    resilience::queue::keys::QueueSettings,
    text_value,
    units::{HumanDuration, Ratio},
};

/// The whole configuration, resolved.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Config {
    pub service: Service,
    pub runtime: Runtime,
    pub inbound: Inbound,
    pub outbound: Outbound,
    /// This service's certificate, if it has one.
    pub identity: Option<Identity>,
    pub admin: Admin,
    pub telemetry: Telemetry,
    /// `[defaults]`: the policy of hosts that no upstream names.
    pub defaults: Policy,
    pub upstreams: Vec<Upstream>,
    /// `[store]`: where deliveries are kept.
    pub store: Option<StoreSettings>,
    /// `[[queue]]`
    pub queues: Vec<QueueSettings>,
    /// Values of environment variables whose names denote credentials. They are never shown, in whatever key they
    /// occur.
    pub env_secrets: Vec<String>,
}

/// `[service]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Service {
    /// The service's name; default `OTEL_SERVICE_NAME`, then the host name.
    pub name: String,
}

/// `[runtime]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Runtime {
    /// Threads of the data plane, 1 to 256; default: the container's CPU limit, rounded up; 1 where there is none.
    pub workers: Option<u16>,
    /// After SIGTERM, listeners still accept for this long, and responses close their connections.
    pub drain_delay: HumanDuration,
    /// Then requests in flight may take this long.
    pub drain_timeout: HumanDuration,
    /// Policies that decide, count and log, but are not applied.
    pub observe: Vec<ObservablePolicy>,
}

/// A policy that `[runtime] observe` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ObservablePolicy {
    Allow,
    Jwt,
    RateLimit,
    Limits,
    Breaker,
    Timeout,
    Retry,
    Fault,
}

/// `[inbound]`: requests to this service.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inbound {
    pub listen: ListenAddr,
    /// The address of the service.
    pub forward_to: HostPort,
    /// Whether to replace, append to or keep `x-forwarded-for`, `-proto` and `-host`.
    pub forwarded: ForwardedHeaders,
    /// Whether the configuration sets it, not the default.
    #[serde(skip)]
    pub sets_forwarded: bool,
    pub mtls: Mtls,
    /// Ports of the service with settings of their own.
    pub ports: Vec<InboundPort>,
    /// Which clients may send which requests; empty: every authenticated peer may send all.
    pub allow: Vec<AllowSettings>,
    /// End-user tokens, checked before the request reaches the service.
    pub jwt: Option<Jwt>,
    pub policy: Policy,
    pub routes: Vec<Route>,
}

/// `[[inbound.port]]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InboundPort {
    /// The port of the service.
    pub port: u16,
    /// Default: as for `[inbound]`.
    #[serde(default)]
    pub mtls: Option<Mtls>,
    /// `tcp` if the service speaks another protocol, or terminates TLS itself; `http1` and `h2` accept HTTP and respond
    /// 400 to anything else; `auto` passes other bytes only without peer identity and without request policy.
    #[serde(default)]
    pub protocol: Protocol,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ForwardedHeaders {
    #[default]
    Replace,
    Append,
    Off,
}

/// `[outbound]`: requests of this service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Outbound {
    /// Where the service sends its requests.
    pub listen: ListenAddr,
    /// Whether to forward requests for a host that no upstream names.
    pub unknown: UnknownHostPolicy,
    /// Networks to which no forward-proxy or Host request connects, whatever the name resolves to.
    pub deny_networks: Vec<Network>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum UnknownHostPolicy {
    #[default]
    Forward,
    Deny,
}

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// The address of the admin page and API.
    pub listen: AdminListen,
    /// Serves GET /live /ready /metrics and nothing else, for kubelet and Prometheus.
    pub probe_listen: Option<ListenAddr>,
    /// The file with the bearer token that changes need; unset: a token is created at start.
    pub token_file: Option<PathBuf>,
}

/// `[telemetry]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// The URL of the collector; unset: no export.
    pub otlp: Option<Secret>,
    /// Default: http on port 4318, else grpc.
    pub protocol: Option<OtlpProtocol>,
    /// The share of traces begun here that is sampled.
    pub sample: Ratio,
    /// Export a failed or retried request even if its trace was not sampled.
    pub sample_errors: bool,
    /// Which requests are logged.
    pub access_log: AccessLog,
    /// The file for the access log. Default: stdout; stderr under `run -- CMD`.
    pub access_log_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OtlpProtocol {
    Grpc,
    Http,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccessLog {
    Off,
    #[default]
    Errors,
    All,
}

/// The default of `max_connection_age`.
pub(super) const MAX_CONNECTION_AGE: HumanDuration = HumanDuration::from_secs(600);
/// The default of `ping_interval`.
pub(super) const PING_INTERVAL: HumanDuration = HumanDuration::from_secs(60);
/// The default of `ping_timeout`.
pub(super) const PING_TIMEOUT: HumanDuration = HumanDuration::from_secs(2);

/// `[[upstream]]`, resolved: a destination of outbound requests.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Upstream {
    pub name: String,
    /// Default: `[name]`.
    pub hosts: Vec<HostPattern>,
    pub endpoints: Endpoints,
    pub protocol: Protocol,
    #[serde(flatten)]
    pub tls: UpstreamTls,
    pub balance: Balance,
    /// A local port for this upstream alone.
    pub listen: Option<ListenAddr>,
    pub health: Option<HealthCheck>,
    pub pool_idle_timeout: PoolIdleTimeout,
    pub header_case: HeaderCase,
    /// The age, with jitter, at which a connection is replaced. This rebalances HTTP/2 and gRPC.
    pub max_connection_age: HumanDuration,
    /// HTTP/2: after this long without a byte from the endpoint while streams are open, a PING is sent.
    pub ping_interval: HumanDuration,
    /// HTTP/2: how long the PING acknowledgement is awaited.
    pub ping_timeout: HumanDuration,
    pub tcp_user_timeout: UserTimeout,
    /// Obtains the token that is added to every request.
    pub oauth2: Option<Oauth2>,
    pub policy: Policy,
    pub routes: Vec<Route>,
}

impl AccessLog {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Errors => "errors",
            Self::All => "all",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The client's protocol.
    #[default]
    Auto,
    Http1,
    H2,
    Tcp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HeaderCase {
    #[default]
    Lower,
    /// From HTTP/1 to HTTP/1, for services that require it.
    Preserve,
}

/// `health = { path = …, … }`, `{ grpc = "SERVICE", … }` or `{ tcp = true, … }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HealthCheck {
    /// `GET path`; 2xx is healthy.
    pub path: Option<String>,
    /// The service name for `grpc.health.v1.Health/Check`; "" checks the server as a whole.
    pub grpc: Option<String>,
    /// An established connection is healthy.
    pub tcp: Option<bool>,
    /// The time between two checks.
    pub interval: HumanDuration,
    /// The timeout of one check.
    pub timeout: HumanDuration,
    /// Consecutive failures after which an endpoint is unhealthy.
    pub unhealthy_after: u32,
    /// Consecutive successes after which it is healthy again.
    pub healthy_after: u32,
}

/// Where an upstream's endpoints come from.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Endpoints {
    /// `["10.0.0.1:8080", …]`; names are resolved.
    Fixed(Vec<HostPort>),
    /// `dns://host:port`: A and AAAA.
    Dns(HostPort),
    /// `dns+srv://_http._tcp.payments.example`
    Srv(String),
    /// `file:///etc/endpoints.json`
    File(PathBuf),
    /// `k8s://namespace/service:port`
    Kubernetes { namespace: String, service: String, port: String },
}

/// How an endpoint is chosen.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum Balance {
    /// The better of two random endpoints, by peak EWMA of latency × requests in flight.
    #[default]
    P2c,
    LeastRequest,
    RoundRobin,
    HashHeader(String),
    HashCookie(String),
}

/// How long an HTTP/1 connection may stay idle in the pool.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub enum PoolIdleTimeout {
    /// The upstream's `Keep-Alive: timeout=` less a margin, else 4 s; shortened after observed closes.
    #[default]
    Auto,
    Fixed(HumanDuration),
}

impl Default for Service {
    fn default() -> Self {
        Self { name: "unknown_service".to_owned() }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            workers: None,
            drain_delay: HumanDuration::default(),
            drain_timeout: HumanDuration::from_secs(25),
            observe: Vec::new(),
        }
    }
}

impl Default for Inbound {
    fn default() -> Self {
        Self {
            listen: ListenAddr(HostPort::new("::", 4143)),
            forward_to: HostPort::new("127.0.0.1", 8080),
            forwarded: ForwardedHeaders::default(),
            sets_forwarded: false,
            mtls: Mtls::Off,
            ports: Vec::new(),
            allow: Vec::new(),
            jwt: None,
            policy: Policy::inbound(),
            routes: Vec::new(),
        }
    }
}

impl Default for Outbound {
    fn default() -> Self {
        Self {
            listen: ListenAddr(HostPort::new("localhost", 4140)),
            unknown: UnknownHostPolicy::default(),
            deny_networks: Network::denied_by_default(),
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            listen: AdminListen::Tcp(ListenAddr(HostPort::new("localhost", 4191))),
            probe_listen: None,
            token_file: None,
        }
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            otlp: None,
            protocol: None,
            sample: Ratio::constant(0.1),
            sample_errors: true,
            access_log: AccessLog::default(),
            access_log_file: None,
        }
    }
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            path: None,
            grpc: None,
            tcp: None,
            interval: HumanDuration::from_secs(10),
            timeout: HumanDuration::from_secs(1),
            unhealthy_after: 3,
            healthy_after: 2,
        }
    }
}

impl Upstream {
    /// An upstream with all defaults, named `name`, with these endpoints.
    pub fn new(name: impl Into<String>, endpoints: Endpoints, policy: Policy) -> Self {
        let name = name.into();
        Self {
            hosts: vec![HostPattern { host: HostMatch::Exact(name.to_ascii_lowercase()), port: None }],
            name,
            endpoints,
            protocol: Protocol::default(),
            tls: UpstreamTls::default(),
            balance: Balance::default(),
            listen: None,
            health: None,
            pool_idle_timeout: PoolIdleTimeout::default(),
            header_case: HeaderCase::default(),
            max_connection_age: MAX_CONNECTION_AGE,
            ping_interval: PING_INTERVAL,
            ping_timeout: PING_TIMEOUT,
            tcp_user_timeout: UserTimeout::default(),
            oauth2: None,
            policy,
            routes: Vec::new(),
        }
    }
}

impl Endpoints {
    /// Parses `dns://`, `dns+srv://`, `file://` and `k8s://`; a fixed list is an array in the file.
    fn parse_uri(text: &str) -> Result<Self, String> {
        let wrong = || {
            let usual = "use [\"HOST:PORT\", …], \"dns://HOST:PORT\", \"dns+srv://NAME\", \"file:///PATH\" or \"k8s://NAMESPACE/SERVICE:PORT\"";
            let remedy = match HostPort::from_address_or_url(text) {
                Some(address) if address.socket_addr().is_some() => format!("write [\"{address}\"]"),
                Some(address) => format!("write \"dns://{address}\""),
                None => usual.to_owned(),
            };
            format!("`{text}` is not a source of endpoints: {remedy}")
        };
        match text.split_once("://").ok_or_else(wrong)? {
            ("dns", address) => address.parse().map(Self::Dns),
            ("dns+srv", name) if !name.is_empty() => Ok(Self::Srv(name.to_ascii_lowercase())),
            ("file", path) if path.starts_with('/') => Ok(Self::File(path.into())),
            ("k8s", rest) => {
                let (namespace, service) = rest.split_once('/').ok_or_else(wrong)?;
                let (service, port) = service.split_once(':').ok_or_else(wrong)?;
                let (namespace, service, port) = (namespace.to_owned(), service.to_owned(), port.to_owned());
                Ok(Self::Kubernetes { namespace, service, port })
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(list) => f.debug_list().entries(list.iter().map(ToString::to_string)).finish(),
            Self::Dns(address) => write!(f, "dns://{address}"),
            Self::Srv(name) => write!(f, "dns+srv://{name}"),
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::Kubernetes { namespace, service, port } => write!(f, "k8s://{namespace}/{service}:{port}"),
        }
    }
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Endpoints {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Fixed(list) => list.serialize(serializer),
            uri => serializer.collect_str(uri),
        }
    }
}

impl<'de> Deserialize<'de> for Endpoints {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Not an untagged enum: that would lose the place of an invalid address.
        struct UriOrList;
        impl<'de> serde::de::Visitor<'de> for UriOrList {
            type Value = Endpoints;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of \"HOST:PORT\", or a URI such as \"dns://HOST:PORT\"")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Endpoints, E> {
                Endpoints::parse_uri(text).map_err(E::custom)
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Endpoints, A::Error> {
                let mut list = Vec::new();
                while let Some(address) = seq.next_element()? {
                    list.push(address);
                }
                Ok(Endpoints::Fixed(list))
            }
        }
        deserializer.deserialize_any(UriOrList)
    }
}

impl JsonSchema for Endpoints {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Endpoints".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "anyOf": [
            { "type": "string", "pattern": "^(dns|dns\\+srv|file|k8s)://" },
            { "type": "array", "items": { "type": "string" }, "description": "HOST:PORT, …" },
        ] })
    }
}

impl FromStr for Balance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "p2c" => Ok(Self::P2c),
            "least-request" => Ok(Self::LeastRequest),
            "round-robin" => Ok(Self::RoundRobin),
            _ => match text.strip_prefix("hash:").and_then(|rest| rest.split_once(':')) {
                Some(("header", name)) if !name.is_empty() => Ok(Self::HashHeader(name.to_ascii_lowercase())),
                Some(("cookie", name)) if !name.is_empty() => Ok(Self::HashCookie(name.to_owned())),
                _ => {
                    let suggestion = hints::suggest_word(text, |value| value.parse::<Self>().is_ok());
                    let suggestion =
                        suggestion.map_or(String::new(), |value| format!("did you mean \"{value}\"? "));
                    Err(format!(
                        "`{text}` is not a way to balance: {suggestion}use p2c, least-request, round-robin, hash:header:NAME or hash:cookie:NAME"
                    ))
                }
            },
        }
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::P2c => f.write_str("p2c"),
            Self::LeastRequest => f.write_str("least-request"),
            Self::RoundRobin => f.write_str("round-robin"),
            Self::HashHeader(name) => write!(f, "hash:header:{name}"),
            Self::HashCookie(name) => write!(f, "hash:cookie:{name}"),
        }
    }
}

impl FromStr for PoolIdleTimeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Fixed) }
    }
}

impl fmt::Display for PoolIdleTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(duration) => duration.fmt(f),
        }
    }
}

text_value!(
    Balance,
    "Balance",
    "p2c, least-request, round-robin, hash:header:NAME or hash:cookie:NAME",
    r"p2c|least-request|round-robin|hash:(?:header|cookie):.+"
);
text_value!(
    PoolIdleTimeout,
    "PoolIdle",
    "\"auto\" or a duration",
    r"auto|\s*(?:0|(?:[0-9][0-9.]*\s*(?:us|ms|s|m|h|d)\s*)+)\s*"
);
