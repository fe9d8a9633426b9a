//! Which changes a running process holds back until they are confirmed: those that protect the service less.
//!
//! A full disk can empty a file, and an editor can save half of one. What is left may be valid and admit every client.

use std::{collections::BTreeSet, path::Path};

use super::{
    Config, HostMatch, HostPattern, InboundPort, Jwt, Mtls, Network, ObservablePolicy, Sources, TlsMode,
    UnknownHostPolicy, Upstream,
};
use crate::authorization::AllowSettings;

/// A configuration and the text that it was read from.
#[derive(Clone, Copy, Debug)]
pub struct Revision<'a> {
    pub config: &'a Config,
    pub sources: &'a Sources,
}

/// The reasons why a new configuration must be confirmed before it replaces the old one, a phrase each; empty if it may
/// be applied at once.
pub fn confirmation_reasons(old: Revision<'_>, new: Revision<'_>) -> Vec<String> {
    let mut reasons: Vec<String> =
        emptied(old.sources, new.sources).map(|path| format!("{} is empty now", path.display())).collect();
    reasons.extend(less_secure(old.config, new.config));
    reasons
}

/// The files that had content and are now empty, or missing where they are optional.
fn emptied<'a>(old: &'a Sources, new: &'a Sources) -> impl Iterator<Item = &'a Path> {
    let had_content = |path: &Path| old.0.iter().any(|source| source.path == path && !is_blank(&source.text));
    let blank = new.0.iter().filter(|source| is_blank(&source.text));
    blank.map(|source| source.path.as_path()).filter(move |path| had_content(path))
}

fn is_blank(text: &str) -> bool {
    text.lines().all(|line| matches!(line.trim_start().as_bytes(), [] | [b'#', ..]))
}

fn less_secure(old: &Config, new: &Config) -> Vec<String> {
    let mut reasons = Vec::new();
    reasons.extend(identity_reasons(old, new));
    reasons.extend(allow_reasons(old, new));
    match (&old.inbound.jwt, &new.inbound.jwt) {
        (Some(_), None) => reasons.push("inbound.jwt is gone".to_owned()),
        (Some(old), Some(new)) => reasons.extend(jwt_reasons(old, new)),
        (None, _) => {}
    }
    let observes = |config: &Config, policy| config.runtime.observe.contains(&policy);
    for (policy, name, was_enforced) in [
        (ObservablePolicy::Allow, "allow", !old.inbound.allow.is_empty()),
        (ObservablePolicy::Jwt, "jwt", old.inbound.jwt.is_some()),
    ] {
        if was_enforced && observes(new, policy) && !observes(old, policy) {
            reasons.push(format!("inbound.{name} is only observed by [runtime] observe"));
        }
    }
    reasons.extend(mtls_reasons(old, new));
    reasons.extend(old.upstreams.iter().flat_map(|upstream| upstream_reasons(upstream, new)));
    if old.outbound.unknown == UnknownHostPolicy::Deny && new.outbound.unknown != UnknownHostPolicy::Deny {
        reasons.push("outbound.unknown is no longer \"deny\"".to_owned());
    }
    let is_denied = |network: &&Network| new.outbound.deny_networks.iter().any(|other| other.covers(network));
    for network in old.outbound.deny_networks.iter().filter(|network| !is_denied(network)) {
        reasons.push(format!("outbound.deny_networks lacks {network}"));
    }
    reasons
}

fn identity_reasons(old: &Config, new: &Config) -> Vec<String> {
    match (&old.identity, &new.identity) {
        (Some(_), None) => vec!["[identity] is gone".to_owned()],
        (Some(old), Some(new)) => {
            let is_gone = old.crl.is_some() && new.crl.is_none();
            is_gone.then(|| "identity.crl is gone".to_owned()).into_iter().collect()
        }
        (None, _) => Vec::new(),
    }
}

/// Finds entries that a truncated file would leave: they admit the same clients without a former restriction. Added
/// clients, methods or paths are an operator's edits, not a truncation. While `allow` is only observed, it refuses
/// nothing.
fn allow_reasons(old: &Config, new: &Config) -> Vec<String> {
    if old.inbound.allow.is_empty() {
        return Vec::new();
    }
    if new.inbound.allow.is_empty() {
        return vec!["inbound.allow is gone".to_owned()];
    }
    if old.runtime.observe.contains(&ObservablePolicy::Allow) {
        return Vec::new();
    }
    let entries = new.inbound.allow.iter().enumerate();
    entries
        .filter_map(|(at, entry)| {
            let lost = unrestricted(&old.inbound.allow, entry)?;
            Some(format!("inbound.allow entry {} has no {lost} any more", at + 1))
        })
        .collect()
}

/// The key that an entry lacks, although every old entry for one of its clients had it.
fn unrestricted(old: &[AllowSettings], entry: &AllowSettings) -> Option<&'static str> {
    type HasKey = fn(&AllowSettings) -> bool;
    let keys: [(&str, HasKey); 3] = [
        ("methods", |entry| !entry.methods.is_empty()),
        ("paths", |entry| !entry.paths.is_empty()),
        ("claims", |entry| !entry.claims.is_empty()),
    ];
    let was_restricted = |has_key: HasKey| {
        entry.identity.iter().any(|identity| {
            let mut naming = old.iter().filter(|old| old.identity.contains(identity)).peekable();
            naming.peek().is_some() && naming.all(has_key)
        })
    };
    keys.into_iter().find(|(_, has_key)| !has_key(entry) && was_restricted(*has_key)).map(|(name, _)| name)
}

fn jwt_reasons(old: &Jwt, new: &Jwt) -> Vec<String> {
    // Fields with such a name are removed from clients' requests. Without the entry, the service would trust them.
    let kept = |name: &str| new.claim_headers.keys().any(|new| new.eq_ignore_ascii_case(name));
    let lost = old.claim_headers.keys().filter(|name| !kept(name));
    lost.map(|name| format!("inbound.jwt.claim_headers lacks {name}")).collect()
}

fn mtls_reasons(old: &Config, new: &Config) -> Vec<String> {
    let mut reasons = Vec::new();
    let opened = |old: Mtls, new: Mtls| old == Mtls::Strict && new != Mtls::Strict;
    if opened(old.inbound.mtls, new.inbound.mtls) {
        reasons.push("inbound.mtls is no longer \"strict\"".to_owned());
    }
    let ports: BTreeSet<u16> =
        [old, new].iter().flat_map(|config| &config.inbound.ports).map(|p| p.port).collect();
    for port in ports {
        // A port without its own `mtls` follows `[inbound]`, which is reported above.
        let is_general = |config: &Config| port_of(config, port).and_then(|port| port.mtls).is_none();
        if opened(mtls_of(old, port), mtls_of(new, port)) && !(is_general(old) && is_general(new)) {
            reasons.push(format!("mtls of inbound port {port} is no longer \"strict\""));
        }
    }
    reasons
}

/// Changes that verify less about the endpoints of an upstream with TLS, or send its requests in plaintext.
fn upstream_reasons(old: &Upstream, new: &Config) -> Vec<String> {
    let name = &old.name;
    if old.tls.mode == TlsMode::Off {
        return Vec::new();
    }
    let mut reasons = Vec::new();
    let successor = new.upstreams.iter().find(|upstream| upstream.name == *name);
    let of_hosts = old.hosts.iter().filter_map(|host| mode_of_host(new, host));
    let mode = successor.map(|upstream| upstream.tls.mode).into_iter().chain(of_hosts).min();
    if mode.is_some_and(|mode| mode < old.tls.mode) {
        let gone = if successor.is_none() { ", as it is gone" } else { "" };
        reasons.push(format!("upstream {name} no longer uses tls = \"{}\"{gone}", old.tls.mode.word()));
    }
    let Some(successor) = successor else { return reasons };
    if !old.tls.identity.is_empty() && successor.tls.identity.is_empty() {
        reasons.push(format!("identity of upstream {name} is gone"));
    }
    if old.tls.ca.is_some() && successor.tls.ca.is_none() {
        reasons.push(format!("ca of upstream {name} is gone"));
    }
    let general = new.identity.as_ref().map(|identity| identity.min_tls).unwrap_or_default();
    if old.tls.min_tls.is_some_and(|min_tls| successor.tls.min_tls.is_none() && general < min_tls) {
        reasons.push(format!("min_tls of upstream {name} is gone"));
    }
    reasons
}

/// The TLS mode of requests to a host; `None` if they are refused.
fn mode_of_host(config: &Config, host: &HostPattern) -> Option<TlsMode> {
    let serves = |pattern: &HostPattern| {
        pattern == host
            || matches!(&host.host, HostMatch::Exact(name) if pattern.host.matches(name))
                && pattern.port.is_none_or(|port| Some(port) == host.port)
    };
    let upstream = |exactly: bool| {
        let fits = move |pattern: &HostPattern| if exactly { pattern == host } else { serves(pattern) };
        config.upstreams.iter().find(|upstream| upstream.hosts.iter().any(fits))
    };
    match upstream(true).or_else(|| upstream(false)) {
        Some(upstream) => Some(upstream.tls.mode),
        None if config.outbound.unknown == UnknownHostPolicy::Deny => None,
        None => Some(TlsMode::Off),
    }
}

fn port_of(config: &Config, port: u16) -> Option<&InboundPort> {
    config.inbound.ports.iter().find(|entry| entry.port == port)
}

fn mtls_of(config: &Config, port: u16) -> Mtls {
    port_of(config, port).and_then(|port| port.mtls).unwrap_or(config.inbound.mtls)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LoadedConfig, Source, load_sources};

    const SECURE: &str = "[identity]\ncert='/c'\nkey='/k'\nca='/r'\n[inbound]\nmtls='strict'\n[[inbound.port]]\nport=9090\nmtls='off'\n[[inbound.port]]\nport=9091\nmtls='strict'\n[[inbound.allow]]\nidentity=['spiffe://td/a']\n[inbound.jwt]\nissuer='i'\naudiences=['a']\njwks='/j'\n[outbound]\nunknown='deny'\n";

    fn load(text: &str) -> LoadedConfig {
        let sources = Sources(vec![Source { path: "o.toml".into(), text: text.to_owned() }]);
        load_sources(sources, &|_| None).unwrap()
    }

    fn reasons(old: &str, new: &str) -> Vec<String> {
        let (old, new) = (load(old), load(new));
        confirmation_reasons(
            Revision { config: &old.config, sources: &old.sources },
            Revision { config: &new.config, sources: &new.sources },
        )
    }

    #[test]
    fn less_protection_needs_confirmation_with_its_reason() {
        for (from, to, reason) in [
            (
                "mtls='strict'\n[[inbound.port]]\nport=9090",
                "mtls='permissive'\n[[inbound.port]]\nport=9090",
                "inbound.mtls is no longer \"strict\"",
            ),
            (
                "mtls='strict'\n[[inbound.port]]\nport=9090",
                "mtls='off'\n[[inbound.port]]\nport=9090",
                "inbound.mtls is no longer \"strict\"",
            ),
            (
                "port=9091\nmtls='strict'",
                "port=9091\nmtls='permissive'",
                "mtls of inbound port 9091 is no longer \"strict\"",
            ),
            ("[[inbound.allow]]\nidentity=['spiffe://td/a']\n", "", "inbound.allow is gone"),
            ("[inbound.jwt]\nissuer='i'\naudiences=['a']\njwks='/j'\n", "", "inbound.jwt is gone"),
            ("unknown='deny'", "unknown='forward'", "outbound.unknown is no longer \"deny\""),
        ] {
            let changed = SECURE.replacen(from, to, 1);
            assert_ne!(changed, SECURE, "{from}");
            assert_eq!(reasons(SECURE, &changed), [reason], "{from} -> {to}");
            assert!(reasons(&changed, SECURE).is_empty(), "more security is applied at once");
        }
    }

    #[test]
    fn removing_the_identity_also_removes_strict_mtls() {
        let old = "[identity]\ncert='/c'\nkey='/k'\nca='/r'\n[runtime]\nworkers=1";
        let found = reasons(old, "[runtime]\nworkers=1");
        assert_eq!(found, ["[identity] is gone", "inbound.mtls is no longer \"strict\""]);
    }

    #[test]
    fn an_emptied_file_needs_confirmation() {
        for empty in ["", "\n \n", "# nothing\n  # here"] {
            assert_eq!(reasons("[runtime]\nworkers=1", empty), ["o.toml is empty now"], "{empty:?}");
        }
        assert!(reasons("# nothing", "").is_empty(), "it was empty before");
    }

    const UPSTREAM: &str = "[[upstream]]\nname='p'\nhosts=['p.example','p']\nendpoints=['127.0.0.1:1']\ntls='mutual'\nidentity=['spiffe://td/p']\nca='/p'\nmin_tls='1.3'\n";

    /// Every prefix that ends with a line, as a full disk or a crashed editor may leave the file.
    #[test]
    fn a_file_truncated_at_any_line_is_never_less_secure_unconfirmed() {
        let allow = "[[inbound.allow]]\nidentity=['spiffe://td/a']\nmethods=['GET']\npaths=['/a']\nclaims={role='x'}\n";
        let jwt = "[inbound.jwt]\nissuer='i'\naudiences=['a']\njwks='/j'\nclaim_headers={x-user='sub'}\n";
        let identity = "[identity]\nmin_tls='1.2'\ncert='/c'\nkey='/k'\nca='/r'\ncrl='/l'\n";
        let outbound = "[outbound]\ndeny_networks=['10.0.0.0/8','169.254.0.0/16']\n";
        let parts = [identity, allow, jwt, outbound, UPSTREAM];
        for last in 0..parts.len() {
            let mut parts = parts.to_vec();
            parts[last..].rotate_left(1);
            let whole = parts.concat();
            for (end, _) in whole.match_indices('\n') {
                let cut = &whole[..=end];
                if cut.len() == whole.len() {
                    continue;
                }
                let sources = Sources(vec![Source { path: "o.toml".into(), text: cut.to_owned() }]);
                let Ok(loaded) = load_sources(sources, &|_| None) else { continue };
                let harmless = loaded.config == load(&whole).config;
                assert_eq!(reasons(&whole, cut).is_empty(), harmless, "{cut}");
            }
        }
    }

    #[test]
    fn an_allow_entry_that_lost_a_restriction_needs_confirmation() {
        let entry = |rest: &str| format!("[[inbound.allow]]\n{rest}\n");
        let config = |entries: &[&str]| {
            let entries: String = entries.iter().map(|rest| entry(rest)).collect();
            format!(
                "[identity]\ncert='/c'\nkey='/k'\nca='/r'\n[inbound.jwt]\nissuer='i'\naudiences=['a']\njwks='/j'\n{entries}"
            )
        };
        let (a, b) = ("identity=['spiffe://td/a']", "identity=['spiffe://td/b']");
        let public = format!("{a}\npaths=['/public*']");
        let methods = format!("{a}\nmethods=['GET','PUT']");
        let claims = format!("{a}\nclaims={{role='x'}}");
        let both = "identity=['spiffe://td/a','spiffe://td/b']";
        for (old, new, lost) in
            [(public.as_str(), a, "paths"), (&methods, a, "methods"), (&claims, a, "claims")]
        {
            let reason = format!("inbound.allow entry 1 has no {lost} any more");
            assert_eq!(reasons(&config(&[old]), &config(&[new])), [reason], "{old} -> {new}");
            assert!(reasons(&config(&[new]), &config(&[old])).is_empty(), "narrower");
            assert!(reasons(&config(&[old]), &config(&[old, old])).is_empty(), "the same");
            assert!(reasons(&config(&[old]), &config(&[old, b])).is_empty(), "another client");
        }
        for (old, new) in [
            (a, both),
            (a, "identity=['spiffe://td/*']"),
            (a, "identity=['dns:a']"),
            (&public, &format!("{a}\npaths=['/*']")),
            (&methods, &format!("{a}\nmethods=['GET','PUT','POST']")),
        ] {
            assert!(reasons(&config(&[old]), &config(&[new])).is_empty(), "{old} -> {new}");
        }
        assert!(reasons(&config(&[a, b]), &config(&[both])).is_empty(), "two entries in one");
        assert!(reasons(&config(&[both, &methods]), &config(&[b, a])).is_empty(), "one entry as two");
        let observed = format!("[runtime]\nobserve=['allow']\n{}", config(&[a]));
        assert!(reasons(&observed, &config(&[b])).is_empty(), "nothing was enforced");
        assert_eq!(
            reasons(&config(&[a]), &observed),
            ["inbound.allow is only observed by [runtime] observe"]
        );
    }

    #[test]
    fn all_reasons_are_reported_at_once() {
        let jwt = "jwks='/j'\nexcept=['/live','/open/*']\nclaim_headers={x-user='sub'}";
        let networks = "unknown='deny'\ndeny_networks=['10.0.0.0/8','169.254.0.0/16']";
        let identity = "ca='/r'\ncrl='/l'\nmin_tls='1.3'";
        let old = SECURE.replace("jwks='/j'", jwt).replace("unknown='deny'", networks);
        let old = format!("{}{UPSTREAM}", old.replace("ca='/r'", identity));
        let new = old
            .replace("claim_headers={x-user='sub'}", "")
            .replace("'10.0.0.0/8'", "'10.0.0.0/9'")
            .replace("crl='/l'", "")
            .replace("tls='mutual'\nidentity=['spiffe://td/p']\nca='/p'\nmin_tls='1.3'", "tls='simple'");
        assert_eq!(
            reasons(&old, &format!("{new}[runtime]\nobserve=['jwt']")),
            [
                "identity.crl is gone",
                "inbound.jwt.claim_headers lacks x-user",
                "inbound.jwt is only observed by [runtime] observe",
                "upstream p no longer uses tls = \"mutual\"",
                "identity of upstream p is gone",
                "ca of upstream p is gone",
                "outbound.deny_networks lacks 10.0.0.0/8",
            ]
        );
        assert!(reasons(&new, &old).is_empty(), "more security is applied at once");
    }

    /// Requests for its hosts would be forwarded in plaintext.
    #[test]
    fn removing_the_tls_upstream_of_a_host_needs_confirmation() {
        let identity = "[identity]\ncert='/c'\nkey='/k'\nca='/r'\n";
        let (old, reason) = (format!("{identity}{UPSTREAM}"), "upstream p no longer uses tls = \"mutual\"");
        let gone = format!("{reason}, as it is gone");
        assert_eq!(reasons(&old, identity), [gone.as_str()]);
        let one_host = old.replace("'p.example','p'", "'p'");
        assert_eq!(reasons(&old, &one_host), [reason]);
        assert!(reasons(&old, &old.replace("'p.example','p'", "'*.example','p'")).is_empty());
        assert!(reasons(&old, &old.replace("name='p'", "name='renamed'")).is_empty());
        let closed = "[outbound]\nunknown='deny'\n";
        assert!(reasons(&format!("{closed}{old}"), &format!("{closed}{identity}")).is_empty(), "refused");
        let plaintext = "[[upstream]]\nname='q'\nhosts=['p']\nendpoints=['127.0.0.1:1']\n";
        assert_eq!(
            reasons(
                &old,
                &format!("{one_host}{plaintext}").replace(
                    "hosts=['p']\nendpoints=['127.0.0.1:1']\ntls",
                    "hosts=['p.example']\nendpoints=['127.0.0.1:1']\ntls"
                )
            ),
            [reason]
        );
    }

    #[test]
    fn other_changes_are_applied_at_once() {
        let other = SECURE.replace("issuer='i'", "issuer='j'").replace("jwks='/j'", "jwks='/k'");
        assert!(reasons(SECURE, &other).is_empty());
        assert!(reasons("", SECURE).is_empty());
        assert!(reasons(SECURE, &SECURE.replace("port=9090\nmtls='off'", "port=9090")).is_empty());
        let wider = SECURE.replace("[outbound]", "[outbound]\ndeny_networks=['169.254.0.0/16']");
        assert!(reasons(&wider, &wider.replace("169.254.0.0/16", "169.0.0.0/8")).is_empty());
        let plaintext = "[[upstream]]\nname='q'\nendpoints=['127.0.0.1:1']\n";
        assert!(reasons(&format!("{SECURE}{plaintext}"), SECURE).is_empty());
    }
}
