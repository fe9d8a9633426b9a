//! `outrigger check [-c FILE]…`

mod files;

use std::{io::Write, process::ExitCode};

use clap::Args;

use super::files::{ConfigFiles, colour};
use crate::config::{self, Diagnostics, ExaminedConfig};

/// Check the configuration: every problem with its location and a suggestion.
///
/// Exits with 0 if the configuration is valid (warnings may remain), with 1 if it is not.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger check                            ./outrigger.toml or $OUTRIGGER_CONFIG
  outrigger check -c base.toml -c prod.toml  both files merged, the later one wins
  outrigger check --json -c base.toml        for scripts")]
pub struct CheckArgs {
    #[command(flatten)]
    files: ConfigFiles,
    /// Print the problems as a JSON array.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &CheckArgs) -> ExitCode {
    let paths = args.files.paths();
    let ExaminedConfig { config, tree, diagnostics: mut found } =
        config::examine(&paths, &config::process_env);
    found.problems.extend(files::problems(&config, &tree));
    found.problems.sort_by_key(|problem| problem.origin);
    let ok = found.count().0 == 0;
    let mut out = std::io::stdout().lock();
    let text = if args.json {
        format!("{:#}\n", found.to_json())
    } else {
        let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        let what =
            if names.is_empty() { "no file: the built-in defaults".to_owned() } else { names.join(", ") };
        format!("{}{what}: {}\n", found.render(colour(&out)), summary(&found))
    };
    // A closed pipe is ignored.
    let _ = out.write_all(text.as_bytes());
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn summary(found: &Diagnostics) -> String {
    let plural = |count: usize, word: &str| match count {
        1 => format!("1 {word}"),
        _ => format!("{count} {word}s"),
    };
    match found.count() {
        (0, 0) => "no problems".to_owned(),
        (0, warnings) => plural(warnings, "warning"),
        (errors, 0) => plural(errors + found.omitted, "error"),
        (errors, warnings) => {
            format!("{}, {}", plural(errors + found.omitted, "error"), plural(warnings, "warning"))
        }
    }
}
