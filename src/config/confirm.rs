//! Which changes a running process does not take without confirmation: those that protect the service less.
//!
//! A full disk empties a file, an editor saves half of one. What is left is valid, and lets everybody in.

use std::{collections::BTreeSet, path::Path};

use super::{Config, InboundPort, Mtls, Sources, Unknown};

/// Why a new configuration needs to be confirmed before it replaces another: a phrase for each reason; none where it
/// may be applied at once.
pub fn needs_confirmation(old: (&Config, &Sources), new: (&Config, &Sources)) -> Vec<String> {
    let mut reasons: Vec<String> =
        emptied(old.1, new.1).map(|path| format!("{} is empty now", path.display())).collect();
    reasons.extend(less_secure(old.0, new.0));
    reasons
}

/// The files that held something and hold nothing any more, or are gone where they may be.
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
    let mut note = |less: bool, reason: &str| {
        if less {
            reasons.push(reason.to_owned());
        }
    };
    note(old.identity.is_some() && new.identity.is_none(), "[identity] is gone");
    note(!old.inbound.allow.is_empty() && new.inbound.allow.is_empty(), "inbound.allow is gone");
    note(old.inbound.jwt.is_some() && new.inbound.jwt.is_none(), "inbound.jwt is gone");
    let opened = |old: Mtls, new: Mtls| old == Mtls::Strict && new != Mtls::Strict;
    note(opened(old.inbound.mtls, new.inbound.mtls), "inbound.mtls is no longer \"strict\"");
    let ports: BTreeSet<u16> =
        [old, new].iter().flat_map(|config| &config.inbound.ports).map(|p| p.port).collect();
    for port in ports {
        // A port without a word of its own is what `[inbound]` says, of which it has been told.
        let is_general = |config: &Config| port_of(config, port).and_then(|port| port.mtls).is_none();
        if opened(mtls_of(old, port), mtls_of(new, port)) && !(is_general(old) && is_general(new)) {
            note(true, &format!("mtls of inbound port {port} is no longer \"strict\""));
        }
    }
    let opened = old.outbound.unknown == Unknown::Deny && new.outbound.unknown != Unknown::Deny;
    note(opened, "outbound.unknown is no longer \"deny\"");
    reasons
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
    use crate::config::{Source, load_sources};

    const SECURE: &str = "[identity]\ncert='/c'\nkey='/k'\nca='/r'\n[inbound]\nmtls='strict'\n[[inbound.port]]\nport=9090\nmtls='off'\n[[inbound.port]]\nport=9091\nmtls='strict'\n[[inbound.allow]]\nidentity=['spiffe://td/a']\n[inbound.jwt]\nissuer='i'\naudiences=['a']\njwks='/j'\n[outbound]\nunknown='deny'\n";

    fn reasons(old: &str, new: &str) -> Vec<String> {
        let read = |text: &str| {
            let sources = Sources(vec![Source { path: "o.toml".into(), text: text.to_owned() }]);
            load_sources(sources, &|_| None).unwrap()
        };
        let (old, new) = (read(old), read(new));
        needs_confirmation((&old.config, &old.sources), (&new.config, &new.sources))
    }

    #[test]
    fn what_protects_less_needs_confirmation_each_with_its_reason() {
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
            assert!(reasons(&changed, SECURE).is_empty(), "more security is taken at once");
        }
    }

    #[test]
    fn an_identity_that_goes_takes_strict_with_it() {
        let old = "[identity]\ncert='/c'\nkey='/k'\nca='/r'\n[runtime]\nworkers=1";
        let told = reasons(old, "[runtime]\nworkers=1");
        assert_eq!(told, ["[identity] is gone", "inbound.mtls is no longer \"strict\""]);
    }

    #[test]
    fn an_emptied_file_needs_confirmation_whatever_it_held() {
        for empty in ["", "\n \n", "# nothing\n  # here"] {
            assert_eq!(reasons("[runtime]\nworkers=1", empty), ["o.toml is empty now"], "{empty:?}");
        }
        assert!(reasons("# nothing", "").is_empty(), "it held nothing before");
    }

    #[test]
    fn other_changes_are_taken_at_once() {
        let more = SECURE.replace("spiffe://td/a", "spiffe://td/*").replace("issuer='i'", "issuer='j'");
        assert!(reasons(SECURE, &more).is_empty());
        assert!(reasons("", SECURE).is_empty());
        assert!(reasons(SECURE, &SECURE.replace("port=9090\nmtls='off'", "port=9090")).is_empty());
    }
}
