//! The outcome of a gRPC call that shows only after its response has begun: in its trailers, or as it breaks.

use std::{rc::Rc, time::Instant};

use http::HeaderMap;

use super::attempt;
use crate::{
    model::LocalCluster,
    resilience::{
        breaker::Permit,
        classify::{Advice, Ending, GrpcStatus, Health, Outcome, Reset},
        outlier::Evidence,
        retry::Reason,
    },
    upstream::{Lease, local::LocalEndpoint, pool::AnswerError},
};

/// Who is to be told, and what is needed for that. Dropped, it tells nobody: the caller left.
#[derive(Debug)]
pub struct GrpcEnd {
    /// Serves the call.
    pub local: Rc<LocalCluster>,
    /// Whose routes it matched, and which.
    pub matched: Rc<LocalCluster>,
    pub route: Option<usize>,
    pub endpoint: Rc<LocalEndpoint>,
    pub permit: Option<Permit>,
    /// The caller's deadline where that is shorter than ours: a service that gives up just then is not to blame.
    pub callers_deadline: Option<Instant>,
    /// When its attempt began.
    pub began: Instant,
    /// Drawn for the decision, from 0 to 1.
    pub random: f64,
}

impl GrpcEnd {
    /// The call has ended by itself. Without a status that is UNKNOWN, as any gRPC library would have it.
    pub fn ended(self, trailers: &HeaderMap) {
        let status = GrpcStatus::from_headers(trailers).unwrap_or(GrpcStatus::Unknown);
        self.tell(status, false);
    }

    /// The stream was reset, or its connection was lost.
    pub fn broke(self, error: &AnswerError, lease: Option<&Lease>) {
        let counted = lease.is_some_and(|lease| attempt::is_counted(error, lease));
        match error.h2().and_then(h2::Error::reason) {
            // What these mean is told by the specification (PROTOCOL-HTTP2).
            Some(h2::Reason::CANCEL) => self.tell(GrpcStatus::Cancelled, counted),
            Some(h2::Reason::ENHANCE_YOUR_CALM) => self.tell(GrpcStatus::ResourceExhausted, counted),
            _ => {
                let reset = Reset { reused: false, request_sent: true, response_begun: true };
                self.report(&Outcome::new(Ending::Reset(reset)), counted);
            }
        }
    }

    fn tell(self, status: GrpcStatus, counted: bool) {
        let left = self.callers_deadline.map(|at| at.saturating_duration_since(Instant::now()));
        self.report(&Outcome::grpc(status, Advice::None, left), counted);
    }

    /// `counted`: the loss of its connection has been told of by another call that it carried.
    fn report(self, outcome: &Outcome, counted: bool) {
        let (guards, now) = (&self.local.upstream.shared.guards, Instant::now());
        let health = if counted { Health::Neutral } else { outcome.health() };
        if outcome.is_failure() {
            let (_, retries) = self.matched.cluster.policy(self.route);
            let reason = if retries.names(outcome) { Reason::Committed } else { Reason::NotRetryable };
            guards.counts.retries.add(reason.word());
            tracing::debug!(
                upstream = self.local.cluster.settings.name,
                endpoint = %self.endpoint.address(),
                outcome = outcome.label(),
                reason = reason.word(),
                "a gRPC call failed after it had begun to answer"
            );
        }
        let local = &self.local.upstream;
        let evidence = Evidence::new(outcome, health, false);
        self.endpoint.shared.outcomes.record(outcome.ending, now);
        self.endpoint.report(&local.shared, evidence, (self.began, now), || self.random);
        if let Some(permit) = self.permit {
            let told = (local.blame(&self.endpoint, health, now), evidence.is_absence());
            guards.report(&self.local.cluster.settings.name, permit, told, now, self.random);
        }
    }
}
