//! The token that every change over TCP must carry.
//!
//! If the configuration names no file, a token is created at startup in a file that only the same user can read:
//! `$XDG_RUNTIME_DIR/outrigger/admin-PORT-….token`, or in `outrigger-UID` in the temporary directory. Each start uses a
//! new name, since processes in other network namespaces may have the same port and directory. `/status` reports the
//! path, so `outrigger set` and `outrigger drain` find it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use subtle::ConstantTimeEq;

/// The secret; `Debug` does not print it.
#[derive(Clone)]
pub struct AdminToken(String);

impl std::fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AdminTokenError {
    #[error("cannot read the admin token from {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the admin token in {path} is empty or has characters that are not allowed in a header field")]
    Invalid { path: PathBuf },
    #[error("the sidecar's admin token is in {path}, which is not the default location")]
    UnexpectedPath { path: PathBuf },
    #[error("cannot write the admin token to {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("no randomness for the admin token: {0}")]
    Random(#[from] getrandom::Error),
}

/// A token created at startup, and its file, which is removed when dropped.
#[derive(Debug)]
pub struct AdminTokenFile {
    pub path: PathBuf,
    token: AdminToken,
    /// Locked while the process lives, to distinguish it from a stale file.
    _lock: File,
}

impl AdminToken {
    pub fn read(path: &Path) -> Result<Self, AdminTokenError> {
        let text = fs::read_to_string(path)
            .map_err(|source| AdminTokenError::Read { path: path.to_owned(), source })?;
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(AdminTokenError::Invalid { path: path.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }

    fn random() -> Result<Self, AdminTokenError> {
        let mut bytes = [0_u8; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    /// Whether an `Authorization` value contains it. Compares in constant time.
    pub fn matches_authorization(&self, authorization: Option<&[u8]>) -> bool {
        const SCHEME: &[u8] = b"bearer ";
        let Some((scheme, given)) = authorization.and_then(|field| field.split_at_checked(SCHEME.len()))
        else {
            return false;
        };
        scheme.eq_ignore_ascii_case(SCHEME) && bool::from(given.trim_ascii().ct_eq(self.0.as_bytes()))
    }

    /// The value for `Authorization`.
    pub fn authorization(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl AdminTokenFile {
    /// Creates a token for the admin server on `port`, where [`read_announced`] accepts it.
    pub fn create(port: u16) -> Result<Self, AdminTokenError> {
        Self::create_in(&folder(), port)
    }

    fn create_in(folder: &Path, port: u16) -> Result<Self, AdminTokenError> {
        let token = AdminToken::random()?;
        let mut name = [0_u8; 4];
        getrandom::fill(&mut name)?;
        let path = folder.join(format!("{}{:08x}{SUFFIX}", prefix(port), u32::from_be_bytes(name)));
        match write_private(&path, &token.0) {
            Ok(lock) => Ok(Self { path, token, _lock: lock }),
            Err(source) => Err(AdminTokenError::Write { path, source }),
        }
    }

    pub fn token(&self) -> AdminToken {
        self.token.clone()
    }
}

impl Drop for AdminTokenFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Reads the token from the `path` that the admin server on `port` announces in `/status`. Only a path where such a
/// server would create it is accepted: another process on that port must not make us send the content of any file.
pub fn read_announced(path: &Path, port: u16) -> Result<AdminToken, AdminTokenError> {
    read_announced_in(&folder(), path, port)
}

fn read_announced_in(folder: &Path, path: &Path, port: u16) -> Result<AdminToken, AdminTokenError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if path.parent() == Some(folder) && name.starts_with(&prefix(port)) && name.ends_with(SUFFIX) {
        AdminToken::read(path)
    } else {
        Err(AdminTokenError::UnexpectedPath { path: path.to_owned() })
    }
}

const SUFFIX: &str = ".token";

fn prefix(port: u16) -> String {
    format!("admin-{port}-")
}

fn folder() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("outrigger"),
        _ => std::env::temp_dir().join(format!("outrigger-{}", rustix::process::getuid().as_raw())),
    }
}

/// Atomically creates a locked file that only this user can read.
fn write_private(path: &Path, text: &str) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // The temporary directory is shared: another user may have created the folder first.
        let owner = fs::symlink_metadata(folder)?;
        if !owner.is_dir() || owner.uid() != rustix::process::geteuid().as_raw() || owner.mode() & 0o022 != 0
        {
            return Err(io::Error::other("its folder belongs to another user, or others can write to it"));
        }
        remove_stale(folder);
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    // Without file locks `remove_stale` cannot remove it either.
    let _ = file.try_lock();
    if let Err(error) = writeln!(file, "{text}").and_then(|()| fs::rename(&temporary, path)) {
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    Ok(file)
}

/// Removes token files of killed processes: their locks are free.
fn remove_stale(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with("admin-") && name.ends_with(SUFFIX))
            && File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok())
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_created_token_is_private_unique_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("outrigger");
        let file = AdminTokenFile::create_in(&folder, 1).unwrap();
        assert_eq!(fs::metadata(&file.path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        let announced = read_announced_in(&folder, &file.path, 1).unwrap();
        assert_eq!(announced.0, file.token.0);
        assert_eq!(announced.0.len(), 64);
        let later = AdminTokenFile::create_in(&folder, 1).unwrap();
        assert_ne!(later.token.0, announced.0);
        assert!(file.path.exists(), "kept for a process with the same port in another network namespace");
        drop(file);
        assert!(later.path.exists());
        drop(later);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    }

    #[test]
    fn stale_token_files_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("outrigger");
        let live = AdminTokenFile::create_in(&folder, 1).unwrap();
        let stale = folder.join("admin-1-0000.token");
        fs::write(&stale, "old").unwrap();
        fs::write(folder.join("mine"), "precious").unwrap();
        let _new = AdminTokenFile::create_in(&folder, 2).unwrap();
        assert!(live.path.exists() && !stale.exists() && folder.join("mine").exists());
    }

    #[test]
    fn only_announced_token_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("outrigger");
        let file = AdminTokenFile::create_in(&folder, 1).unwrap();
        assert!(read_announced_in(&folder, &file.path, 2).is_err(), "the token of another port");
        fs::write(dir.path().join("id_rsa"), "secret").unwrap();
        for elsewhere in ["id_rsa", "outrigger/../id_rsa", "outrigger/admin-1-x.token/../../id_rsa"] {
            let error = read_announced_in(&folder, &dir.path().join(elsewhere), 1).unwrap_err();
            assert!(matches!(error, AdminTokenError::UnexpectedPath { .. }), "{elsewhere}: {error}");
        }
    }

    #[test]
    fn a_folder_that_others_can_write_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("outrigger");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(AdminTokenFile::create_in(&folder, 1).is_err());
    }

    #[test]
    fn only_the_exact_token_matches() {
        let token = AdminToken("secret".to_owned());
        assert!(token.matches_authorization(Some(b"Bearer secret")));
        assert!(token.matches_authorization(Some(b"bearer secret")));
        for wrong in [&b"Bearer secre"[..], b"Bearer secret2", b"Basic secret", b"secret", b"", b"Bearer "] {
            assert!(!token.matches_authorization(Some(wrong)), "{wrong:?}");
        }
        assert!(!token.matches_authorization(None));
        assert!(!format!("{token:?}").contains("secret"));
    }

    #[test]
    fn a_configured_file_must_not_be_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(matches!(AdminToken::read(&path), Err(AdminTokenError::Read { .. })));
        fs::write(&path, " \n").unwrap();
        assert!(matches!(AdminToken::read(&path), Err(AdminTokenError::Invalid { .. })));
        fs::write(&path, "s3cret\n").unwrap();
        assert!(AdminToken::read(&path).unwrap().matches_authorization(Some(b"Bearer s3cret")));
    }
}
