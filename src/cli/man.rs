//! `outrigger man`

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

/// Write the manual pages.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  outrigger man | man -l -
  outrigger man --out /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Write a page for each command into this folder [default: the main page to stdout]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(args: &ManArgs) -> ExitCode {
    let written = match &args.out {
        Some(folder) => write_all(folder),
        None => page(super::command()).and_then(|text| io::stdout().write_all(&text)),
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger: cannot write the manual: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One page per command, named as git's: `outrigger-set-log.1`.
fn write_all(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    clap_mangen::generate_to(super::command().disable_help_subcommand(true), folder)
}

fn page(command: clap::Command) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_page_for_every_command() {
        let folder = tempfile::tempdir().unwrap();
        write_all(folder.path()).unwrap();
        for page in ["outrigger.1", "outrigger-run.1", "outrigger-completions.1"] {
            let text = std::fs::read_to_string(folder.path().join(page)).unwrap();
            assert!(text.contains(".SH NAME"), "{page}");
        }
    }
}
