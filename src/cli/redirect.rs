//! `outrigger redirect apply|clear|print`: kernel rules that redirect the pod's traffic to the proxy.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::{
    config::Network,
    redirect::{self, Backend, Plan, PortRange, RedirectError, Scope},
};

/// The admin port and the probe port.
const OWN_PORTS: [u16; 2] = [4191, 4192];
/// Limit of ports or networks in one list: each is a rule that every new connection passes.
const MAX_LIST: usize = 256;

/// Redirect the pod's traffic to the proxy by kernel rules (Linux; root with NET_ADMIN).
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger redirect apply                                 what an injected pod's init container runs
  outrigger redirect apply --skip-outbound-ports 3306,25   does not redirect these connections
  outrigger redirect print | nft -c -f -                   prints the rules and checks them
  outrigger redirect clear                                 removes the rules")]
pub struct RedirectArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    Apply(ApplyArgs),
    Clear(ClearArgs),
    Print(PrintArgs),
}

/// Install the rules, replacing earlier ones, and verify that they work.
///
/// TCP from outside goes to the inbound port, TCP of the pod's processes to the outbound port. Not redirected: the
/// proxy's own connections, everything on the loopback device, and what is skipped. Idempotent.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger redirect apply
  outrigger redirect apply --skip-inbound-ports 22,9000-9010 --skip-outbound-cidrs 10.96.0.1/32
  outrigger redirect apply --host --skip-inbound-ports 22 --uid 995     a machine without containers")]
struct ApplyArgs {
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    backend: BackendArgs,
    /// Redirect the traffic of this whole machine. Without it, rules in the host's own network namespace are refused
    #[arg(long)]
    host: bool,
}

/// Remove the rules; open connections stay.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger redirect clear")]
struct ClearArgs {
    #[command(flatten)]
    backend: BackendArgs,
}

/// Print the rules that `apply` would install.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger redirect print
  outrigger redirect print --backend iptables --skip-outbound-ports 25")]
struct PrintArgs {
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    backend: BackendArgs,
}

#[derive(Args, Debug)]
struct BackendArgs {
    /// Kernel interface for the rules
    #[arg(long, value_enum, value_name = "BACKEND", default_value_t)]
    backend: Backend,
}

#[derive(Args, Debug)]
struct PlanArgs {
    /// The proxy's port for connections from outside
    #[arg(long, value_name = "PORT", default_value_t = 4143, value_parser = clap::value_parser!(u16).range(1..))]
    inbound_port: u16,
    /// The proxy's port for connections of the pod's processes
    #[arg(long, value_name = "PORT", default_value_t = 4140, value_parser = clap::value_parser!(u16).range(1..))]
    outbound_port: u16,
    /// The proxy's user, whose connections are not redirected; may be given more than once
    #[arg(long, value_name = "UID", value_delimiter = ',', default_values_t = [4140])]
    uid: Vec<u32>,
    /// Ports of the pod that clients reach without the proxy; 4191 and 4192 always are
    #[arg(long, value_name = "PORTS", default_value = "", hide_default_value = true, value_parser = parse_list::<PortRange>)]
    skip_inbound_ports: List<PortRange>,
    /// Ports that the pod's processes reach without the proxy
    #[arg(long, value_name = "PORTS", default_value = "", hide_default_value = true, value_parser = parse_list::<PortRange>)]
    skip_outbound_ports: List<PortRange>,
    /// Networks that the pod's processes reach without the proxy
    #[arg(long, value_name = "CIDRS", default_value = "", hide_default_value = true, value_parser = parse_list::<Network>)]
    skip_outbound_cidrs: List<Network>,
}

/// A comma-separated list, which may be empty, so that a template can always write the option.
#[derive(Clone, Debug)]
struct List<T>(Vec<T>);

fn parse_list<T: std::str::FromStr>(text: &str) -> Result<List<T>, String>
where
    T::Err: std::fmt::Display,
{
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    let list: Vec<T> =
        items.map(|item| item.parse().map_err(|e: T::Err| e.to_string())).collect::<Result<_, _>>()?;
    if list.len() > MAX_LIST {
        return Err(format!("{} entries are more than {MAX_LIST}; use ranges", list.len()));
    }
    Ok(List(list))
}

impl PlanArgs {
    fn plan(&self) -> Plan {
        let own = OWN_PORTS.map(PortRange::from);
        Plan {
            inbound_port: self.inbound_port,
            outbound_port: self.outbound_port,
            users: self.uid.clone(),
            skip_inbound: own.into_iter().chain(self.skip_inbound_ports.0.iter().copied()).collect(),
            skip_outbound: self.skip_outbound_ports.0.clone(),
            skip_networks: self.skip_outbound_cidrs.0.clone(),
        }
    }
}

pub fn run(args: &RedirectArgs) -> ExitCode {
    match act(&args.action) {
        Ok(output) => {
            print!("{output}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("outrigger: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act(action: &Action) -> Result<String, RedirectError> {
    Ok(match action {
        Action::Apply(args) => {
            let plan = args.plan.plan();
            let scope = if args.host { Scope::Host } else { Scope::Namespace };
            let by = backend_name(redirect::apply(&plan, args.backend.backend, scope)?);
            format!(
                "redirected by {by}: from outside to port {}, of the pod's processes to port {}; verified\n",
                plan.inbound_port, plan.outbound_port
            )
        }
        Action::Clear(args) => {
            format!("cleared by {}\n", backend_name(redirect::clear(args.backend.backend)?))
        }
        Action::Print(args) => redirect::print(&args.plan.plan(), args.backend.backend),
    })
}

fn backend_name(backend: Backend) -> &'static str {
    if backend == Backend::Iptables { "iptables" } else { "nftables" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_may_be_empty_and_errors_name_the_invalid_entry() {
        assert!(parse_list::<PortRange>("").unwrap().0.is_empty());
        assert_eq!(parse_list::<PortRange>("22, 80-90,").unwrap().0.len(), 2);
        assert!(parse_list::<PortRange>("22,http").unwrap_err().contains("`http`"));
        assert!(parse_list::<Network>("10.0.0.0/33").unwrap_err().contains("10.0.0.0/33"));
        assert!(parse_list::<PortRange>(&"1,".repeat(300)).unwrap_err().contains("256"));
    }
}
