//! `outrigger config example` and `outrigger config schema`

use std::{io::Write, process::ExitCode};

use clap::{Args, Subcommand};

use crate::config;

/// Print an example of the configuration, or its JSON Schema.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger config example > outrigger.toml
  outrigger config schema > outrigger.schema.json")]
pub struct ConfigArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// A commented example of every key with its default.
    #[command(after_help = "\
Examples:
  outrigger config example > outrigger.toml")]
    Example,
    /// A JSON Schema, for editors.
    #[command(after_help = "\
Examples:
  outrigger config schema > outrigger.schema.json    and put `#:schema ./outrigger.schema.json` first in the file")]
    Schema,
}

pub fn run(args: &ConfigArgs) -> ExitCode {
    let text = match args.what {
        What::Example => config::EXAMPLE.to_owned(),
        What::Schema => format!("{:#}\n", config::json_schema()),
    };
    // A closed pipe is the reader's decision.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
