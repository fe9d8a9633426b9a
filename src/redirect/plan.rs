//! What is redirected and what is exempt, as a list of rules. The first matching rule decides.

use std::{fmt, net::IpAddr, str::FromStr};

use super::PROBE_PORT;
use crate::config::Network;

/// The settings of `redirect apply`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The proxy's port for connections from outside.
    pub inbound_port: u16,
    /// The proxy's port for connections of the pod.
    pub outbound_port: u16,
    /// Users whose connections are exempt: the proxy's.
    pub users: Vec<u32>,
    pub skip_inbound: Vec<PortRange>,
    pub skip_outbound: Vec<PortRange>,
    pub skip_networks: Vec<Network>,
}

/// What the rules do, as a clause: `redirect every TCP connection …`.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "redirect every TCP connection from outside to port {}", self.inbound_port)?;
        list(f, " (except to port ", &self.skip_inbound)?;
        let users: Vec<String> = self.users.iter().map(ToString::to_string).collect();
        let (users, port) = (users.join(", "), self.outbound_port);
        write!(
            f,
            " and every TCP connection of all processes here, except those of user {users}, to port {port}"
        )?;
        list(f, " (except to port ", &self.skip_outbound)?;
        write!(f, "; if no proxy listens there, connections are refused, including remote logins")
    }
}

fn list(f: &mut fmt::Formatter<'_>, before: &str, ranges: &[PortRange]) -> fmt::Result {
    if ranges.is_empty() {
        return Ok(());
    }
    let all: Vec<String> = ranges.iter().map(ToString::to_string).collect();
    write!(f, "{before}{})", all.join(", "))
}

/// One port, or `9000-9010`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl From<u16> for PortRange {
    fn from(port: u16) -> Self {
        Self { first: port, last: port }
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || format!("`{text}` is neither a port (1-65535) nor a range of ports like 9000-9010");
        let port = |text: &str| match text.trim().parse::<u16>() {
            Ok(0) | Err(_) => Err(invalid()),
            Ok(port) => Ok(port),
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = Self { first: port(first)?, last: port(last)? };
        if range.first > range.last { Err(invalid()) } else { Ok(range) }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// The netfilter hook for a connection's first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    /// From outside of the pod.
    Inbound,
    /// From a process of the pod.
    Outbound,
}

impl Hook {
    pub const ALL: [Self; 2] = [Self::Inbound, Self::Outbound];
}

/// A condition for a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Match {
    /// Arrives or leaves on the loopback device.
    Loopback,
    User(u32),
    Ports(PortRange),
    Destination(Network),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RuleAction {
    Accept,
    Redirect(u16),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub matches: Vec<Match>,
    pub action: RuleAction,
    /// The rule's comment in listings.
    pub comment: &'static str,
}

impl Plan {
    /// The rules for TCP connections at a hook, in order.
    pub(super) fn rules(&self, hook: Hook) -> Vec<Rule> {
        let exempt =
            |matches: Match, why| Rule { matches: vec![matches], action: RuleAction::Accept, comment: why };
        let mut rules = Vec::new();
        match hook {
            Hook::Inbound => {
                rules.push(exempt(Match::Loopback, "stays in the pod"));
                rules.push(exempt(Match::Ports(self.inbound_port.into()), "meant for the proxy"));
                rules.extend(self.skip_inbound.iter().map(|ports| exempt(Match::Ports(*ports), "skipped")));
            }
            Hook::Outbound => {
                rules.extend(probe_networks().map(|network| Rule {
                    matches: vec![Match::Destination(network), Match::Ports(PROBE_PORT.into())],
                    action: RuleAction::Redirect(self.outbound_port),
                    comment: "shows that the rules work",
                }));
                rules.extend(self.users.iter().map(|user| exempt(Match::User(*user), "the proxy's own")));
                rules.push(exempt(Match::Loopback, "stays in the pod"));
                rules.push(exempt(Match::Destination(link_local()), "link-local"));
                rules.extend(self.skip_outbound.iter().map(|ports| exempt(Match::Ports(*ports), "skipped")));
                rules.extend(
                    self.skip_networks.iter().map(|network| exempt(Match::Destination(*network), "skipped")),
                );
            }
        }
        let to = match hook {
            Hook::Inbound => self.inbound_port,
            Hook::Outbound => self.outbound_port,
        };
        rules.push(Rule { matches: Vec::new(), action: RuleAction::Redirect(to), comment: "all else" });
        rules
    }
}

/// Packets with such a source address cannot be redirected to loopback: the kernel drops them, and the client hangs.
fn link_local() -> Network {
    Network { address: IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 0]), prefix: 10 }
}

fn probe_networks() -> impl Iterator<Item = Network> {
    [(IpAddr::from([127, 0, 0, 1]), 32), (IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), 128)]
        .into_iter()
        .map(|(address, prefix)| Network { address, prefix })
}

#[cfg(test)]
pub(super) fn example() -> Plan {
    Plan {
        inbound_port: 4143,
        outbound_port: 4140,
        users: vec![4140],
        skip_inbound: vec![4191.into(), "9000-9010".parse().unwrap()],
        skip_outbound: vec![25.into()],
        skip_networks: vec!["10.1.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_parsed_and_errors_name_the_text() {
        assert_eq!("22".parse(), Ok(PortRange { first: 22, last: 22 }));
        assert_eq!("9000-9010".parse(), Ok(PortRange { first: 9000, last: 9010 }));
        for invalid in ["", "0", "70000", "9010-9000", "http", "1-", "-1", "1,2"] {
            assert!(invalid.parse::<PortRange>().unwrap_err().contains(invalid), "{invalid}");
        }
    }

    #[test]
    fn the_proxys_own_connections_are_exempt_before_any_redirection() {
        let rules = example().rules(Hook::Outbound);
        let at = |verdict: RuleAction, matches: &[Match]| {
            rules.iter().position(|rule| rule.action == verdict && rule.matches == matches).unwrap()
        };
        let own = at(RuleAction::Accept, &[Match::User(4140)]);
        let all = at(RuleAction::Redirect(4140), &[]);
        assert!(own < all);
        assert_eq!(all, rules.len() - 1);
        let (probes, rest) = rules.split_at(own);
        assert!(probes.iter().all(|rule| rule.matches.contains(&Match::Ports(PROBE_PORT.into()))));
        assert_eq!(rest.iter().filter(|rule| rule.action != RuleAction::Accept).count(), 1);
    }
}
