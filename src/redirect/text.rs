//! The rules in `nft` syntax, for people and for `nft -f -`.

use std::{fmt::Write as _, net::IpAddr};

use super::{
    TABLE_NAME,
    plan::{Hook, Match, Plan, Rule, RuleAction},
};

/// The whole table. Loading it replaces an earlier one.
pub(super) fn nft(plan: &Plan) -> String {
    let mut text =
        format!("table inet {TABLE_NAME}\ndelete table inet {TABLE_NAME}\n\ntable inet {TABLE_NAME} {{\n");
    for hook in Hook::ALL {
        let (chain, at) = match hook {
            Hook::Inbound => ("inbound", "prerouting"),
            Hook::Outbound => ("outbound", "output"),
        };
        let _ = writeln!(text, "\tchain {chain} {{");
        let _ = writeln!(text, "\t\ttype nat hook {at} priority -100; policy accept;");
        for rule in plan.rules(hook) {
            let _ = writeln!(text, "\t\t{} comment \"{}\"", rule_text(hook, &rule), rule.comment);
        }
        text.push_str("\t}\n");
    }
    text.push_str("}\n");
    text
}

fn rule_text(hook: Hook, rule: &Rule) -> String {
    let mut parts = vec!["meta l4proto tcp".to_owned()];
    parts.extend(rule.matches.iter().map(|rule_match| match rule_match {
        Match::Loopback if hook == Hook::Inbound => "iifname \"lo\"".to_owned(),
        Match::Loopback => "oifname \"lo\"".to_owned(),
        Match::User(user) => format!("meta skuid {user}"),
        Match::Ports(ports) => format!("tcp dport {ports}"),
        Match::Destination(network) => {
            let family = if matches!(network.address, IpAddr::V4(_)) { "ip" } else { "ip6" };
            format!("{family} daddr {}/{}", network.address, network.prefix)
        }
    }));
    parts.push(match rule.action {
        RuleAction::Accept => "accept".to_owned(),
        RuleAction::Redirect(port) => format!("redirect to :{port}"),
    });
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redirect::plan::example;

    #[test]
    fn the_syntax_is_that_of_nft() {
        let text = nft(&example());
        for line in [
            "meta l4proto tcp iifname \"lo\" accept comment \"stays in the pod\"",
            "meta l4proto tcp tcp dport 9000-9010 accept comment \"skipped\"",
            "meta l4proto tcp ip daddr 127.0.0.1/32 tcp dport 4144 redirect to :4140 comment \"shows that the rules work\"",
            "meta l4proto tcp ip6 daddr fd00::/8 accept comment \"skipped\"",
            "meta l4proto tcp meta skuid 4140 accept comment \"the proxy's own\"",
            "meta l4proto tcp redirect to :4143 comment \"all else\"",
        ] {
            assert!(text.contains(&format!("\t\t{line}\n")), "no {line:?} in\n{text}");
        }
    }
}
