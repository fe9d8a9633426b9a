//! `mirror` of routes, prepared once per configuration.

use std::{collections::HashMap, sync::Arc};

use http::Method;

use super::Cluster;
use crate::resilience::mirror::{Copies, MirrorSettings};

/// A route of whose requests copies are sent to another upstream.
#[derive(Clone, Debug)]
pub struct RouteMirror {
    pub settings: MirrorSettings,
    methods: Vec<Method>,
    /// The index of the upstream that gets the copies.
    pub upstream: usize,
    /// The upstream that has the route, with the policy of copies.
    pub route_owner: Arc<Cluster>,
    pub copies: Arc<Copies>,
}

impl RouteMirror {
    pub fn copies_method(&self, method: &Method) -> bool {
        self.methods.contains(method)
    }
}

/// The copies under way and the counts of each route, which outlive reloads. Lives on the control thread.
#[derive(Debug, Default)]
pub struct Mirrors(HashMap<(String, String), Arc<Copies>>);

impl Mirrors {
    /// The mirror of each route, in their order; empty where no route has one.
    pub fn of_routes(
        &mut self,
        cluster: &Cluster,
        index_of: impl Fn(&str) -> Option<usize>,
    ) -> Vec<Option<Box<RouteMirror>>> {
        let settings = &cluster.settings;
        if settings.routes.iter().all(|route| route.mirror.is_none()) {
            return Vec::new();
        }
        let mirror = |route: &crate::config::Route| {
            let mirror = route.mirror.clone()?;
            let copies = self.0.entry((settings.name.clone(), route.label())).or_default();
            Some(Box::new(RouteMirror {
                methods: mirror.methods.iter().filter_map(|method| method.parse().ok()).collect(),
                // A validated configuration names only upstreams that exist.
                upstream: index_of(&mirror.upstream)?,
                route_owner: Arc::new(cluster.for_copies(&mirror)),
                copies: Arc::clone(copies),
                settings: mirror,
            }))
        };
        settings.routes.iter().map(mirror).collect()
    }
}
