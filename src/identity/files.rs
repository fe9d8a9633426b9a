//! Reads the files that `[identity]` and upstreams name.

use std::time::SystemTime;

use super::{
    TrustDomain,
    material::{self, CertificateUses, EncodedFile, EncodedIdentity, Material, MaterialError},
};
use crate::config::{Config, Identity, TlsMode, TrustBundles};

/// The largest certificate, key or bundle, in bytes.
const MAX_PEM: u64 = 4 << 20;
/// The largest revocation list, in bytes.
const MAX_CRL: u64 = 32 << 20;

/// Reads all files of `[identity]`. `None` if it names none: the certificate comes from the Workload API.
///
/// # Errors
///
/// Names the first file that cannot be read.
pub fn read(settings: &Identity) -> Result<Option<EncodedIdentity>, MaterialError> {
    let (Some(cert), Some(key), Some(ca)) = (&settings.cert, &settings.key, &settings.ca) else {
        return Ok(None);
    };
    Ok(Some(EncodedIdentity {
        cert: EncodedFile::read(cert, MAX_PEM)?,
        key: EncodedFile::read(key, MAX_PEM)?,
        ca: bundles(ca)?,
        crl: read_crl(settings)?.into_iter().collect(),
    }))
}

/// Reads the file of revocation lists. The Workload API may deliver more.
///
/// # Errors
///
/// If it cannot be read.
pub fn read_crl(settings: &Identity) -> Result<Option<EncodedFile>, MaterialError> {
    settings.crl.as_ref().map(|path| EncodedFile::read(path, MAX_CRL)).transpose()
}

fn bundles(ca: &TrustBundles) -> Result<Vec<(Option<TrustDomain>, EncodedFile)>, MaterialError> {
    match ca {
        TrustBundles::All(path) => Ok(vec![(None, EncodedFile::read(path, MAX_PEM)?)]),
        TrustBundles::ByTrustDomain(table) => {
            let bundle = |(name, path): (&String, &std::path::PathBuf)| {
                let domain: TrustDomain =
                    name.parse().map_err(|error| MaterialError::TrustDomain(name.clone(), error))?;
                Ok((Some(domain), EncodedFile::read(path, MAX_PEM)?))
            };
            table.iter().map(bundle).collect()
        }
    }
}

/// Reads the roots of one upstream.
///
/// # Errors
///
/// If the file cannot be read.
pub fn read_ca(path: &std::path::Path) -> Result<EncodedFile, MaterialError> {
    EncodedFile::read(path, MAX_PEM)
}

/// Every file that `[identity]` names.
pub fn paths(settings: &Identity) -> Vec<std::path::PathBuf> {
    let ca: Vec<_> = match &settings.ca {
        Some(TrustBundles::All(path)) => vec![path],
        Some(TrustBundles::ByTrustDomain(table)) => table.values().collect(),
        None => Vec::new(),
    };
    let own = [&settings.cert, &settings.key, &settings.crl];
    own.into_iter().flatten().chain(ca).cloned().collect()
}

/// Checks the files that a configuration names. Returns every error with the key that names the file.
pub fn check(config: &Config, now: SystemTime) -> Vec<(FileKey, MaterialError)> {
    let mut errors =
        config.identity.as_ref().map_or_else(Vec::new, |settings| check_identity(config, settings, now));
    for (at, upstream) in config.upstreams.iter().enumerate() {
        if let Some(path) = upstream.tls.ca.as_ref().filter(|_| upstream.tls.mode != TlsMode::Off)
            && let Err(error) =
                read_ca(path).and_then(|text| material::build_trust(&[(None, text)], &[], now))
        {
            errors.push((FileKey::Upstream(at), error));
        }
    }
    errors
}

/// A configuration key that names files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKey {
    /// A key of `[identity]`.
    Identity(&'static str),
    /// `ca` of the upstream at this index.
    Upstream(usize),
}

fn check_identity(config: &Config, settings: &Identity, now: SystemTime) -> Vec<(FileKey, MaterialError)> {
    let unreadable = |(key, path, limit): (&'static str, Option<&std::path::PathBuf>, u64)| {
        Some((FileKey::Identity(key), EncodedFile::read(path?, limit).err()?))
    };
    let single = [
        ("cert", settings.cert.as_ref(), MAX_PEM),
        ("key", settings.key.as_ref(), MAX_PEM),
        ("crl", settings.crl.as_ref(), MAX_CRL),
    ];
    let roots: Vec<&std::path::PathBuf> = match &settings.ca {
        Some(TrustBundles::All(path)) => vec![path],
        Some(TrustBundles::ByTrustDomain(table)) => table.values().collect(),
        None => Vec::new(),
    };
    let roots = roots.into_iter().map(|path| ("ca", Some(path), MAX_PEM));
    let errors: Vec<_> = single.into_iter().chain(roots).filter_map(unreadable).collect();
    if !errors.is_empty() {
        return errors;
    }
    // Whether the files match each other can be checked only once all are readable.
    let errors = load_material(config, now).and_then(Result::err);
    errors.into_iter().map(|error| (FileKey::Identity(key_of(&error, settings)), error)).collect()
}

/// The key of `[identity]` that an error is about; `ca` if the error does not say.
fn key_of(error: &MaterialError, settings: &Identity) -> &'static str {
    let message = error.to_string();
    let names = |path: &Option<std::path::PathBuf>| {
        path.as_ref().is_some_and(|path| message.contains(&*path.to_string_lossy()))
    };
    match error {
        MaterialError::Crl { .. } => "crl",
        MaterialError::Key { .. } | MaterialError::Mismatch { .. } => "key",
        MaterialError::Root { .. } | MaterialError::RootsExpired(_) | MaterialError::TrustDomain(..) => "ca",
        _ if names(&settings.cert) => "cert",
        _ => "ca",
    }
}

/// What will not work with a certificate that is valid but restricted to one role.
pub fn limitation(config: &Config, now: SystemTime) -> Option<&'static str> {
    load_material(config, now)?.ok()?.limitation()
}

fn load_material(config: &Config, now: SystemTime) -> Option<Result<Material, MaterialError>> {
    let checked = read(config.identity.as_ref()?)
        .map(|pem| Some(Material::check(&pem?, CertificateUses::from_config(config), now)));
    match checked {
        Ok(checked) => checked,
        Err(error) => Some(Err(error)),
    }
}
