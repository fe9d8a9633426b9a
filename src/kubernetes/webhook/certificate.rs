//! The webhook's certificate, read again when its files change.

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
    #[error("{} and {} do not belong together: {source}", certificate.display(), key.display())]
    Pair { certificate: PathBuf, key: PathBuf, source: rustls::Error },
}

/// A chain and its key, as the files held them.
pub struct Certificate {
    paths: (PathBuf, PathBuf),
    texts: (Vec<u8>, Vec<u8>),
    config: Arc<ServerConfig>,
}

impl Certificate {
    /// # Errors
    ///
    /// Says which file is wrong.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, CertificateError> {
        let read = |path: &Path| {
            fs::read(path).map_err(|source| CertificateError::Read { path: path.to_owned(), source })
        };
        let texts = (read(certificate)?, read(key)?);
        let wrong = |path: &Path, reason: &dyn std::fmt::Display| CertificateError::Pem {
            path: path.to_owned(),
            reason: reason.to_string(),
        };
        let chain = CertificateDer::pem_slice_iter(&texts.0).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| wrong(certificate, &error))?;
        if chain.is_empty() {
            return Err(wrong(certificate, &"there is no certificate in it"));
        }
        let private = PrivateKeyDer::from_pem_slice(&texts.1).map_err(|error| wrong(key, &error))?;
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

    /// Puts what the files hold into `slot` whenever they change; what is wrong is logged, and the last good one stays.
    pub fn watch(self, slot: Arc<ArcSwap<ServerConfig>>) -> io::Result<Watcher> {
        let files = [self.paths.0.clone(), self.paths.1.clone()];
        let mut last = self;
        let mut complaint = None;
        watch::watch("certificate-watch", &files, move |_| match Self::read(&last.paths.0, &last.paths.1) {
            Ok(now) if now.texts != last.texts => {
                slot.store(now.config());
                last = now;
                complaint = None;
                tracing::info!("a new certificate is used");
            }
            Ok(_) => complaint = None,
            Err(error) => {
                let text = Some(error.to_string());
                if complaint != text {
                    tracing::error!(%error, "the new certificate is not used");
                    complaint = text;
                }
            }
        })
    }
}
