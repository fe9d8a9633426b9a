//! Metrics of upstreams: a fixed number of series for each configured upstream, and one set for all other hosts.

use std::{collections::BTreeMap, fmt, time::Instant};

use prometheus_client::{
    encoding::DescriptorEncoder,
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

use super::{Labels, family};
use crate::{
    admin::{mirror::MirrorStatus, split::SplitStatus},
    model::Cluster,
    proxy::worker::Shared,
    upstream::{
        EndpointState,
        policy_state::{LabeledCounters, PolicyCounters},
    },
};

/// Label of all hosts that no upstream names.
pub(super) const OTHER: &str = "other";
/// Label of the service itself, behind the inbound listener.
const INBOUND: &str = "inbound";

/// Values by the label `upstream`. A configured upstream that is called `other` or `inbound` is added to that row,
/// because no series may occur twice.
#[derive(Debug)]
pub struct UpstreamRows(BTreeMap<String, Row>);

#[derive(Debug, Default)]
struct Row {
    counts: PolicyCounters,
    /// The lowest of all clusters in this row.
    budget: Option<usize>,
    /// The highest gauge value (most open) of all; none without a breaker.
    breaker: Option<i64>,
    /// None where limits are off.
    in_flight: Option<u64>,
    /// A route has a cache.
    has_cache: bool,
    /// In the order of [`EndpointState::WORDS`].
    endpoints: [u64; EndpointState::WORDS.len()],
    splits: Vec<SplitStatus>,
    deprecated: Vec<(String, String, u64)>,
    mirrors: Vec<MirrorStatus>,
}

impl UpstreamRows {
    pub fn of(shared: &Shared) -> Self {
        let now = Instant::now();
        let snapshot = shared.snapshot.load();
        let mut rows = Self(BTreeMap::new());
        for cluster in &snapshot.clusters {
            rows.row(&cluster.upstream.name).add(cluster, now);
        }
        let (addresses, forgotten) = shared.inbound_addresses.read();
        let service = rows.row(INBOUND);
        service.counts.absorb(&forgotten);
        addresses.iter().chain([&snapshot.inbound]).for_each(|cluster| service.add(cluster, now));
        let (hosts, forgotten) = shared.unknown_hosts.read();
        if !hosts.is_empty() || !forgotten.is_zero() {
            let row = rows.row(OTHER);
            row.counts.absorb(&forgotten);
            hosts.iter().for_each(|cluster| row.add(cluster, now));
        }
        rows
    }

    fn row(&mut self, upstream: &str) -> &mut Row {
        self.0.entry(upstream.to_owned()).or_default()
    }

    pub fn encode(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        self.tally(encoder, "outrigger_retries", "Failed attempts by what followed", "outcome", |c| {
            &c.retries
        })?;
        let help = "Retries that the budget would grant now";
        self.gauge(encoder, "outrigger_retry_budget_available", help, |row| row.budget.map(of_usize))?;
        let help = "Circuit breaker: 0 closed, 1 half open, 2 open";
        self.gauge(encoder, "outrigger_breaker_state", help, |row| row.breaker)?;
        let help = "State changes of circuit breakers";
        self.tally(encoder, "outrigger_breaker_transitions", help, "to", |c| &c.transitions)?;
        let endpoints = self.0.iter().flat_map(|(upstream, row)| {
            EndpointState::WORDS
                .iter()
                .zip(row.endpoints)
                .map(|(state, count)| (labels(upstream, "state", state), ConstGauge::new(count)))
        });
        family(encoder, "outrigger_endpoints", "Endpoints of upstreams by state", None, endpoints)?;
        let help = "Requests of split routes by the upstream that serves them";
        let shares = self.0.iter().flat_map(|(upstream, row)| {
            row.splits.iter().flat_map(move |split| {
                split.to.iter().map(move |share| {
                    let route = ("route", split.route.clone());
                    let labels = [("upstream", upstream.clone()), route, ("to", share.upstream.clone())];
                    (labels, ConstCounter::new(share.requests))
                })
            })
        });
        family(encoder, "outrigger_split_requests", help, None, shares)?;
        let help = "Requests of deprecated routes by client";
        let clients = self.0.iter().flat_map(|(upstream, row)| {
            row.deprecated.iter().map(move |(route, client, count)| {
                let route = ("route", route.clone());
                let labels = [("upstream", upstream.clone()), route, ("client", client.clone())];
                (labels, ConstCounter::new(*count))
            })
        });
        family(encoder, "outrigger_deprecated_requests", help, None, clients)?;
        let help = "Requests of routes with a mirror, by what became of the copy";
        let copies = self.0.iter().flat_map(|(upstream, row)| {
            row.mirrors.iter().flat_map(move |mirror| {
                mirror.copies.iter().map(move |(outcome, count)| {
                    let route = ("route", mirror.route.clone());
                    let labels = [("upstream", upstream.clone()), route, ("outcome", outcome.clone())];
                    (labels, ConstCounter::new(*count))
                })
            })
        });
        family(encoder, "outrigger_mirror_requests", help, None, copies)?;
        let help = "Requests in flight";
        self.gauge(encoder, "outrigger_requests_in_flight", help, |row| row.in_flight.map(of_u64))?;
        let help = "Requests that the proxy refused, by cause";
        self.tally(encoder, "outrigger_rejected", help, "reason", |c| &c.rejected)?;
        let help = "Requests of routes with a cache, by where the response came from";
        let cached = self.0.iter().filter(|(_, row)| row.has_cache).flat_map(|(upstream, row)| {
            row.counts
                .cache
                .iter()
                .map(move |(word, count)| (labels(upstream, "result", word), ConstCounter::new(count)))
        });
        family(encoder, "outrigger_cache_requests", help, None, cached)
    }

    fn tally(
        &self,
        encoder: &mut DescriptorEncoder,
        name: &str,
        help: &str,
        key: &'static str,
        of: impl Fn(&PolicyCounters) -> &LabeledCounters,
    ) -> fmt::Result {
        let members = self.0.iter().flat_map(|(upstream, row)| {
            of(&row.counts)
                .iter()
                .map(move |(word, count)| (labels(upstream, key, word), ConstCounter::new(count)))
        });
        family(encoder, name, help, None, members)
    }

    fn gauge(
        &self,
        encoder: &mut DescriptorEncoder,
        name: &str,
        help: &str,
        of: impl Fn(&Row) -> Option<i64>,
    ) -> fmt::Result {
        let members = self.0.iter().filter_map(|(upstream, row)| {
            Some(([("upstream", upstream.clone())], ConstGauge::new(of(row)?)))
        });
        family(encoder, name, help, None, members)
    }
}

impl Row {
    fn add(&mut self, cluster: &Cluster, now: Instant) {
        let (upstream, policy) = (&cluster.upstream, &cluster.settings.policy);
        let policy_state = &upstream.policy_state;
        self.counts.absorb(&policy_state.counters);
        if policy.retry.is_some() {
            let available = policy_state.budget.available(now);
            self.budget = Some(self.budget.map_or(available, |least| least.min(available)));
        }
        if cluster.has_breaker() {
            self.breaker = self.breaker.max(Some(policy_state.breaker.state_report().state.gauge()));
        }
        if policy.limits.is_some() {
            let in_flight = u64::from(policy_state.requests.in_flight());
            self.in_flight = Some(self.in_flight.unwrap_or(0) + in_flight);
        }
        self.deprecated.extend(policy_state.deprecated.read());
        self.mirrors.extend(MirrorStatus::all_of(cluster));
        self.splits.extend(SplitStatus::all_of(cluster));
        self.has_cache |= cluster.has_cache();
        for endpoint in &upstream.endpoints().endpoints {
            let word = upstream.state_of(endpoint, now).word();
            if let Some(at) = EndpointState::WORDS.iter().position(|known| *known == word) {
                self.endpoints[at] += 1;
            }
        }
    }
}

fn labels(upstream: &str, key: &'static str, value: &str) -> Labels<2> {
    [("upstream", upstream.to_owned()), (key, value.to_owned())]
}

fn of_usize(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn of_u64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
