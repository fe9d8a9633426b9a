//! The texts of the files, and places in them.

use std::{
    fmt, fs,
    io::Read,
    ops::Range,
    path::{Path, PathBuf},
};

use crate::descriptors;

/// The largest configuration file that is accepted: far above any real one, far below what would cost much memory.
pub const MAX_FILE_BYTES: u64 = 8 << 20;

/// A place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// Index into [`Sources`].
    file: u32,
    start: u32,
    end: u32,
}

impl Origin {
    pub(super) fn new(file: usize, span: Range<usize>) -> Self {
        // Files are far smaller than 4 GiB (`MAX_FILE_BYTES`). A larger place would saturate, which is harmless.
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Self { file: narrow(file), start: narrow(span.start), end: narrow(span.end) }
    }

    pub(super) fn watched_file(self) -> usize {
        self.file as usize
    }

    pub(super) fn span(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

/// A file as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub path: PathBuf,
    pub text: String,
}

/// All files of a configuration, in the order in which they override each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources(pub Vec<Source>);

/// Line and column of an [`Origin`], from 1; columns count characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePosition {
    pub file: String,
    pub line: usize,
    pub column: usize,
}

impl fmt::Display for FilePosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

impl Sources {
    /// File, line and column of an origin.
    pub fn position(&self, origin: Origin) -> Option<FilePosition> {
        let source = self.0.get(origin.watched_file())?;
        let before = source.text.get(..origin.span().start)?;
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Some(FilePosition {
            file: source.path.display().to_string(),
            line: before.bytes().filter(|byte| *byte == b'\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        })
    }
}

/// The prefix of an environment variable that contains a configuration.
const ENV: &str = "env:";
/// The prefix of a path whose file may be missing.
const OPTIONAL: &str = "optional:";

/// The file to watch; `None` if the source cannot change.
pub(super) fn file(path: &Path) -> Option<&Path> {
    match path.to_str() {
        Some(text) if text.starts_with(ENV) => None,
        Some(text) => Some(text.strip_prefix(OPTIONAL).map_or(path, Path::new)),
        None => Some(path),
    }
}

/// Reads a source given with `-c`: a file; `optional:FILE`, which is empty if the file is missing; or `env:NAME`, an
/// environment variable.
pub(super) fn read(path: &Path) -> Result<String, String> {
    let text = path.to_str().unwrap_or_default();
    if let Some(name) = text.strip_prefix(ENV) {
        return std::env::var(name).map_err(|_| "there is no such variable, or it is not UTF-8".to_owned());
    }
    match text.strip_prefix(OPTIONAL).map(Path::new) {
        Some(file) if !file.exists() => Ok(String::new()),
        Some(file) => read_file(file),
        None => read_file(path),
    }
}

/// Reads a file, at most [`MAX_FILE_BYTES`] of UTF-8. The error is a sentence without the path.
fn read_file(path: &Path) -> Result<String, String> {
    let file = fs::File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        _ => match descriptors::missing_resource(&error) {
            Some(missing) => format!("local_resource: {missing} ({error})"),
            None => error.to_string(),
        },
    })?;
    let mut bytes = Vec::new();
    // One byte more than allowed detects a file that is too large, even if its length is unknown (a pipe).
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("the file is larger than {} MiB", MAX_FILE_BYTES >> 20));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line =
            error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        format!("line {} is not UTF-8", line + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_count_lines_and_characters_from_one() {
        let sources = Sources(vec![Source { path: "a.toml".into(), text: "a = 1\nü = 2\n".into() }]);
        let place = sources.position(Origin::new(0, 9..10)).unwrap();
        assert_eq!((place.line, place.column), (2, 3));
        assert_eq!(place.to_string(), "a.toml:2");
    }

    #[test]
    fn reads_variables_and_optional_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o.toml");
        let optional = PathBuf::from(format!("optional:{}", path.display()));
        assert_eq!(read(&optional), Ok(String::new()));
        fs::write(&path, "a = 1").unwrap();
        assert_eq!(read(&optional), Ok("a = 1".to_owned()));
        assert_eq!(file(&optional), Some(&*path));
        assert_eq!(read(Path::new("env:CARGO_PKG_NAME")), Ok("outrigger".to_owned()));
        assert!(read(Path::new("env:NO_SUCH_VARIABLE")).unwrap_err().contains("no such variable"));
        assert_eq!(file(Path::new("env:X")), None);
    }

    #[test]
    fn unreadable_files_have_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(&dir.path().join("none")), Err("there is no such file".to_owned()));
        let path = dir.path().join("latin1.toml");
        fs::write(&path, b"a = 1\nb = \"\xe4\"").unwrap();
        assert_eq!(read(&path), Err("line 2 is not UTF-8".to_owned()));
        fs::write(&path, vec![b'#'; MAX_FILE_BYTES as usize + 1]).unwrap();
        assert_eq!(read(&path), Err("the file is larger than 8 MiB".to_owned()));
    }
}
