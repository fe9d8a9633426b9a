//! Reading the files of an identity.

use std::time::SystemTime;

use super::{
    TrustDomain,
    material::{self, Material, MaterialError, Pem, Text},
};
use crate::config::{Bundles, Config, Identity, TlsMode};

/// The largest certificate, key or bundle.
const MAX_PEM: u64 = 4 << 20;
/// The largest revocation list.
const MAX_CRL: u64 = 32 << 20;

/// Reads all files of `[identity]`. None where it names none: the certificate comes from the Workload API.
///
/// # Errors
///
/// Names the first file that cannot be read.
pub fn read(settings: &Identity) -> Result<Option<Pem>, MaterialError> {
    let (Some(cert), Some(key), Some(ca)) = (&settings.cert, &settings.key, &settings.ca) else {
        return Ok(None);
    };
    Ok(Some(Pem {
        cert: Text::read(cert, MAX_PEM)?,
        key: Text::read(key, MAX_PEM)?,
        ca: bundles(ca)?,
        crl: crl(settings)?.into_iter().collect(),
    }))
}

/// Reads the file of revocation lists. The Workload API may tell others beside it.
///
/// # Errors
///
/// If it cannot be read.
pub fn crl(settings: &Identity) -> Result<Option<Text>, MaterialError> {
    settings.crl.as_ref().map(|path| Text::read(path, MAX_CRL)).transpose()
}

fn bundles(ca: &Bundles) -> Result<Vec<(Option<TrustDomain>, Text)>, MaterialError> {
    match ca {
        Bundles::All(path) => Ok(vec![(None, Text::read(path, MAX_PEM)?)]),
        Bundles::ByTrustDomain(table) => {
            let bundle = |(name, path): (&String, &std::path::PathBuf)| {
                let domain: TrustDomain =
                    name.parse().map_err(|error| MaterialError::TrustDomain(name.clone(), error))?;
                Ok((Some(domain), Text::read(path, MAX_PEM)?))
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
pub fn read_ca(path: &std::path::Path) -> Result<Text, MaterialError> {
    Text::read(path, MAX_PEM)
}

/// Every file that `[identity]` names.
pub fn paths(settings: &Identity) -> Vec<std::path::PathBuf> {
    let ca: Vec<_> = match &settings.ca {
        Some(Bundles::All(path)) => vec![path],
        Some(Bundles::ByTrustDomain(table)) => table.values().collect(),
        None => Vec::new(),
    };
    let own = [&settings.cert, &settings.key, &settings.crl];
    own.into_iter().flatten().chain(ca).cloned().collect()
}

/// Everything that is wrong with the files a configuration names: of its identity (`None`), and of the upstream at an
/// index.
pub fn check(config: &Config, now: SystemTime) -> Vec<(Option<usize>, MaterialError)> {
    let own = config.identity.as_ref().and_then(|settings| {
        let checked = read(settings).and_then(|pem| pem.map(|pem| Material::check(&pem, now)).transpose());
        Some((None, checked.err()?))
    });
    let upstreams = config.upstreams.iter().enumerate().filter_map(|(at, upstream)| {
        let path = upstream.tls.ca.as_ref().filter(|_| upstream.tls.mode != TlsMode::Off)?;
        let checked = read_ca(path).and_then(|text| material::trust(&[(None, text)], &[], now));
        Some((Some(at), checked.err()?))
    });
    own.into_iter().chain(upstreams).collect()
}
