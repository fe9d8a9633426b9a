//! What `status`, `set` and `drain` share: where the sidecar is, and how its answer ends the command.

use std::{future::Future, path::PathBuf, process::ExitCode};

use clap::Args;

use crate::{
    admin::client::{Client, ClientError},
    config::AdminListen,
};

#[derive(Args, Debug)]
pub struct AdminArgs {
    /// The sidecar's admin address: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", env = "OUTRIGGER_ADMIN", default_value = "localhost:4191")]
    admin: AdminListen,
    /// The file with the admin token [default: the one that the sidecar names]
    #[arg(long, value_name = "FILE", env = "OUTRIGGER_ADMIN_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

impl AdminArgs {
    pub fn client(&self) -> Client {
        Client::new(self.admin.clone(), self.token_file.clone())
    }
}

/// Runs the exchange and says what went wrong with it, if anything.
pub fn finish(exchange: impl Future<Output = Result<(), ClientError>>) -> ExitCode {
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
