//! The ready file: the bound addresses, for scripts, written once the proxy is ready.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::Serialize;

/// The content of the ready file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReadyInfo {
    pub outbound: String,
    pub inbound: String,
    /// `host:port`, or `unix:PATH`.
    pub admin: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<String>,
    /// The addresses of upstreams with a `listen` of their own, by name.
    pub upstreams: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_token_file: Option<PathBuf>,
    pub pid: u32,
}

/// A written ready file. Dropping this removes the file.
#[derive(Debug)]
pub struct ReadyFile {
    path: PathBuf,
}

impl ReadyFile {
    /// Writes the file atomically (temporary file and rename).
    pub fn write(path: &Path, ready: &ReadyInfo) -> io::Result<Self> {
        let text = serde_json::to_string(ready)?;
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = PathBuf::from(name);
        let written = std::fs::File::create(&temporary)
            .and_then(|mut file| writeln!(file, "{text}"))
            .and_then(|()| std::fs::rename(&temporary, path));
        if let Err(error) = written {
            let _ = std::fs::remove_file(&temporary);
            return Err(error);
        }
        Ok(Self { path: path.to_owned() })
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_complete_and_removed_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ready.json");
        std::fs::write(&path, "of an earlier run").unwrap();
        let ready = ReadyInfo {
            outbound: "127.0.0.1:4140".to_owned(),
            upstreams: [("payments".to_owned(), "127.0.0.1:5001".to_owned())].into(),
            ..ReadyInfo::default()
        };
        let file = ReadyFile::write(&path, &ready).unwrap();
        let read: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(read["outbound"], "127.0.0.1:4140");
        assert_eq!(read["upstreams"]["payments"], "127.0.0.1:5001");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_missing_directory_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ReadyFile::write(&dir.path().join("no/ready.json"), &ReadyInfo::default()).is_err());
    }
}
