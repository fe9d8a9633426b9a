//! Where `to` of a route leads: to one other upstream, or to several by weight.

use std::{collections::HashMap, sync::Arc};

use crate::{
    config::{Route, Upstream},
    resilience::split::{RouteTo, Split, StickyKey},
};

/// Where requests of a route go.
#[derive(Clone, Debug)]
pub enum RouteDestination {
    /// To the upstream that has the route.
    Own,
    /// To the upstream of this index.
    Other(usize),
    Split(Box<RouteSplit>),
}

/// A route whose requests are divided among upstreams.
#[derive(Clone, Debug)]
pub struct RouteSplit {
    pub split: Arc<Split>,
    /// The upstreams' indices in the configuration, in the order of the split's targets.
    pub upstreams: Box<[Option<usize>]>,
    pub sticky: StickyKey,
}

/// The splits of named routes. A reload keeps one whose settings did not change, with the weights set since. Lives on
/// the control thread.
#[derive(Debug, Default)]
pub struct Splits(HashMap<RouteName, KnownSplit>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RouteName {
    upstream: String,
    route: String,
}

#[derive(Clone, Debug)]
struct KnownSplit {
    to: RouteTo,
    split: Arc<Split>,
}

impl Splits {
    /// Forgets the splits of routes that are no longer configured.
    pub fn retain(&mut self, upstreams: &[Upstream]) {
        self.0.retain(|name, _| {
            let mut named = upstreams.iter().filter(|upstream| upstream.name == name.upstream);
            named.any(|upstream| upstream.routes.iter().any(|route| route.name.as_ref() == Some(&name.route)))
        });
    }

    /// The destination of each route of an upstream, in their order.
    pub fn destinations(
        &mut self,
        upstream: &Upstream,
        index_of: impl Fn(&str) -> Option<usize>,
    ) -> Vec<RouteDestination> {
        let mut destination = |route: &Route| match &route.to {
            None => RouteDestination::Own,
            // A validated configuration names only upstreams that exist.
            Some(RouteTo::One(name)) => index_of(name).map_or(RouteDestination::Own, RouteDestination::Other),
            Some(to @ RouteTo::Split(targets)) => RouteDestination::Split(Box::new(RouteSplit {
                split: self.split(&upstream.name, route, to),
                upstreams: targets.iter().map(|target| index_of(&target.upstream)).collect(),
                sticky: route.sticky.clone(),
            })),
        };
        upstream.routes.iter().map(&mut destination).collect()
    }

    fn split(&mut self, upstream: &str, route: &Route, to: &RouteTo) -> Arc<Split> {
        let RouteTo::Split(targets) = to else { return Arc::new(Split::new(&[])) };
        let new = || Arc::new(Split::new(targets));
        // Without a name nothing can have changed its weights.
        let Some(name) = &route.name else { return new() };
        let name = RouteName { upstream: upstream.to_owned(), route: name.clone() };
        match self.0.get(&name) {
            Some(known) if known.to == *to => Arc::clone(&known.split),
            _ => {
                let split = new();
                self.0.insert(name, KnownSplit { to: to.clone(), split: Arc::clone(&split) });
                split
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Endpoints, Policy, RouteMatch},
        resilience::split::SplitTarget,
    };

    fn shop(name: Option<&str>, weight: u32) -> Upstream {
        let mut upstream = Upstream::new("shop", Endpoints::Fixed(Vec::new()), Policy::default());
        let target = |(upstream, weight): (&str, u32)| SplitTarget { upstream: upstream.to_owned(), weight };
        upstream.routes.push(Route {
            name: name.map(ToOwned::to_owned),
            to: Some(RouteTo::Split([("shop", 90), ("next", weight)].map(target).into())),
            ..Route::new(RouteMatch::default(), Policy::default())
        });
        upstream
    }

    fn last_percent(splits: &mut Splits, upstream: &Upstream, set: Option<u8>) -> Option<u8> {
        let index_of = |name: &str| ["shop", "next"].iter().position(|known| *known == name);
        let destinations = splits.destinations(upstream, index_of);
        let RouteDestination::Split(split) = &destinations[0] else { panic!("not a split") };
        assert_eq!(*split.upstreams, [Some(0), Some(1)]);
        if set.is_some() {
            split.split.set_last(set);
        }
        split.split.last_percent()
    }

    #[test]
    fn a_weight_that_was_set_outlives_a_reload_until_the_file_changes_it() {
        let mut splits = Splits::default();
        let upstream = shop(Some("orders"), 10);
        assert_eq!(last_percent(&mut splits, &upstream, Some(40)), Some(40));
        splits.retain(std::slice::from_ref(&upstream));
        assert_eq!(last_percent(&mut splits, &upstream, None), Some(40));
        assert_eq!(last_percent(&mut splits, &shop(Some("orders"), 20), None), None, "the file changed");
        splits.retain(&[]);
        assert!(splits.0.is_empty(), "a removed route is forgotten");
    }

    #[test]
    fn splits_without_a_name_are_not_kept() {
        let mut splits = Splits::default();
        assert_eq!(last_percent(&mut splits, &shop(None, 10), Some(40)), Some(40));
        assert_eq!(last_percent(&mut splits, &shop(None, 10), None), None);
    }
}
