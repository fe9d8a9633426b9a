//! Where the access log goes.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::AccessLogError;

/// How often the path is checked for a rotated file.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Where access log lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLogTarget {
    Stdout,
    /// The default under `run -- CMD`, where stdout belongs to the service.
    Stderr,
    File(PathBuf),
}

/// An open [`AccessLogTarget`].
#[derive(Debug)]
pub enum Output {
    Stdout,
    Stderr,
    File { path: PathBuf, file: File, checked: Instant },
}

impl Output {
    pub fn open(target: AccessLogTarget) -> Result<Self, AccessLogError> {
        match target {
            AccessLogTarget::Stdout => Ok(Self::Stdout),
            AccessLogTarget::Stderr => Ok(Self::Stderr),
            AccessLogTarget::File(path) => match open(&path) {
                Ok(file) => Ok(Self::File { path, file, checked: Instant::now() }),
                Err(source) => Err(AccessLogError::File { path, source }),
            },
        }
    }

    /// Writes whole lines. A file that was renamed, as `logrotate` does, is reopened first.
    pub fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(lines)?;
                out.flush()
            }
            Self::Stderr => io::stderr().lock().write_all(lines),
            Self::File { path, file, checked } => {
                if checked.elapsed() >= CHECK_INTERVAL {
                    *checked = Instant::now();
                    if !is_same_file(path, file) {
                        *file = open(path)?;
                    }
                }
                file.write_all(lines)
            }
        }
    }

    /// Reopens the file. On an error it keeps writing to the old one.
    pub fn reopen(&mut self) {
        let Self::File { path, file, checked } = self else { return };
        match open(path) {
            Ok(new) => (*file, *checked) = (new, Instant::now()),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot reopen the access log, the old file is kept");
            }
        }
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("stdout"),
            Self::Stderr => f.write_str("stderr"),
            Self::File { path, .. } => write!(f, "{}", path.display()),
        }
    }
}

/// Not world-readable: the log shows which services talk to each other.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

/// Whether the path still names this file.
fn is_same_file(path: &Path, file: &File) -> bool {
    match (fs::metadata(path), file.metadata()) {
        (Ok(named), Ok(open)) => (named.dev(), named.ino()) == (open.dev(), open.ino()),
        _ => false,
    }
}
