//! The roots that upstreams are verified with: a file of their own, those of `[identity]`, or the system's.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use super::super::{
    files,
    material::{self, EncodedFile, Expiry, Material, MaterialError},
    trust::{Bundle, Trust},
};
use crate::config::{TlsMode, UpstreamTls};

/// Roots by file, and those of the system once they have been needed.
#[derive(Debug, Default)]
pub struct UpstreamRoots {
    files: HashMap<PathBuf, File>,
    system: Option<Result<Arc<Trust>, String>>,
}

/// A file of roots: its content and the result of parsing it.
#[derive(Debug)]
struct File {
    text: Option<EncodedFile>,
    trust: Result<Arc<Trust>, String>,
    expiries: Vec<Expiry>,
    /// Why the newest content was rejected, if an earlier one is in use.
    rejection: Option<String>,
}

impl UpstreamRoots {
    /// The roots for an upstream. The revocation lists of `[identity]` apply to upstreams with `ca` too.
    pub fn for_upstream(
        &mut self,
        settings: &UpstreamTls,
        own: Option<&Material>,
    ) -> Result<Arc<Trust>, String> {
        match (&settings.ca, settings.mode) {
            (Some(path), _) => {
                let file = self.files.entry(path.clone()).or_insert_with(|| {
                    let mut file = File::unread();
                    file.reload(path, SystemTime::now());
                    file
                });
                let trust = file.trust.clone()?;
                Ok(own.map_or(trust.clone(), |own| Arc::new(trust.with_revocations_of(&own.trust))))
            }
            (None, TlsMode::Mutual) => own
                .map(|own| Arc::clone(&own.trust))
                .ok_or_else(|| "this service has no valid certificate yet".to_owned()),
            (None, _) => self.system.get_or_insert_with(load_system_roots).clone(),
        }
    }

    /// Reads the files again and drops those no longer in `wanted`. Returns whether any changed.
    pub fn reload(&mut self, wanted: &[PathBuf], now: SystemTime) -> bool {
        self.files.retain(|path, _| wanted.contains(path));
        self.files.iter_mut().fold(false, |changed, (path, file)| file.reload(path, now) | changed)
    }

    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.keys()
    }

    pub fn expiries(&self) -> impl Iterator<Item = &Expiry> {
        self.files.values().flat_map(|file| &file.expiries)
    }

    /// Why the newest content of some file was rejected.
    pub fn rejection(&self) -> Option<&String> {
        self.files.values().find_map(|file| file.rejection.as_ref())
    }
}

impl File {
    fn unread() -> Self {
        Self { text: None, trust: Err("not read yet".to_owned()), expiries: Vec::new(), rejection: None }
    }

    /// Reads the file and applies valid changes. Returns whether the roots in use changed.
    fn reload(&mut self, path: &Path, now: SystemTime) -> bool {
        let read = files::read_ca(path);
        if let (Ok(text), Some(known)) = (&read, &self.text)
            && text == known
        {
            self.rejection = None;
            return false;
        }
        match read.and_then(|text| Self::checked(text, now)) {
            Ok(file) => {
                *self = file;
                true
            }
            Err(error) => self.refuse(error.to_string()),
        }
    }

    fn checked(text: EncodedFile, now: SystemTime) -> Result<Self, MaterialError> {
        let ca = [(None, text)];
        let trust = Arc::new(material::build_trust(&ca, &[], now)?);
        let expiries = material::trust_expiries(&ca, &[]);
        let [(_, text)] = ca;
        Ok(Self { text: Some(text), trust: Ok(trust), expiries, rejection: None })
    }

    fn refuse(&mut self, reason: String) -> bool {
        if self.rejection.as_ref() != Some(&reason) {
            tracing::error!("CA certificates of an upstream rejected: {reason}");
        }
        self.rejection = Some(reason.clone());
        let is_new = self.text.is_none() && self.trust.as_ref().err() != Some(&reason);
        if is_new {
            self.trust = Err(reason);
        }
        is_new
    }
}

fn load_system_roots() -> Result<Arc<Trust>, String> {
    let loaded = rustls_native_certs::load_native_certs();
    let anchors: Vec<_> = loaded
        .certs
        .iter()
        .filter_map(|certificate| webpki::anchor_from_trusted_cert(certificate).ok().map(|a| a.to_owned()))
        .collect();
    if anchors.is_empty() {
        return Err(
            "this system has no root certificates (package ca-certificates); name a file by `ca`".to_owned()
        );
    }
    let bundle = Bundle { trust_domain: None, source: "the system's roots".into(), anchors };
    Ok(Arc::new(Trust::new(vec![bundle], Vec::new())))
}
