//! Reports on certificates: for `/status`, `/ready` and `/metrics`, and warnings in the log.

use std::{collections::HashMap, time::SystemTime};

use super::{
    super::{
        material::{Expiry, ExpiryKind},
        time::Date,
    },
    IdentityStore,
};

/// The state of certificates, for `/status` and metrics.
#[derive(Clone, Debug, Default)]
pub struct IdentityReport {
    /// Whether the configuration has `[identity]`.
    pub configured: bool,
    pub id: Option<String>,
    pub expiries: Vec<Expiry>,
    /// Why the newest material was rejected.
    pub rejection: Option<String>,
    pub accepted: u64,
    pub rejections: u64,
}

impl IdentityStore {
    pub fn report(&self) -> IdentityReport {
        let own = self.material();
        let state = self.state();
        IdentityReport {
            configured: state.settings.is_some(),
            id: own.as_ref().map(|own| own.identity.to_string()),
            expiries: state.expiries(own.as_deref()),
            rejection: state.rejection.as_ref().or_else(|| state.roots.rejection()).cloned(),
            accepted: state.accepted,
            rejections: state.rejections,
        }
    }

    /// Why the proxy is not ready for want of a valid certificate.
    pub fn not_ready(&self, now: SystemTime) -> Option<&'static str> {
        self.state().settings.as_ref()?;
        match &*self.material() {
            None => Some("there is no valid certificate yet; the log and /status say why"),
            Some(own) if own.identity.not_after <= now => {
                Some("the certificate has expired; the log and /status say why there is no newer one")
            }
            Some(_) => None,
        }
    }
}

/// The urgency of the last warning about each expiry.
#[derive(Debug, Default)]
pub struct ExpiryWarnings(HashMap<(ExpiryKind, String), u8>);

impl ExpiryWarnings {
    /// Logs coming expiries, once at each step of urgency.
    pub fn warn(&mut self, expiries: Vec<Expiry>, now: SystemTime) {
        for expiry in expiries {
            let urgency = expiry.urgency(now);
            let Expiry { kind, subject: what, not_after: at, .. } = expiry;
            let last = self.0.entry((kind, what.clone())).or_default();
            if urgency > *last {
                *last = urgency;
                match urgency {
                    4 => tracing::error!("the {} {what} expired on {}", kind.word(), Date(at)),
                    _ => tracing::warn!("the {} {what} expires on {}: renew it", kind.word(), Date(at)),
                }
            }
        }
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}
