//! `outrigger check [-c FILE]…`

use std::{io::Write, process::ExitCode, time::SystemTime};

use clap::Args;

use super::files::{ConfigFiles, colour};
use crate::{
    config::{Diagnostics, Loaded, Problem},
    identity::files,
};

/// Check the configuration: every problem with its place and what to write instead.
///
/// Exits with 0 where it can be used (warnings may remain), with 1 where it cannot.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger check                            ./outrigger.toml or $OUTRIGGER_CONFIG
  outrigger check -c base.toml -c prod.toml  the two together, the later one wins
  outrigger check --json -c base.toml        for programs")]
pub struct CheckArgs {
    #[command(flatten)]
    files: ConfigFiles,
    /// Print the problems as a JSON array.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &CheckArgs) -> ExitCode {
    let files = args.files.paths();
    let (found, ok) = match args.files.load() {
        Ok(loaded) => {
            let wrong = certificates(&loaded);
            let ok = wrong.is_empty();
            let mut found = loaded.warnings;
            found.problems.extend(wrong);
            (found, ok)
        }
        Err(problems) => (problems, false),
    };
    let mut out = std::io::stdout().lock();
    let text = if args.json {
        format!("{:#}\n", found.to_json())
    } else {
        let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
        let what =
            if names.is_empty() { "no file: the built-in defaults".to_owned() } else { names.join(", ") };
        format!("{}{what}: {}\n", found.render(colour(&out)), summary(&found))
    };
    // A closed pipe is the reader's decision.
    let _ = out.write_all(text.as_bytes());
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What is wrong with the files of certificates.
fn certificates(loaded: &Loaded) -> Vec<Problem> {
    let place = |upstream: Option<usize>| match upstream {
        None => loaded.tree.get("identity"),
        Some(at) => loaded.tree.get("upstream")?.item(at)?.get("ca"),
    };
    files::check(&loaded.config, SystemTime::now())
        .into_iter()
        .map(|(upstream, error)| {
            Problem::error(place(upstream).and_then(|node| node.origin), error.to_string())
                .label("the file is named here")
        })
        .collect()
}

fn summary(found: &Diagnostics) -> String {
    let plural = |count: usize, word: &str| match count {
        1 => format!("1 {word}"),
        _ => format!("{count} {word}s"),
    };
    match found.count() {
        (0, 0) => "no problems".to_owned(),
        (0, warnings) => plural(warnings, "warning"),
        (errors, 0) => plural(errors + found.left_out, "error"),
        (errors, warnings) => {
            format!("{}, {}", plural(errors + found.left_out, "error"), plural(warnings, "warning"))
        }
    }
}
