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

/// How often a file is looked for under its name.
const LOOK: Duration = Duration::from_secs(1);

/// Where lines are to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Stdout,
    /// Under `run -- CMD`, where stdout is the service's.
    Stderr,
    File(PathBuf),
}

/// The same, open.
#[derive(Debug)]
pub enum Output {
    Stdout,
    Stderr,
    File { path: PathBuf, file: File, looked: Instant },
}

impl Output {
    pub fn open(target: Target) -> Result<Self, AccessLogError> {
        match target {
            Target::Stdout => Ok(Self::Stdout),
            Target::Stderr => Ok(Self::Stderr),
            Target::File(path) => match open(&path) {
                Ok(file) => Ok(Self::File { path, file, looked: Instant::now() }),
                Err(source) => Err(AccessLogError::File { path, source }),
            },
        }
    }

    /// Writes whole lines. A file that was moved away, as `logrotate` does, is opened anew first.
    pub fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(lines)?;
                out.flush()
            }
            Self::Stderr => io::stderr().lock().write_all(lines),
            Self::File { path, file, looked } => {
                if looked.elapsed() >= LOOK {
                    *looked = Instant::now();
                    if !is_still(path, file) {
                        *file = open(path)?;
                    }
                }
                file.write_all(lines)
            }
        }
    }

    /// Opens a file anew; where that cannot be done, goes on with the one there is.
    pub fn reopen(&mut self) {
        let Self::File { path, file, looked } = self else { return };
        match open(path) {
            Ok(new) => (*file, *looked) = (new, Instant::now()),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the access log could not be opened anew");
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

/// It says who calls whom: not for everybody's eyes.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

/// Whether the name still leads to this file.
fn is_still(path: &Path, file: &File) -> bool {
    match (fs::metadata(path), file.metadata()) {
        (Ok(named), Ok(open)) => (named.dev(), named.ino()) == (open.dev(), open.ino()),
        _ => false,
    }
}
