//! The token that every change over TCP must bear.
//!
//! Where the configuration names no file, a token is made at start and left where only the same user can read it:
//! `$XDG_RUNTIME_DIR/outrigger/admin-PORT.token`, or `outrigger-UID/admin-PORT.token` in the temporary directory.
//! So `outrigger set` and `outrigger drain` find it by the port alone.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use subtle::ConstantTimeEq;

/// A secret; never shown.
#[derive(Clone)]
pub struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("cannot read the admin token from {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the admin token in {path} is empty or holds characters that a header cannot")]
    Unfit { path: PathBuf },
    #[error("cannot leave the admin token at {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("no randomness for the admin token: {0}")]
    Random(#[from] getrandom::Error),
}

/// A token made at start, and its file; removed when dropped.
#[derive(Debug)]
pub struct TokenFile {
    pub path: PathBuf,
    token: Token,
}

impl Token {
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let text =
            fs::read_to_string(path).map_err(|source| TokenError::Read { path: path.to_owned(), source })?;
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(TokenError::Unfit { path: path.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }

    fn random() -> Result<Self, TokenError> {
        let mut bytes = [0_u8; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    /// Whether an `Authorization` field bears it. Takes as long for a wrong token as for the right one.
    pub fn is_borne_by(&self, authorization: Option<&[u8]>) -> bool {
        const SCHEME: &[u8] = b"bearer ";
        let Some((scheme, given)) = authorization.and_then(|field| field.split_at_checked(SCHEME.len()))
        else {
            return false;
        };
        scheme.eq_ignore_ascii_case(SCHEME) && bool::from(given.trim_ascii().ct_eq(self.0.as_bytes()))
    }

    /// The field's value.
    pub fn authorization(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl TokenFile {
    /// Makes a token for the admin server on `port` and leaves it where [`find`] looks.
    pub fn make(port: u16) -> Result<Self, TokenError> {
        Self::make_at(&well_known(port))
    }

    fn make_at(path: &Path) -> Result<Self, TokenError> {
        let token = Token::random()?;
        write_private(path, &token.0)
            .map_err(|source| TokenError::Write { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), token })
    }

    pub fn token(&self) -> Token {
        self.token.clone()
    }
}

impl Drop for TokenFile {
    fn drop(&mut self) {
        // Unless another process on the same port has left its own meanwhile.
        if Token::read(&self.path).is_ok_and(|there| there.0 == self.token.0) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The token of the admin server on `port`, where one was left for this user.
pub fn find(port: u16) -> Result<Token, TokenError> {
    Token::read(&well_known(port))
}

fn well_known(port: u16) -> PathBuf {
    let folder = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("outrigger"),
        _ => std::env::temp_dir().join(format!("outrigger-{}", rustix::process::getuid().as_raw())),
    };
    folder.join(format!("admin-{port}.token"))
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // The temporary directory is everybody's: somebody else may have been there first.
        let folder = fs::symlink_metadata(folder)?;
        if !folder.is_dir()
            || folder.uid() != rustix::process::geteuid().as_raw()
            || folder.mode() & 0o022 != 0
        {
            return Err(io::Error::other("its folder belongs to somebody else"));
        }
    }
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let _ = fs::remove_file(&temporary);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| writeln!(file, "{text}"))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_made_token_is_private_unique_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("outrigger/admin-1.token");
        let file = TokenFile::make_at(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        let found = Token::read(&path).unwrap();
        assert_eq!(found.0, file.token.0);
        assert_eq!(found.0.len(), 64);
        let later = TokenFile::make_at(&path).unwrap();
        assert_ne!(later.token.0, found.0);
        drop(file);
        assert!(path.exists(), "the other process's file stays");
        drop(later);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("outrigger");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(TokenFile::make_at(&folder.join("admin-1.token")).is_err());
    }

    #[test]
    fn only_the_right_token_passes() {
        let token = Token("secret".to_owned());
        assert!(token.is_borne_by(Some(b"Bearer secret")));
        assert!(token.is_borne_by(Some(b"bearer secret")));
        for wrong in [&b"Bearer secre"[..], b"Bearer secret2", b"Basic secret", b"secret", b"", b"Bearer "] {
            assert!(!token.is_borne_by(Some(wrong)), "{wrong:?}");
        }
        assert!(!token.is_borne_by(None));
        assert!(!format!("{token:?}").contains("secret"));
    }

    #[test]
    fn a_configured_file_must_hold_something() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(matches!(Token::read(&path), Err(TokenError::Read { .. })));
        fs::write(&path, " \n").unwrap();
        assert!(matches!(Token::read(&path), Err(TokenError::Unfit { .. })));
        fs::write(&path, "s3cret\n").unwrap();
        assert!(Token::read(&path).unwrap().is_borne_by(Some(b"Bearer s3cret")));
    }
}
