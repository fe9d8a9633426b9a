//! Hosts, ports, networks and listen addresses, as written in the configuration.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use crate::text_value;

/// `host:port`; the host is a name, an IPv4 address or an IPv6 address in brackets.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    pub host: String,
    pub port: u16,
}

/// `payments`, `payments:8080`, `*.example` or `*`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HostPattern {
    pub host: HostMatch,
    pub port: Option<u16>,
}

/// Lower case.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostMatch {
    Exact(String),
    /// The part after `*`, with its dot: `.example`.
    Suffix(String),
    Any,
}

/// An address to bind: `127.0.0.1:4140`, `[::]:4143`, or `localhost:4140` for both families of loopback.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ListenAddr(pub HostPort);

/// `localhost:4191` or `unix:/run/outrigger/admin.sock`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum AdminListen {
    Tcp(ListenAddr),
    Unix(PathBuf),
}

/// An IP network: `169.254.0.0/16`, `fe80::/10`, or a single address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network {
    pub address: IpAddr,
    pub prefix: u8,
}

impl HostMatch {
    /// Whether it matches `host`, which is in lower case.
    pub fn matches(&self, host: &str) -> bool {
        match self {
            Self::Exact(named) => named == host,
            Self::Suffix(suffix) => host.len() > suffix.len() && host.ends_with(suffix.as_str()),
            Self::Any => true,
        }
    }
}

impl HostPort {
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self { host: host.into(), port }
    }

    /// Parses HOST:PORT, or takes the address from an http or https URL.
    pub(super) fn from_address_or_url(text: &str) -> Option<Self> {
        let is_url = ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme));
        text.parse().ok().or_else(|| suggest_address(text).filter(|_| is_url)?.parse().ok())
    }

    /// The socket address, if the host is an IP address.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        self.host.parse().ok().map(|ip| SocketAddr::new(ip, self.port))
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || match suggest_address(text) {
            Some(meant) => format!("`{text}` is not HOST:PORT; write \"{meant}\""),
            None => {
                format!("`{text}` is not HOST:PORT; write an IPv6 address in brackets, e.g. \"[::1]:8080\"")
            }
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| match port.bytes().all(|byte| byte.is_ascii_digit()) {
            true if !port.is_empty() => format!("`{port}` is not a port; ports go up to 65535"),
            _ => wrong(),
        })?;
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().map_err(|_| wrong())?.to_string(),
            None if host.is_empty() || host.contains([':', '/', '@', ' ', '[', ']', '*']) => {
                return Err(wrong());
            }
            None => host.to_ascii_lowercase(),
        };
        Ok(Self { host, port })
    }
}

/// The address that was probably meant by a URL, by a port alone, or by another proxy's notation for any address.
fn suggest_address(text: &str) -> Option<String> {
    if let Some((scheme, rest)) = text.split_once("://") {
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let authority = authority.rsplit_once('@').map_or(authority, |(_, bare)| bare);
        let usual = if matches!(scheme, "https" | "wss") { 443 } else { 80 };
        let with_port = || format!("{authority}:{usual}").parse::<HostPort>();
        return authority
            .parse::<HostPort>()
            .or_else(|_| with_port())
            .ok()
            .map(|address| address.to_string());
    }
    let is_port = |port: &str| port.parse::<u16>().is_ok();
    match text.rsplit_once(':') {
        None if is_port(text) => Some(format!("127.0.0.1:{text}")),
        Some(("" | "*", port)) if is_port(port) => Some(format!("[::]:{port}")),
        _ => None,
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for ListenAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address: HostPort = text.parse()?;
        if address.host == "localhost" || address.socket_addr().is_some() {
            Ok(Self(address))
        } else {
            Err(format!(
                "`{text}` cannot be listened on: write an IP address or localhost, e.g. \"127.0.0.1:4140\", \"[::]:4143\""
            ))
        }
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for AdminListen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("`unix:` needs a path, e.g. \"unix:/run/outrigger/admin.sock\"".to_owned()),
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp),
        }
    }
}

impl fmt::Display for AdminListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for HostPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || match suggest_address(text).filter(|_| text.contains("://")) {
            Some(meant) => {
                let usual = [":80", ":443"].into_iter().find_map(|port| meant.strip_suffix(port));
                format!("`{text}` is a URL, not a host: write \"{}\"", usual.unwrap_or(&meant))
            }
            None => format!(
                "`{text}` is not a host: write \"payments\", \"payments:8080\", \"*.example\" or \"*\""
            ),
        };
        if text.contains("://") {
            return Err(wrong());
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
                (host, Some(port.parse().map_err(|_| wrong())?))
            }
            _ => (text, None),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let host = match host.strip_prefix('*') {
            Some("") => HostMatch::Any,
            Some(suffix) if suffix.starts_with('.') && suffix.len() > 1 && !suffix.contains('*') => {
                HostMatch::Suffix(suffix.to_owned())
            }
            None if !host.is_empty() && !host.contains(['*', '/', '@', ' ']) => HostMatch::Exact(host),
            _ => return Err(wrong()),
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            HostMatch::Exact(host) if host.contains(':') => write!(f, "[{host}]")?,
            HostMatch::Exact(host) => f.write_str(host)?,
            HostMatch::Suffix(suffix) => write!(f, "*{suffix}")?,
            HostMatch::Any => f.write_str("*")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl Network {
    /// Link-local and the metadata services of the large clouds: addresses that hand out credentials.
    pub fn denied_by_default() -> Vec<Self> {
        [
            "169.254.0.0/16",
            "fe80::/10",
            "fd00:ec2::254/128",
            "100.100.100.200/32",
            "168.63.129.16/32",
            "0.0.0.0/8",
            "::/128",
        ]
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect()
    }

    pub fn contains(&self, ip: IpAddr) -> bool {
        use IpAddr::{V4, V6};
        match (self.address, ip) {
            (V4(network), V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                (network.to_bits() ^ ip.to_bits()) & mask == 0
            }
            (V6(network), V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                (network.to_bits() ^ ip.to_bits()) & mask == 0
            }
            _ => false,
        }
    }
}

impl Network {
    /// The first of `networks` that contains `ip`, or the IPv4 address inside it.
    pub fn find(networks: &[Self], ip: IpAddr) -> Option<Self> {
        let ip = unmapped(ip);
        networks.iter().find(|network| network.contains(ip)).copied()
    }

    /// Whether every address of the other network is in this one.
    pub fn covers(&self, other: &Self) -> bool {
        self.prefix <= other.prefix && self.contains(other.address)
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a network: write e.g. \"169.254.0.0/16\" or \"fe80::/10\"");
        let (address, prefix) = text.split_once('/').map_or((text, None), |(a, p)| (a, Some(p)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(longest), str::parse).map_err(|_| wrong())?;
        if prefix > longest { Err(wrong()) } else { Ok(Self { address, prefix }) }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The IPv4 address inside an IPv6 one: mapped (`::ffff:a.b.c.d`) or NAT64 (RFC 6052 `64:ff9b::/96`, RFC 8215).
fn unmapped(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else { return ip };
    let nat64 = |v6: Ipv6Addr| {
        let [a, b, c, d, e, f, high, low] = v6.segments();
        let well_known = [a, b, c, d, e, f] == [0x64, 0xff9b, 0, 0, 0, 0];
        let local_use = [a, b, c] == [0x64, 0xff9b, 1];
        (well_known || local_use).then(|| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
    };
    v6.to_ipv4_mapped().or_else(|| nat64(v6)).map_or(ip, IpAddr::V4)
}

text_value!(HostPort, "HostPort", "HOST:PORT", r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]*]+):[0-9]{1,5}");
text_value!(
    ListenAddr,
    "ListenAddr",
    "an address to bind, e.g. \"127.0.0.1:4140\", \"[::]:4143\", \"localhost:4140\"; port 0 takes a free one",
    r"(?:\[[0-9A-Fa-f:.]+\]|[0-9.]+|[Ll][Oo][Cc][Aa][Ll][Hh][Oo][Ss][Tt]):[0-9]{1,5}"
);
text_value!(
    AdminListen,
    "AdminListen",
    "an address to bind, or unix:PATH",
    r"unix:.+|(?:\[[0-9A-Fa-f:.]+\]|[0-9.]+|[Ll][Oo][Cc][Aa][Ll][Hh][Oo][Ss][Tt]):[0-9]{1,5}"
);
text_value!(
    HostPattern,
    "HostPattern",
    "a host, *.suffix or *; a port is optional",
    r"(?:\*(?:\.[^\s*]+)?|[^\s*/@]+)(?::[0-9]{1,5})?"
);
text_value!(Network, "Network", "an IP network, e.g. \"169.254.0.0/16\"", r"[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_addresses_are_recognised_in_every_notation() {
        for text in
            ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe"]
        {
            let ip = unmapped(text.parse().unwrap());
            assert_eq!(ip, IpAddr::from([169, 254, 169, 254]), "{text}");
        }
        assert_eq!(unmapped("2001:db8::1".parse().unwrap()), "2001:db8::1".parse::<IpAddr>().unwrap());
    }
}
