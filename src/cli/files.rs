//! The `-c FILE` option of all commands that read the configuration.

use std::{io::IsTerminal, path::PathBuf};

use clap::Args;

use crate::config::{self, Diagnostics, LoadedConfig};

/// The configuration files to read.
#[derive(Args, Debug, Default, Clone)]
pub struct ConfigFiles {
    /// A configuration file; several merge key by key, the later one wins. `optional:FILE` may be missing, `env:NAME`
    /// is a variable that holds one [default: $OUTRIGGER_CONFIG, else ./outrigger.toml]
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    pub config: Vec<PathBuf>,
}

impl ConfigFiles {
    /// These files, or without any the default ones.
    pub fn paths(&self) -> Vec<PathBuf> {
        config::config_files(&self.config, std::path::Path::new("."), &config::process_env)
    }

    pub fn load(&self) -> Result<LoadedConfig, Diagnostics> {
        config::load(&self.paths(), &config::process_env)
    }
}

/// Whether to colour the output to this stream (<https://no-color.org>).
pub fn colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
