//! The environment variables that make a service use the proxy.

use std::net::SocketAddr;

use crate::{config::Config, redact::Secret};

/// Never proxied: loopback and link-local addresses (cloud metadata among them). Some libraries support networks,
/// others only names and addresses, so the list has both.
const DIRECT: &[&str] =
    &["localhost", "127.0.0.1", "127.0.0.0/8", "::1", "169.254.169.254", "169.254.0.0/16", "fe80::/10"];

/// The variables for a service whose outbound listener is bound at `outbound`.
pub fn variables(outbound: &[SocketAddr], config: &Config) -> Vec<(&'static str, String)> {
    let existing = ["no_proxy", "NO_PROXY"].iter().find_map(|name| std::env::var(name).ok());
    build(outbound, existing.as_deref(), config.telemetry.otlp.as_ref().map(Secret::expose))
}

/// The same, with the service's existing `no_proxy`.
pub fn build(
    outbound: &[SocketAddr],
    no_proxy: Option<&str>,
    otlp: Option<&str>,
) -> Vec<(&'static str, String)> {
    let Some(outbound) = outbound.first() else { return Vec::new() };
    let host = match outbound {
        address if !address.ip().is_unspecified() => *address,
        SocketAddr::V4(address) => (std::net::Ipv4Addr::LOCALHOST, address.port()).into(),
        SocketAddr::V6(address) => (std::net::Ipv6Addr::LOCALHOST, address.port()).into(),
    };
    let proxy = format!("http://{host}");
    let no_proxy = extend(no_proxy.unwrap_or_default(), otlp);
    vec![
        ("http_proxy", proxy.clone()),
        ("HTTP_PROXY", proxy.clone()),
        ("https_proxy", proxy.clone()),
        ("HTTPS_PROXY", proxy),
        ("no_proxy", no_proxy.clone()),
        ("NO_PROXY", no_proxy),
        ("NODE_USE_ENV_PROXY", "1".to_owned()),
    ]
}

fn extend(existing: &str, otlp: Option<&str>) -> String {
    let collector = otlp.and_then(|url| url.parse::<http::Uri>().ok());
    let collector = collector.as_ref().and_then(http::Uri::host);
    let mut list: Vec<&str> = Vec::new();
    for entry in existing.split(',').map(str::trim).chain(DIRECT.iter().copied()).chain(collector) {
        if !entry.is_empty() && !list.contains(&entry) {
            list.push(entry);
        }
    }
    list.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_name_the_bound_port() {
        let variables =
            build(&["127.0.0.1:4140".parse().unwrap(), "[::1]:4140".parse().unwrap()], None, None);
        for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"] {
            assert!(variables.contains(&(name, "http://127.0.0.1:4140".to_owned())), "{name}");
        }
        assert!(variables.contains(&("NODE_USE_ENV_PROXY", "1".to_owned())));
        let any = build(&["0.0.0.0:4140".parse().unwrap()], None, None);
        assert!(any.contains(&("http_proxy", "http://127.0.0.1:4140".to_owned())));
    }

    #[test]
    fn existing_exclusions_are_kept() {
        let list = extend("corp.example, localhost", Some("http://collector:4317"));
        assert_eq!(
            list,
            "corp.example,localhost,127.0.0.1,127.0.0.0/8,::1,169.254.169.254,169.254.0.0/16,fe80::/10,collector"
        );
    }
}
