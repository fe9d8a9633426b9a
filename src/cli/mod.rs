//! The command line: one file per command.

mod admin_client;
mod cache;
mod certs;
mod check;
mod completions;
mod config;
mod demo;
mod drain;
mod exec_service;
mod explain;
pub mod files;
mod inject;
mod man;
mod queue;
mod redirect;
mod reload;
mod run;
mod set;
mod status;
mod webhook;

use std::process::ExitCode;

use clap::{
    CommandFactory, Parser, Subcommand,
    error::{ContextKind, ContextValue, ErrorKind},
};

/// A sidecar resilience proxy for a service's inbound and outbound requests.
#[derive(Parser, Debug)]
#[command(
    name = "outrigger",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  outrigger demo                              see it working
  outrigger run --app 8080 -- ./my-service    start a service with its sidecar
  outrigger run -c outrigger.toml             start the sidecar alone
  outrigger status --watch                    show a running sidecar

The service sends its requests to localhost:4140 (http_proxy), clients connect to port 4143, and the admin page is
http://localhost:4191.
Exit codes: 0 success, 1 failure, 2 wrong usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Run(run::RunArgs),
    Check(check::CheckArgs),
    Explain(explain::ExplainArgs),
    Config(config::ConfigArgs),
    Certs(certs::CertsArgs),
    Status(status::StatusArgs),
    Set(set::SetArgs),
    Cache(cache::CacheArgs),
    Drain(drain::DrainArgs),
    Reload(reload::ReloadArgs),
    Queue(queue::QueueArgs),
    #[command(hide = true)]
    ExecService(exec_service::ExecServiceArgs),
    Redirect(redirect::RedirectArgs),
    Inject(inject::InjectArgs),
    Webhook(webhook::WebhookArgs),
    Demo(demo::DemoArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

/// Parses the arguments and runs the command.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(mut error) => {
            suggest(&mut error);
            let written: Vec<String> =
                std::env::args_os().map(|one| one.to_string_lossy().into_owned()).collect();
            let tip = tip(&error, &written);
            // Help goes to stdout, errors to stderr. A closed pipe is ignored.
            let _ = error.print();
            if let Some(tip) = tip {
                eprintln!("\n  tip: {tip}");
            }
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(2),
            };
        }
    };
    match cli.command {
        Command::Run(args) => run::run(args),
        Command::Check(args) => check::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Certs(args) => certs::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Set(args) => set::run(args),
        Command::Cache(args) => cache::run(args),
        Command::Drain(args) => drain::run(&args),
        Command::Reload(args) => reload::run(&args),
        Command::Queue(args) => queue::run(&args),
        Command::ExecService(args) => exec_service::run(&args),
        Command::Redirect(args) => redirect::run(&args),
        Command::Inject(args) => inject::run(&args),
        Command::Webhook(args) => webhook::run(args),
        Command::Demo(args) => demo::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
    }
}

/// Suggests the intended command where letters are transposed (`rnu`); clap's own similarity misses that.
fn suggest(error: &mut clap::Error) {
    if error.kind() != ErrorKind::InvalidSubcommand || error.get(ContextKind::SuggestedSubcommand).is_some() {
        return;
    }
    let Some(ContextValue::String(written)) = error.get(ContextKind::InvalidSubcommand) else { return };
    let similarity = |name: &str| strsim::normalized_damerau_levenshtein(written, name);
    let nearest = command()
        .get_subcommands()
        .map(|command| command.get_name().to_owned())
        .max_by(|a, b| similarity(a).total_cmp(&similarity(b)))
        .filter(|name| similarity(name) > 0.6);
    if let Some(name) = nearest {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(vec![name]));
    }
}

/// A tip for an unexpected positional argument: it is probably a configuration file, or the service's command.
fn tip(error: &clap::Error, written: &[String]) -> Option<String> {
    if error.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else { return None };
    let command = written.get(1)?.as_str();
    let is_file = [".toml", ".conf", ".cfg", ".yaml", ".yml"].iter().any(|end| argument.ends_with(end));
    match command {
        _ if argument.starts_with('-') => None,
        "run" if !is_file => Some(format!("to start the service: `outrigger run -- {argument} …`")),
        "run" | "check" | "explain" => Some(format!("to name the file: `outrigger {command} -c {argument}`")),
        _ => None,
    }
}

/// The whole command line, for completions and manual pages.
fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_valid_and_every_command_has_an_example() {
        command().debug_assert();
        has_example(&command());
    }

    #[test]
    fn the_intended_command_is_suggested() {
        for (written, meant) in [("rnu", "'run'"), ("chekc", "'check'"), ("statsu", "'status'")] {
            let mut error = Cli::try_parse_from(["outrigger", written]).unwrap_err();
            suggest(&mut error);
            assert!(error.to_string().contains(meant), "{error}");
        }
        let mut error = Cli::try_parse_from(["outrigger", "fly"]).unwrap_err();
        suggest(&mut error);
        assert!(!error.to_string().contains("similar"), "{error}");
    }

    #[test]
    fn a_positional_file_or_command_gets_a_tip() {
        for (line, meant) in [
            (&["check", "o.toml"][..], "outrigger check -c o.toml"),
            (&["check", "dir/config"], "outrigger check -c dir/config"),
            (&["run", "o.toml"], "outrigger run -c o.toml"),
            (&["run", "node", "server.js"], "outrigger run -- node …"),
        ] {
            let written: Vec<String> = ["outrigger"].iter().chain(line).map(ToString::to_string).collect();
            let error = Cli::try_parse_from(&written).unwrap_err();
            let tip = tip(&error, &written).unwrap_or_default();
            assert!(tip.contains(meant), "{tip} for {line:?}");
        }
        let written = ["outrigger", "check", "--no-such"].map(ToOwned::to_owned);
        assert_eq!(tip(&Cli::try_parse_from(&written).unwrap_err(), &written), None);
    }

    fn has_example(command: &clap::Command) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("outrigger "), "`{} --help` has no example", command.get_name());
        command.get_subcommands().for_each(has_example);
    }
}
