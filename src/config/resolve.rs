//! Resolves the merged tree into a [`Config`]: inheritance, and defaults that depend on other keys.

pub(super) mod route;

use schemars::JsonSchema;
use serde::{Deserialize, de::DeserializeOwned};

use super::{
    Balance, Config, Endpoints, ForwardedHeaders, HeaderCase, HealthCheck, HostMatch, HostPattern, HostPort,
    Inbound, InboundPort, ListenAddr, Policy, PoolIdleTimeout, Problem, Protocol, Upstream,
    diagnostic::Problems,
    merge::merge_tables,
    node::{Node, NodeEntry, Table, Value},
    queues,
    read::{read, unknown_key},
    schema::{MAX_CONNECTION_AGE, PING_INTERVAL, PING_TIMEOUT},
    security::{Identity, Jwt, MinTls, Mtls, Oauth2, TlsMode, UpstreamTls},
    user_timeout::UserTimeout,
    validate,
};
use crate::{authorization::AllowSettings, resilience::limit::LimitSettings, units::HumanDuration};

/// The tables of the file.
pub(super) const SECTIONS: [&str; 11] = [
    "service",
    "runtime",
    "inbound",
    "outbound",
    "identity",
    "admin",
    "telemetry",
    "store",
    "queue",
    "defaults",
    "upstream",
];

/// The keys of [`Policy`].
pub(super) const POLICY_KEYS: [&str; 15] = [
    "connect_timeout",
    "timeout",
    "attempt_timeout",
    "idle_timeout",
    "tunnel_idle_timeout",
    "max_duration",
    "retry",
    "breaker",
    "outlier",
    "limits",
    "rate_limit",
    "hedge",
    "fault",
    "fallback",
    "cache",
];

/// `[inbound]` without its policy keys, as written.
#[derive(Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct InboundKeys {
    /// The address for requests to the service.
    listen: ListenAddr,
    /// The address of the service. `run --app` sets it.
    forward_to: HostPort,
    /// Default: strict where `[identity]` is set, else off.
    mtls: Option<Mtls>,
    /// Whether to replace, append to or keep `x-forwarded-for`, `-proto` and `-host`.
    forwarded: ForwardedHeaders,
    /// Ports of the service with settings of their own.
    port: Vec<InboundPort>,
    /// Which clients may send which requests. None: every authenticated peer may send all.
    allow: Vec<AllowSettings>,
    /// End-user tokens, checked before the request reaches the service.
    jwt: Option<Jwt>,
}

impl Default for InboundKeys {
    fn default() -> Self {
        let Inbound { listen, forward_to, forwarded, .. } = Inbound::default();
        Self { listen, forward_to, mtls: None, forwarded, port: Vec::new(), allow: Vec::new(), jwt: None }
    }
}

/// `[[upstream]]` without its policy keys and routes, as written.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UpstreamKeys {
    /// Its name in metrics, logs and other keys.
    name: String,
    /// The hosts that requests name; default: its name. `*.example` and `*` are allowed; a port is optional.
    #[serde(default)]
    hosts: Option<Vec<HostPattern>>,
    /// Default: DNS of the first host, port 443 with TLS, else 80.
    #[serde(default)]
    endpoints: Option<Endpoints>,
    /// `auto` is the client's protocol.
    #[serde(default)]
    protocol: Protocol,
    /// Default: mutual where `[identity]` is set and `identity` is, else off.
    #[serde(default)]
    tls: Option<TlsMode>,
    /// SNI, and the name that must match under simple; default: the requested host.
    #[serde(default)]
    server_name: Option<String>,
    /// Default: system roots for simple, `[identity].ca` for mutual.
    #[serde(default)]
    ca: Option<std::path::PathBuf>,
    /// SPIFFE IDs of which the endpoint must have one.
    #[serde(default)]
    identity: Vec<String>,
    /// The lowest TLS version to it; default: that of `[identity]`, else 1.3.
    #[serde(default)]
    min_tls: Option<MinTls>,
    /// How an endpoint is chosen.
    #[serde(default)]
    balance: Balance,
    /// A local port for this upstream alone.
    #[serde(default)]
    listen: Option<ListenAddr>,
    /// Active checks; absent: none.
    #[serde(default)]
    health: Option<HealthCheck>,
    /// How long an HTTP/1 connection may stay idle in the pool.
    #[serde(default)]
    pool_idle_timeout: PoolIdleTimeout,
    /// `preserve`: header names keep their case, from HTTP/1 to HTTP/1.
    #[serde(default)]
    header_case: HeaderCase,
    /// The age, with jitter, at which a connection is replaced. 0 = none.
    #[serde(default = "max_connection_age")]
    max_connection_age: HumanDuration,
    /// HTTP/2: an endpoint that sends nothing for this long while streams are open gets a PING. 0 = none.
    #[serde(default = "ping_interval")]
    ping_interval: HumanDuration,
    /// HTTP/2: a connection whose endpoint does not acknowledge a PING within this time gets no more requests.
    #[serde(default = "ping_timeout")]
    ping_timeout: HumanDuration,
    /// How long sent bytes may stay unacknowledged, or the peer's window closed, before the kernel closes the
    /// connection. 0 = the kernel's own limit.
    #[serde(default)]
    tcp_user_timeout: UserTimeout,
    /// Obtains the token that is added to every request.
    #[serde(default)]
    oauth2: Option<Oauth2>,
}

fn max_connection_age() -> HumanDuration {
    MAX_CONNECTION_AGE
}

fn ping_interval() -> HumanDuration {
    PING_INTERVAL
}

fn ping_timeout() -> HumanDuration {
    PING_TIMEOUT
}

/// Reads the whole tree. Values that could not be read are reported in `problems` and have their defaults here.
pub(super) fn resolve(root: &Node, service_name: String, problems: &mut Problems) -> Config {
    for (key, entry) in root.as_table().into_iter().flatten() {
        if !SECTIONS.contains(&key.as_str()) {
            problems.push(unknown_key(key, entry.key, SECTIONS));
        }
    }
    let mut service: super::Service = section(root, "service", problems);
    if root.get("service").and_then(|service| service.get("name")).is_none() {
        service.name = service_name;
    }
    let identity: Option<Identity> = root.get("identity").and_then(|node| read(node, &[], problems));
    let has_identity = root.get("identity").is_some();
    let inbound = inbound(root.get("inbound"), has_identity, problems);
    let defaults_table = root.get("defaults").and_then(Node::as_table);
    let defaults = match root.get("defaults") {
        Some(node) => policy(node, None, problems).unwrap_or_default(),
        None => Policy::default(),
    };
    let upstreams = upstreams(root, defaults_table, has_identity, problems);
    let config = Config {
        service,
        runtime: section(root, "runtime", problems),
        inbound,
        outbound: section(root, "outbound", problems),
        identity,
        admin: section(root, "admin", problems),
        telemetry: section(root, "telemetry", problems),
        defaults,
        upstreams,
        store: queues::store(root, problems),
        queues: queues::queues(root, problems),
        env_secrets: problems.secrets().to_vec(),
    };
    validate::references(root, problems);
    validate::sections(&config, root, problems);
    validate::identity(&config, root, problems);
    validate::queues(&config, root, problems);
    config
}

fn upstreams(
    root: &Node,
    defaults: Option<&Table>,
    has_identity: bool,
    problems: &mut Problems,
) -> Vec<Upstream> {
    let Some(node) = root.get("upstream") else { return Vec::new() };
    let Some(items) = node.as_array() else {
        let found = format!("expected [[upstream]], found {}", node.kind());
        problems.push(Problem::error(node.origin, "upstreams are a list").label(found));
        return Vec::new();
    };
    let mut found = Vec::new();
    for item in items {
        if let Some(upstream) = upstream(item, defaults, has_identity, problems) {
            found.push((upstream, item));
        }
    }
    validate::across_upstreams(&found, problems);
    found.into_iter().map(|(upstream, _)| upstream).collect()
}

fn section<T: DeserializeOwned + Default>(root: &Node, key: &str, problems: &mut Problems) -> T {
    root.get(key).and_then(|node| read(node, &[], problems)).unwrap_or_default()
}

fn inbound(node: Option<&Node>, has_identity: bool, problems: &mut Problems) -> Inbound {
    let empty = Node::table(None);
    let node = node.unwrap_or(&empty);
    let (policy_keys, mut own) = split_policy_keys(node);
    let mut policy =
        policy(node, Some(inbound_policy(&policy_keys)), problems).unwrap_or_else(Policy::inbound);
    policy.sets_request_limits |= limits_requests(&policy_keys);
    let routes = queues::inbound_routes(&mut own, &policy, problems);
    let also: Vec<&str> = POLICY_KEYS.into_iter().chain(["route"]).collect();
    let keys: InboundKeys = read(&own, &also, problems).unwrap_or_default();
    let default_mtls = if has_identity { Mtls::Strict } else { Mtls::Off };
    Inbound {
        listen: keys.listen,
        forward_to: keys.forward_to,
        mtls: keys.mtls.unwrap_or(default_mtls),
        sets_forwarded: own.get("forwarded").is_some(),
        forwarded: keys.forwarded,
        ports: keys.port,
        allow: keys.allow,
        jwt: keys.jwt,
        policy,
        routes,
    }
}

fn upstream(
    node: &Node,
    defaults: Option<&Table>,
    has_identity: bool,
    problems: &mut Problems,
) -> Option<Upstream> {
    let (mut policy_keys, mut own) = split_policy_keys(node);
    let mut route_nodes = None;
    if let Value::Table(table) = &mut own.value {
        route_nodes = table.remove("route");
    }
    let limits_requests = limits_requests(&policy_keys);
    if let Some(defaults) = defaults {
        policy_keys = inherit(defaults, policy_keys);
    }
    let policy = policy(node, Some(policy_keys.clone()), problems).map(|policy| Policy {
        sets_request_limits: policy.sets_request_limits || limits_requests,
        ..policy
    });
    let routes =
        route_nodes.map_or_else(Vec::new, |entry| route::routes(&entry.node, &policy_keys, problems));
    let also: Vec<&str> = POLICY_KEYS.into_iter().chain(["route"]).collect();
    let keys: UpstreamKeys = read(&own, &also, problems)?;

    let hosts = keys.hosts.unwrap_or_else(|| {
        vec![HostPattern { host: HostMatch::Exact(keys.name.to_ascii_lowercase()), port: None }]
    });
    let mutual = has_identity && !keys.identity.is_empty();
    let mode = keys.tls.unwrap_or(if mutual { TlsMode::Mutual } else { TlsMode::Off });
    let tls = UpstreamTls {
        mode,
        server_name: keys.server_name,
        ca: keys.ca,
        identity: keys.identity,
        min_tls: keys.min_tls,
    };
    let endpoints = match keys.endpoints {
        Some(endpoints) => endpoints,
        None => match default_endpoints(hosts.first(), mode) {
            Some(endpoints) => endpoints,
            None => {
                // Invalid hosts have been reported already.
                if hosts.is_empty() && own.get("hosts").is_some_and(Node::is_filled_list) {
                    return None;
                }
                let origin = own.get("hosts").map_or(node.origin, |hosts| hosts.origin);
                problems.push(match hosts.first() {
                    Some(first) => {
                        Problem::error(origin, format!("upstream `{}` has no endpoints", keys.name))
                            .label(format!("`{first}` is not a name that can be resolved"))
                            .help("add e.g. `endpoints = \"dns://HOST:PORT\"`")
                            .about_missing()
                    }
                    None => Problem::error(origin, "no request would ever reach this upstream")
                        .help("remove `hosts`; the default is the upstream's name"),
                });
                return None;
            }
        },
    };
    let upstream = Upstream {
        name: keys.name,
        hosts,
        endpoints,
        protocol: keys.protocol,
        tls,
        balance: keys.balance,
        listen: keys.listen,
        health: keys.health,
        pool_idle_timeout: keys.pool_idle_timeout,
        header_case: keys.header_case,
        max_connection_age: keys.max_connection_age,
        ping_interval: keys.ping_interval,
        ping_timeout: keys.ping_timeout,
        tcp_user_timeout: keys.tcp_user_timeout,
        oauth2: keys.oauth2,
        policy: policy?,
        routes,
    };
    validate::upstream(&upstream, node, has_identity, problems);
    Some(upstream)
}

/// The endpoints of an upstream without the key: its first host, resolved by DNS.
fn default_endpoints(first: Option<&HostPattern>, tls: TlsMode) -> Option<Endpoints> {
    let HostPattern { host: HostMatch::Exact(host), port } = first? else { return None };
    let usual = if tls == TlsMode::Off { 80 } else { 443 };
    let address = HostPort::new(host.clone(), port.unwrap_or(usual));
    Some(if address.socket_addr().is_some() {
        Endpoints::Fixed(vec![address])
    } else {
        Endpoints::Dns(address)
    })
}

/// The policy keys of a table, and its other keys.
pub(super) fn split_policy_keys(node: &Node) -> (Table, Node) {
    let Value::Table(table) = &node.value else { return (Table::new(), node.clone()) };
    let (policy, own) = table
        .iter()
        .map(|(key, entry)| (key.clone(), entry.clone()))
        .partition(|(key, _)| POLICY_KEYS.contains(&key.as_str()));
    (policy, Node { origin: node.origin, value: Value::Table(own) })
}

/// Whether a table sets limits of requests itself, even to the defaults. Limits of connections do not count.
fn limits_requests(own: &Table) -> bool {
    let limits = own.get("limits").and_then(|entry| entry.node.as_table());
    limits.is_some_and(|limits| limits.keys().any(|key| key.as_str() != "max_connections"))
}

/// The policy keys of an upstream or a route: its own keys over the inherited ones.
pub(super) fn inherit(above: &Table, own: Table) -> Table {
    let policy = above.iter().filter(|(key, _)| POLICY_KEYS.contains(&key.as_str()));
    merge_tables(policy.map(|(key, entry)| (key.clone(), entry.clone())).collect(), own)
}

/// `[inbound]`'s policy keys over its defaults, which are [`Policy::inbound`] as a tree.
pub(super) fn inbound_policy(own: &Table) -> Table {
    let base = [
        ("timeout", Node::text("0s")),
        ("retry", Node::bool(false)),
        ("breaker", Node::bool(false)),
        ("outlier", Node::bool(false)),
        ("limits", Node::bool(false)),
    ];
    let base = base.map(|(key, node)| (key.to_owned(), NodeEntry { key: None, node }));
    merge_tables(base.into_iter().collect(), own.clone())
}

/// The policy of a table: from these effective keys, or from its own keys.
fn policy(owner: &Node, keys: Option<Table>, problems: &mut Problems) -> Option<Policy> {
    let effective = keys.map(|keys| Node { origin: owner.origin, value: Value::Table(keys) });
    let node = effective.as_ref().unwrap_or(owner);
    let policy: Policy = read(node, &[], problems)?;
    validate::policy(&policy, node, problems);
    let sets_request_limits = policy.limits.0.is_some_and(|limits| {
        let built_in = LimitSettings::default();
        LimitSettings { max_connections: built_in.max_connections, ..limits } != built_in
    });
    Some(Policy { sets_request_limits, ..policy })
}
