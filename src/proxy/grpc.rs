//! The outcome of a gRPC request that is known only after its response has begun: by its trailers, or by a reset.

use std::{rc::Rc, time::Instant};

use http::HeaderMap;

use super::attempt;
use crate::{
    model::WorkerCluster,
    resilience::{
        breaker::BreakerPermit,
        classify::{AttemptOutcome, GrpcStatus, Health, OutcomeKind, Reset, RetryAdvice},
        outlier::{AttemptTimes, EndpointOutcome},
        retry::StopReason,
    },
    upstream::{Lease, local::LocalEndpoint, policy_state::BreakerOutcome, pool::ResponseError},
};

/// What is needed to report the outcome of a gRPC request at its end. Reports nothing if dropped (the client
/// cancelled).
#[derive(Debug)]
pub struct GrpcReporter {
    /// The upstream of the request.
    pub serving: Rc<WorkerCluster>,
    /// The upstream and route whose policy applies.
    pub route_owner: Rc<WorkerCluster>,
    pub route: Option<usize>,
    pub endpoint: Rc<LocalEndpoint>,
    pub permit: Option<BreakerPermit>,
    /// The client's deadline, where it is earlier than the proxy's timeout: a service that ends at it is not at fault.
    pub client_deadline: Option<Instant>,
    /// When the attempt began.
    pub began: Instant,
    /// The random number for decisions, from 0 to 1.
    pub random: f64,
}

impl GrpcReporter {
    /// Reports the status in the trailers. A missing status is UNKNOWN, as in gRPC libraries.
    pub fn report_trailers(self, trailers: &HeaderMap) {
        let status = GrpcStatus::from_headers(trailers).unwrap_or(GrpcStatus::Unknown);
        self.report_status(status, false);
    }

    /// Reports that the stream was reset or its connection was lost.
    pub fn report_reset(self, error: &ResponseError, lease: Option<&Lease>) {
        let counted = lease.is_some_and(|lease| attempt::is_counted(error, lease));
        match error.h2().and_then(h2::Error::reason) {
            // The specification maps these codes (PROTOCOL-HTTP2).
            Some(h2::Reason::CANCEL) => self.report_status(GrpcStatus::Cancelled, counted),
            Some(h2::Reason::ENHANCE_YOUR_CALM) => self.report_status(GrpcStatus::ResourceExhausted, counted),
            _ => {
                let reset = Reset { reused: false, request_sent: true, response_started: true };
                self.report(&AttemptOutcome::new(OutcomeKind::Reset(reset)), counted);
            }
        }
    }

    fn report_status(self, status: GrpcStatus, counted: bool) {
        let left = self.client_deadline.map(|at| at.saturating_duration_since(Instant::now()));
        self.report(&AttemptOutcome::grpc(status, RetryAdvice::None, left), counted);
    }

    /// `counted`: another request on the same connection has already reported its loss.
    fn report(self, outcome: &AttemptOutcome, counted: bool) {
        let (policy_state, now) = (&self.serving.upstream.shared.policy_state, Instant::now());
        let health = if counted { Health::Neutral } else { outcome.health() };
        if outcome.is_failure() {
            let (_, retries) = self.route_owner.cluster.policy(self.route);
            let reason =
                if retries.is_retryable(outcome) { StopReason::Committed } else { StopReason::NotRetryable };
            policy_state.counters.retries.increment(reason.word());
            tracing::debug!(
                upstream = self.serving.cluster.settings.name,
                endpoint = %self.endpoint.address(),
                outcome = outcome.label(),
                reason = reason.word(),
                "gRPC request failed after its response had begun"
            );
        }
        let local = &self.serving.upstream;
        let evidence = EndpointOutcome::new(outcome, health, false);
        self.endpoint.shared.outcomes.record(outcome.kind, now);
        self.endpoint
            .report(&local.shared, evidence, AttemptTimes { began: self.began, ended: now }, || self.random);
        if let Some(permit) = self.permit {
            let verdict = BreakerOutcome {
                health: local.health_for_breaker(&self.endpoint, health, now),
                is_absence: evidence.makes_absent(),
            };
            policy_state.report(&self.serving.cluster.settings.name, permit, verdict, now, self.random);
        }
    }
}
