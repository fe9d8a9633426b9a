//! `outrigger config example` and `outrigger config schema`

use std::{io::Write, process::ExitCode};

use clap::{Args, Subcommand};

use crate::config;

/// Print an example configuration, or the JSON Schema of the configuration.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger config example > outrigger.toml
  outrigger config schema > outrigger.schema.json")]
pub struct ConfigArgs {
    #[command(subcommand)]
    document: Document,
}

#[derive(Subcommand, Debug)]
enum Document {
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
    let text = match args.document {
        Document::Example => config::EXAMPLE.to_owned(),
        Document::Schema => format!("{:#}\n", config::json_schema()),
    };
    // A closed pipe is ignored.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
