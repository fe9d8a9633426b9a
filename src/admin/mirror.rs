//! Mirrored routes in `/status`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::Cluster;

/// A route of whose requests copies are sent to another upstream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorStatus {
    /// The route's name, else what it matches.
    pub route: String,
    /// The upstream that gets the copies.
    pub upstream: String,
    /// Copies under way.
    pub in_flight: u32,
    /// Copies by what became of them, since the process began.
    pub copies: BTreeMap<String, u64>,
}

impl MirrorStatus {
    /// The mirrors of an upstream's routes.
    pub fn all_of(cluster: &Cluster) -> Vec<Self> {
        let routes = cluster.settings.routes.iter().zip(&cluster.mirrors);
        let mirrored = routes.filter_map(|(route, mirror)| Some((route, mirror.as_ref()?)));
        let status = mirrored.map(|(route, mirror)| Self {
            route: route.label(),
            upstream: mirror.settings.upstream.clone(),
            in_flight: mirror.copies.in_flight(),
            copies: mirror.copies.read().map(|(outcome, count)| (outcome.word().to_owned(), count)).collect(),
        });
        status.collect()
    }
}
