//! The rules for `iptables-restore` and `ip6tables-restore`, for kernels without nf_tables.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    net::IpAddr,
    process::{Command, Stdio},
};

use super::plan::{Hook, Match, Plan, Rule, RuleAction};

/// How long to wait for the xtables lock, in seconds.
const LOCK_TIMEOUT: &str = "5";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    fn program(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }

    fn has(self, address: IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }
}

fn chain(hook: Hook) -> (&'static str, &'static str) {
    match hook {
        Hook::Inbound => ("PREROUTING", "OUTRIGGER_IN"),
        Hook::Outbound => ("OUTPUT", "OUTRIGGER_OUT"),
    }
}

/// The input for `iptables-restore --noflush`. Declaring a chain empties it. The jump to it is added if it is missing.
pub(super) fn restore(plan: &Plan, family: Family, jumps: impl Fn(Hook) -> bool) -> String {
    let mut text = "*nat\n".to_owned();
    for hook in Hook::ALL {
        let _ = writeln!(text, ":{} - [0:0]", chain(hook).1);
    }
    for hook in Hook::ALL {
        let (at, own) = chain(hook);
        for rule in plan.rules(hook) {
            if let Some(arguments) = rule_arguments(hook, &rule, family) {
                let _ = writeln!(text, "-A {own} {arguments}");
            }
        }
        if !jumps(hook) {
            let _ = writeln!(text, "-A {at} -p tcp -j {own}");
        }
    }
    text.push_str("COMMIT\n");
    text
}

/// The arguments of a rule; `None`: the rule is for the other family.
fn rule_arguments(hook: Hook, rule: &Rule, family: Family) -> Option<String> {
    let mut arguments = "-p tcp".to_owned();
    for rule_match in &rule.matches {
        let _ = match rule_match {
            Match::Loopback if hook == Hook::Inbound => write!(arguments, " -i lo"),
            Match::Loopback => write!(arguments, " -o lo"),
            Match::User(user) => write!(arguments, " -m owner --uid-owner {user}"),
            Match::Ports(ports) => write!(arguments, " --dport {}:{}", ports.first, ports.last),
            Match::Destination(network) if family.has(network.address) => {
                write!(arguments, " -d {}/{}", network.address, network.prefix)
            }
            Match::Destination(_) => return None,
        };
    }
    let _ = match rule.action {
        RuleAction::Accept => write!(arguments, " -j RETURN"),
        RuleAction::Redirect(port) => write!(arguments, " -j REDIRECT --to-ports {port}"),
    };
    Some(arguments)
}

pub(super) fn apply(plan: &Plan) -> io::Result<()> {
    for family in Family::ALL {
        let text = restore(plan, family, |hook| jumps(family, hook));
        run(&format!("{}-restore", family.program()), &["--noflush", "-w", LOCK_TIMEOUT], Some(&text))?;
    }
    Ok(())
}

/// Removes our chains; succeeds if there are none.
pub(super) fn clear() -> io::Result<()> {
    for family in Family::ALL {
        for hook in Hook::ALL {
            let (at, own) = chain(hook);
            let run = |arguments: &[&str]| {
                let all =
                    ["-w", LOCK_TIMEOUT, "-t", "nat"].iter().chain(arguments).copied().collect::<Vec<_>>();
                run(family.program(), &all, None)
            };
            while jumps(family, hook) {
                run(&["-D", at, "-p", "tcp", "-j", own])?;
            }
            if run(&["-S", own]).is_ok() {
                run(&["-F", own])?;
                run(&["-X", own])?;
            }
        }
    }
    Ok(())
}

fn jumps(family: Family, hook: Hook) -> bool {
    let (at, own) = chain(hook);
    run(family.program(), &["-w", LOCK_TIMEOUT, "-t", "nat", "-C", at, "-p", "tcp", "-j", own], None).is_ok()
}

/// Whether iptables can be executed.
pub(super) fn is_installed() -> bool {
    let mut command = Command::new(Family::V4.program());
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn run(program: &str, arguments: &[&str], input: Option<&str>) -> io::Result<()> {
    let failed = |kind, reason: &str| io::Error::new(kind, format!("{program}: {reason}"));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.kind(), &error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.unwrap_or_default().as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(io::ErrorKind::Other, String::from_utf8_lossy(&output.stderr).trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redirect::plan::example;

    #[test]
    fn each_family_gets_its_rules_and_one_jump() {
        let text = restore(&example(), Family::V6, |hook| hook == Hook::Inbound);
        assert!(text.starts_with("*nat\n:OUTRIGGER_IN - [0:0]\n:OUTRIGGER_OUT - [0:0]\n"), "{text}");
        assert!(text.contains("-A OUTRIGGER_OUT -p tcp -d fd00::/8 -j RETURN\n"), "{text}");
        assert!(
            text.contains(
                "-A OUTRIGGER_OUT -p tcp -d ::1/128 --dport 4144:4144 -j REDIRECT --to-ports 4140\n"
            )
        );
        assert!(!text.contains("10.1.0.0"), "{text}");
        assert!(!text.contains("-A PREROUTING"), "{text}");
        assert!(text.contains("-A OUTPUT -p tcp -j OUTRIGGER_OUT\n"), "{text}");
    }
}
