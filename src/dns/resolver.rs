//! Resolves a host name to its addresses, as the C library does.
//!
//! Literals and `localhost` never leave the process; `/etc/hosts` comes before DNS; `search` and `ndots` of
//! `/etc/resolv.conf` are respected. A and AAAA are queried in parallel. The cache of hickory is off: discovery
//! itself queries again when the TTL has passed, and a second cache below it would only make addresses older.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    pin::pin,
    time::Duration,
};

use hickory_resolver::{
    Hosts, TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::runtime::TokioRuntimeProvider,
    proto::{
        op::{Query, ResponseCode},
        rr::{Name, RData, Record, RecordType},
    },
    system_conf::read_system_conf,
};
use tokio::{runtime::Handle, time::timeout};

use super::{DnsError, lookup_error::LookupError};

/// The DNS servers to use instead of those in `/etc/resolv.conf`: `IP` or `IP:PORT`, separated by commas.
pub const DNS_ENV: &str = "OUTRIGGER_DNS";
/// The limit for a lookup with all its attempts and search domains.
pub const LOOKUP_LIMIT: Duration = Duration::from_secs(5);
/// The shortest time for which addresses are used, whatever their TTL.
pub const MIN_TTL: Duration = Duration::from_secs(1);
/// The longest time for which addresses are used, whatever their TTL.
pub const MAX_TTL: Duration = Duration::from_secs(300);
/// How much longer to wait for the second address family once the first has answered.
const SECOND_FAMILY_GRACE: Duration = Duration::from_secs(1);

/// Resolves names. Created once, on the control thread's runtime, which does all its work.
pub struct Resolver {
    dns: TokioResolver,
    hosts: Hosts,
    search: Vec<Name>,
    /// A name with at least this many dots is queried as it is before the search domains are tried.
    ndots: usize,
    limit: Duration,
    servers: Vec<SocketAddr>,
    has_route: fn(IpAddr) -> bool,
    runtime: Handle,
}

/// The addresses of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedAddresses {
    /// IPv4 before IPv6, each in ascending order. Never empty.
    pub addresses: Vec<IpAddr>,
    /// The lowest TTL of the chain of records, between [`MIN_TTL`] and [`MAX_TTL`].
    pub valid_for: Duration,
    /// The family whose query failed (as opposed to one without addresses): its previous addresses stay valid.
    pub failed_family: Option<AddressFamily>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressFamily {
    V4,
    V6,
}

/// An SRV record (RFC 2782).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SrvRecord {
    pub priority: u16,
    pub weight: u16,
    pub target: String,
    pub port: u16,
    /// The target's addresses, if the response contains them.
    pub addresses: Vec<IpAddr>,
}

impl AddressFamily {
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl Resolver {
    /// Configures it from `/etc/resolv.conf` and `/etc/hosts`, or [`DNS_ENV`]. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// `DNS_ENV` is set and not a list of addresses.
    pub fn from_system() -> Result<Self, DnsError> {
        let (mut config, options) = read_system_conf().unwrap_or_else(|error| {
            // What the C library does without a resolv.conf, as in an image built from scratch.
            tracing::debug!(%error, "no usable /etc/resolv.conf: using the DNS server on 127.0.0.1");
            let local = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
            (ResolverConfig::from_parts(None, Vec::new(), vec![local]), ResolverOpts::default())
        });
        if let Ok(servers) = std::env::var(DNS_ENV) {
            config.name_servers = servers.split(',').map(parse_server).collect::<Result<_, _>>()?;
        }
        let hosts = Hosts::from_system().unwrap_or_default();
        Self::new(config, options, hosts, LOOKUP_LIMIT)
    }

    /// Queries `server` only: no search domains, no `/etc/hosts`.
    ///
    /// # Errors
    /// None known; the constructor of hickory may fail if built with TLS.
    pub fn with_name_server(server: SocketAddr, limit: Duration) -> Result<Self, DnsError> {
        let config = ResolverConfig::from_parts(None, Vec::new(), vec![name_server(server)]);
        Self::new(config, ResolverOpts::default(), Hosts::default(), limit)
    }

    fn new(
        config: ResolverConfig,
        mut options: ResolverOpts,
        hosts: Hosts,
        limit: Duration,
    ) -> Result<Self, DnsError> {
        let setup = |error: &dyn std::fmt::Display| DnsError::Setup { reason: error.to_string() };
        let mut search = config.search.clone();
        if search.is_empty() {
            search.extend(config.domain.clone());
        }
        let ndots = options.ndots;
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        // One lost packet must leave time for another attempt.
        options.timeout = options.timeout.min(limit / 3);
        options.attempts = options.attempts.clamp(2, 5);
        let servers = config
            .name_servers
            .iter()
            .filter_map(|server| Some(SocketAddr::new(server.ip, server.connections.first()?.port)));
        let servers = servers.collect();
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        let dns = builder.build().map_err(|error| setup(&error))?;
        let runtime = Handle::try_current().map_err(|error| setup(&error))?;
        Ok(Self { dns, hosts, search, ndots, limit, servers, has_route, runtime })
    }

    /// The runtime on which it was created: that of the control thread.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// For tests that cannot rely on the machine's routes.
    #[cfg(test)]
    pub fn with_routes(mut self, has_route: fn(IpAddr) -> bool) -> Self {
        self.has_route = has_route;
        self
    }

    /// For tests: the content of `/etc/hosts` and the search list.
    #[cfg(test)]
    pub fn with_search_list(mut self, hosts: &str, search: &[&str], ndots: usize) -> Self {
        let _ = self.hosts.read_hosts_conf(hosts.as_bytes());
        self.search = search.iter().filter_map(|name| Name::from_str_relaxed(*name).ok()).collect();
        self.ndots = ndots;
        self
    }

    /// The addresses of `host`: a name or a literal address.
    ///
    /// # Errors
    /// [`DnsError::NotFound`] if the name has no addresses, [`DnsError::Server`] if the server fails,
    /// [`DnsError::Timeout`] if it does not answer.
    pub async fn addresses(&self, host: &str) -> Result<ResolvedAddresses, DnsError> {
        let local = |addresses| ResolvedAddresses { addresses, valid_for: MAX_TTL, failed_family: None };
        if let Ok(ip) = host.parse() {
            return Ok(local(vec![ip]));
        }
        let name = parse_name(host)?;
        if let Some(addresses) = self.without_dns(&name) {
            return Ok(local(self.reachable(addresses)));
        }
        let answer = self.search(&name, |name| self.both_families(name)).await;
        answer.map(|answer| ResolvedAddresses { addresses: self.reachable(answer.addresses), ..answer })
    }

    /// The SRV records of `name`, and how long they are valid.
    pub async fn srv_records(&self, name: &str) -> Result<(Vec<SrvRecord>, Duration), DnsError> {
        self.search(&parse_name(name)?, |name| self.srv(name)).await
    }

    /// `/etc/hosts`, and RFC 6761's `localhost`.
    fn without_dns(&self, name: &Name) -> Option<Vec<IpAddr>> {
        let listed = |kind| self.hosts.lookup_static_host(&Query::query(name.clone(), kind));
        let mut addresses: Vec<IpAddr> = [RecordType::A, RecordType::AAAA]
            .into_iter()
            .filter_map(listed)
            .flat_map(|lookup| ips(lookup.answers()).collect::<Vec<_>>())
            .collect();
        let is_localhost =
            name.iter().next_back().is_some_and(|label| label.eq_ignore_ascii_case(b"localhost"));
        if addresses.is_empty() && is_localhost {
            addresses = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        }
        (!addresses.is_empty()).then_some(addresses)
    }

    /// Queries `name` with each search domain in turn, until one has a result.
    async fn search<T, F>(&self, name: &Name, query: impl Fn(Name) -> F) -> Result<T, DnsError>
    where
        F: Future<Output = Result<T, LookupError>>,
    {
        let text = || name.to_utf8().trim_end_matches('.').to_owned();
        let look_up = async {
            let mut worst = None;
            for candidate in self.candidates(name) {
                match query(candidate).await {
                    Ok(found) => return Ok(found),
                    // A failed server is a better reason than that another domain lacks the name.
                    Err(miss)
                        if !matches!(
                            worst,
                            Some(
                                LookupError::Failed(_)
                                    | LookupError::NoServer(_)
                                    | LookupError::LocalResource(_)
                                    | LookupError::Timeout
                            )
                        ) =>
                    {
                        worst = Some(miss)
                    }
                    Err(_) => {}
                }
            }
            Err(worst.unwrap_or(LookupError::NoRecords(ResponseCode::NXDomain)))
        };
        let timed_out = || DnsError::Timeout { name: text(), limit: self.limit };
        let miss = match timeout(self.limit, look_up).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(miss)) => miss,
            Err(_) => return Err(timed_out()),
        };
        let miss = self.local_cause().filter(|_| matches!(miss, LookupError::NoServer(_))).unwrap_or(miss);
        let reason = match miss {
            LookupError::Timeout => return Err(timed_out()),
            LookupError::Failed(reason) | LookupError::NoServer(reason) => {
                return Err(DnsError::Server { name: text(), reason });
            }
            LookupError::LocalResource(reason) => {
                return Err(DnsError::LocalResource { name: text(), reason });
            }
            LookupError::NoRecords(ResponseCode::NXDomain) => "NXDOMAIN".to_owned(),
            LookupError::NoRecords(ResponseCode::NoError) => "it exists, but without such records".to_owned(),
            LookupError::NoRecords(code) => code.to_string(),
        };
        Err(DnsError::NotFound { name: text(), reason })
    }

    /// The local reason why no server can be queried, if there is one. Connecting a UDP socket sends nothing.
    fn local_cause(&self) -> Option<LookupError> {
        let mut last = None;
        for server in &self.servers {
            let any: IpAddr =
                if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            match UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(server)) {
                Ok(()) => return None,
                Err(error) => last = Some(error),
            }
        }
        LookupError::from_io(&last?)
    }

    fn candidates(&self, name: &Name) -> Vec<Name> {
        let mut plain = name.clone();
        plain.set_fqdn(true);
        if name.is_fqdn() {
            return vec![plain];
        }
        let mut names: Vec<_> =
            self.search.iter().filter_map(|domain| name.clone().append_domain(domain).ok()).collect();
        names.retain(|name| *name != plain);
        let dots = usize::from(name.num_labels()).saturating_sub(1);
        let at = if dots >= self.ndots { 0 } else { names.len() };
        names.insert(at, plain);
        names
    }

    async fn both_families(&self, name: Name) -> Result<ResolvedAddresses, LookupError> {
        let mut v4 = pin!(self.records(&name, RecordType::A));
        let mut v6 = pin!(self.records(&name, RecordType::AAAA));
        let (v4, v6) = tokio::select! {
            first = &mut v4 => {
                let second = second_family(&first, v6).await;
                (first, second)
            }
            first = &mut v6 => {
                let second = second_family(&first, v4).await;
                (second, first)
            }
        };
        let (records, missing) = match (v4, v6) {
            (Ok(mut v4), Ok(v6)) => {
                v4.extend(v6);
                (v4, None)
            }
            (Ok(records), Err(LookupError::NoRecords(_))) | (Err(LookupError::NoRecords(_)), Ok(records)) => {
                (records, None)
            }
            (Ok(records), Err(_)) => (records, Some(AddressFamily::V6)),
            (Err(_), Ok(records)) => (records, Some(AddressFamily::V4)),
            (Err(LookupError::NoRecords(_)), Err(miss)) | (Err(miss), Err(_)) => return Err(miss),
        };
        let mut addresses: Vec<_> = ips(&records).collect();
        addresses.sort_by_key(|ip| (ip.is_ipv6(), *ip));
        addresses.dedup();
        if addresses.is_empty() {
            return Err(LookupError::NoRecords(ResponseCode::NoError));
        }
        Ok(ResolvedAddresses { addresses, valid_for: valid_for(&records), failed_family: missing })
    }

    async fn srv(&self, name: Name) -> Result<(Vec<SrvRecord>, Duration), LookupError> {
        let lookup = self.dns.lookup(name, RecordType::SRV).await?;
        let mut glue: HashMap<&Name, Vec<IpAddr>> = HashMap::new();
        for record in lookup.additionals() {
            if let Some(ip) = record.data.ip_addr() {
                glue.entry(&record.name).or_default().push(ip);
            }
        }
        let service = |record: &Record| match &record.data {
            // RFC 2782: the target "." states that there is no such service.
            RData::SRV(srv) if !srv.target.is_root() => {
                let mut addresses = glue.get(&srv.target).cloned().unwrap_or_default();
                addresses.sort_by_key(|ip| (ip.is_ipv6(), *ip));
                let target = srv.target.to_utf8().trim_end_matches('.').to_ascii_lowercase();
                let (priority, weight, port) = (srv.priority, srv.weight, srv.port);
                Some(SrvRecord { priority, weight, target, port, addresses: self.reachable(addresses) })
            }
            _ => None,
        };
        let mut services: Vec<_> = lookup.answers().iter().filter_map(service).collect();
        services.sort_by(|a, b| (a.priority, &a.target, a.port).cmp(&(b.priority, &b.target, b.port)));
        if services.is_empty() {
            return Err(LookupError::NoRecords(ResponseCode::NoError));
        }
        Ok((services, valid_for(lookup.answers().iter().chain(lookup.additionals()))))
    }

    async fn records(&self, name: &Name, kind: RecordType) -> Result<Vec<Record>, LookupError> {
        let lookup = self.dns.lookup(name.clone(), kind).await?;
        Ok(lookup.answers().to_vec())
    }

    /// Drops the family to which this machine has no route (a name with AAAA records, a pod without IPv6), unless
    /// nothing would be left.
    fn reachable(&self, mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
        let mixed = addresses.windows(2).any(|pair| pair[0].is_ipv4() != pair[1].is_ipv4());
        if mixed && addresses.iter().any(|ip| (self.has_route)(*ip)) {
            addresses.retain(|ip| (self.has_route)(*ip));
        }
        addresses
    }
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").field("search", &self.search).field("limit", &self.limit).finish()
    }
}

/// Some servers never answer AAAA queries: the result of the first family must not wait for long.
async fn second_family<T>(
    first: &Result<T, LookupError>,
    second: impl Future<Output = Result<T, LookupError>>,
) -> Result<T, LookupError> {
    match first {
        Ok(_) => timeout(SECOND_FAMILY_GRACE, second).await.unwrap_or(Err(LookupError::Timeout)),
        Err(_) => second.await,
    }
}

fn ips<'a>(records: impl IntoIterator<Item = &'a Record>) -> impl Iterator<Item = IpAddr> {
    records.into_iter().filter_map(|record| record.data.ip_addr())
}

/// CNAMEs count too: an alias with a short TTL before an address with a long one is how traffic is moved.
fn valid_for<'a>(records: impl IntoIterator<Item = &'a Record>) -> Duration {
    let lowest = records.into_iter().map(|record| record.ttl).min().unwrap_or(0);
    Duration::from_secs(lowest.into()).clamp(MIN_TTL, MAX_TTL)
}

fn parse_name(text: &str) -> Result<Name, DnsError> {
    Name::from_str_relaxed(text)
        .map_err(|error| DnsError::NotFound { name: text.to_owned(), reason: error.to_string() })
}

fn parse_server(text: &str) -> Result<NameServerConfig, DnsError> {
    let text = text.trim();
    let address = text.parse().or_else(|_| text.parse().map(|ip| SocketAddr::new(ip, 53)));
    address.map(name_server).map_err(|_| DnsError::Setup {
        reason: format!("{DNS_ENV}: `{text}` is not an address; write IP or IP:PORT"),
    })
}

fn name_server(address: SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
        connection.port = address.port();
        connection
    });
    NameServerConfig::new(address.ip(), true, connections.into())
}

/// Whether there is a route to `ip`. Connecting a UDP socket checks the routing table and sends nothing: the C
/// library uses the same method to sort addresses.
fn has_route(ip: IpAddr) -> bool {
    let any: IpAddr = if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let unreachable = |error: &io::Error| {
        use io::ErrorKind::{AddrNotAvailable, HostUnreachable, NetworkUnreachable, Unsupported};
        let no_such_family = error.raw_os_error() == Some(97);
        no_such_family
            || matches!(error.kind(), AddrNotAvailable | HostUnreachable | NetworkUnreachable | Unsupported)
    };
    let probe = UdpSocket::bind((any, 0)).and_then(|socket| socket.connect((ip, 53)));
    !probe.is_err_and(|error| unreachable(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_parsed_with_and_without_port() {
        for (text, ip, port) in [
            ("10.0.0.53", "10.0.0.53", 53),
            (" 127.0.0.1:5353 ", "127.0.0.1", 5353),
            ("2001:db8::53", "2001:db8::53", 53),
            ("[::1]:54", "::1", 54),
        ] {
            let server = parse_server(text).unwrap();
            let ports: Vec<_> = server.connections.iter().map(|connection| connection.port).collect();
            assert_eq!((server.ip.to_string().as_str(), &ports[..]), (ip, &[port, port][..]), "{text}");
        }
        assert!(parse_server("dns.google").unwrap_err().to_string().contains(DNS_ENV));
    }

    #[test]
    fn loopback_has_a_route_and_a_documentation_network_is_harmless() {
        assert!(has_route(Ipv4Addr::LOCALHOST.into()));
        // Whatever this machine's routes are: a quick result, and no packet sent.
        let _ = has_route("2001:db8::1".parse().unwrap());
    }
}
