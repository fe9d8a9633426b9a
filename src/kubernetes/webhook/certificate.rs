//! The webhook's certificate, reloaded when its files change.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    version::{TLS12, TLS13},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use crate::{
    identity::{
        tls::{ALPN_H2, ALPN_HTTP1},
        trust::provider,
    },
    watch::{self, Watcher},
};

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    Pem { path: PathBuf, reason: String },
    #[error("{} and {} do not match: {source}", certificate.display(), key.display())]
    Pair { certificate: PathBuf, key: PathBuf, source: rustls::Error },
}

/// A chain and its key, with the content of their files.
pub struct Certificate {
    paths: (PathBuf, PathBuf),
    texts: (Vec<u8>, Vec<u8>),
    config: Arc<ServerConfig>,
}

impl Certificate {
    /// # Errors
    ///
    /// Names the invalid file.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, CertificateError> {
        let read = |path: &Path| {
            fs::read(path).map_err(|source| CertificateError::Read { path: path.to_owned(), source })
        };
        let texts = (read(certificate)?, read(key)?);
        let invalid = |path: &Path, reason: &dyn std::fmt::Display| CertificateError::Pem {
            path: path.to_owned(),
            reason: reason.to_string(),
        };
        let chain = CertificateDer::pem_slice_iter(&texts.0).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| invalid(certificate, &error))?;
        if chain.is_empty() {
            return Err(invalid(certificate, &"it contains no certificate"));
        }
        let private = PrivateKeyDer::from_pem_slice(&texts.1).map_err(|error| invalid(key, &error))?;
        let pair =
            |source| CertificateError::Pair { certificate: certificate.into(), key: key.into(), source };
        let mut config = ServerConfig::builder_with_provider(Arc::clone(provider()))
            .with_protocol_versions(&[&TLS13, &TLS12])
            .map_err(pair)?
            .with_no_client_auth()
            .with_single_cert(chain, private)
            .map_err(pair)?;
        config.alpn_protocols = vec![ALPN_H2.to_vec(), ALPN_HTTP1.to_vec()];
        Ok(Self { paths: (certificate.into(), key.into()), texts, config: Arc::new(config) })
    }

    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    /// Stores the configuration in `slot` whenever the files change. Errors are logged, and the last good one stays in
    /// use.
    pub fn watch(self, slot: Arc<ArcSwap<ServerConfig>>) -> io::Result<Watcher> {
        let files = [self.paths.0.clone(), self.paths.1.clone()];
        let mut last = self;
        let mut last_error = None;
        watch::watch("certificate-watch", &files, move |_| match Self::read(&last.paths.0, &last.paths.1) {
            Ok(now) if now.texts != last.texts => {
                slot.store(now.config());
                last = now;
                last_error = None;
                tracing::info!("new certificate loaded");
            }
            Ok(_) => last_error = None,
            Err(error) => {
                let text = Some(error.to_string());
                if last_error != text {
                    tracing::error!(%error, "new certificate rejected");
                    last_error = text;
                }
            }
        })
    }
}
