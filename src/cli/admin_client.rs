//! Shared by `status`, `set`, `drain` and `reload`: the sidecar's address, and the exit code.

use std::{fmt::Display, future::Future, path::PathBuf, process::ExitCode};

use clap::Args;

use crate::{
    admin::client::{AdminClient, AdminClientError},
    config::AdminListen,
};

#[derive(Args, Debug)]
pub struct AdminArgs {
    /// The sidecar's admin address: HOST:PORT, PORT or unix:PATH
    #[arg(
        long,
        value_name = "ADDR",
        env = "OUTRIGGER_ADMIN",
        default_value = "localhost:4191",
        value_parser = parse_admin
    )]
    admin: AdminListen,
    /// The file with the admin token [default: the one that the sidecar reports]
    #[arg(long, value_name = "FILE", env = "OUTRIGGER_ADMIN_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

/// `4191` and `:4191` mean a port on localhost.
fn parse_admin(text: &str) -> Result<AdminListen, String> {
    let port = text.strip_prefix(':').unwrap_or(text);
    if port.parse::<u16>().is_ok() { format!("localhost:{port}").parse() } else { text.parse() }
}

impl AdminArgs {
    pub fn client(&self) -> AdminClient {
        AdminClient::new(self.admin.clone(), self.token_file.clone())
    }
}

/// Runs the exchange and prints its error, if any.
pub fn finish(exchange: impl Future<Output = Result<(), AdminClientError>>) -> ExitCode {
    run_to_end(exchange)
}

/// The same for a command that has more ways to fail.
pub fn run_to_end<E: Display>(exchange: impl Future<Output = Result<(), E>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("outrigger: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(exchange) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_admin_address_may_be_only_a_port() {
        for (text, address) in [
            ("4191", "localhost:4191"),
            (":4291", "localhost:4291"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("unix:/run/a.sock", "unix:/run/a.sock"),
        ] {
            assert_eq!(
                parse_admin(text).map(|address| address.to_string()),
                Ok(address.to_owned()),
                "{text}"
            );
        }
        assert!(parse_admin("nowhere").is_err());
    }
}
