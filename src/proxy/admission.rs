//! Whether a request may go to its upstream at all: rate limit, requests in flight, injected faults.

use std::{
    future::{Future, poll_fn},
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::time::{sleep, sleep_until};

use super::{clock::WaitLimit, error::ProxyError, origin::Origin, target::RouteTarget, worker::Worker};
use crate::{
    cause::Cause,
    config::{ObservablePolicy, Policy},
    resilience::{
        limit::{LimitRefusal, LimitSettings},
        observe::enforce,
        rate::{RateKey, RateLimit, RateSettings},
    },
    upstream::policy_state::{PolicyState, QueuedWaker, RequestPermit},
};

/// Admits a request to its upstream, or says why not. `until`: how long the request may wait at all.
pub async fn admit(
    origin: &Origin<'_>,
    target: &RouteTarget,
    policy: &Policy,
    headers: &HeaderMap,
    until: WaitLimit,
) -> Result<Option<RequestPermit>, ProxyError> {
    let local = &target.serving;
    let policy_state = &local.upstream.shared.policy_state;
    let name = &local.cluster.settings.name;
    let observing = |policy| origin.view.snapshot.config.runtime.observe.contains(&policy);
    let note = |error: &ProxyError| {
        policy_state.counters.rejected.increment(error.cause.word());
        tracing::debug!(upstream = name, %error, "refused");
    };
    let rate = target.route_owner.cluster.rate_limit(target.route);
    if let (Some(settings), Some(rate)) = (&policy.rate_limit.0, rate) {
        let taken = take_rate(settings, rate, origin.peer, headers, name);
        enforce(taken, observing(ObservablePolicy::RateLimit), note)?;
    }
    let mut place = None;
    if let Some(settings) = &policy.limits.0 {
        let taken = acquire_permit(policy_state, settings, until.at(), name).await;
        place = enforce(taken, observing(ObservablePolicy::Limits), note)?;
    }
    if policy.fault.0.is_some() {
        enforce(
            inject(origin.worker, policy, name, observing(ObservablePolicy::Fault), until).await,
            observing(ObservablePolicy::Fault),
            note,
        )?;
    }
    Ok(place)
}

fn take_rate(
    settings: &RateSettings,
    rate: &RateLimit,
    peer: &HeaderValue,
    headers: &HeaderMap,
    name: &str,
) -> Result<(), ProxyError> {
    let key = match &settings.per {
        RateKey::Upstream => &b""[..],
        RateKey::Peer => peer.as_bytes(),
        RateKey::Header(header) => headers.get(header).map_or(&b""[..], |value| value.as_bytes()),
    };
    rate.admit(key, Instant::now()).map_err(|wait| {
        let detail = format!("{name}: over {} requests a second per {}", settings.rate, settings.per);
        ProxyError::new(Cause::RateLimited, detail).retry_after(wait)
    })
}

/// Takes a place among the requests in flight; waits for one where there is none.
async fn acquire_permit(
    policy_state: &Arc<PolicyState>,
    settings: &LimitSettings,
    deadline: Option<Instant>,
    name: &str,
) -> Result<RequestPermit, ProxyError> {
    if policy_state.requests.try_acquire() {
        return Ok(RequestPermit(Arc::clone(policy_state)));
    }
    let waited = Box::pin(wait_for_permit(policy_state, deadline)).await;
    waited.map_err(|full| {
        let (cause, what) = match full {
            LimitRefusal::Limit => {
                (Cause::LimitFull, format!("{} requests are in flight", settings.max_requests))
            }
            LimitRefusal::Queue => {
                (Cause::QueueFull, format!("{} requests are queued already", settings.max_pending))
            }
            LimitRefusal::Deadline => {
                (Cause::Deadline, "its deadline passed while it waited for a permit".to_owned())
            }
        };
        ProxyError::new(cause, format!("{name}: {what}")).retry_after(settings.retry_after())
    })
}

async fn wait_for_permit(
    policy_state: &Arc<PolicyState>,
    deadline: Option<Instant>,
) -> Result<RequestPermit, LimitRefusal> {
    let mut waiting = None;
    let mut timer = None;
    poll_fn(|cx| {
        let Some(ticket) = &mut waiting else {
            let waker = QueuedWaker(cx.waker().clone());
            let ticket = match policy_state.requests.enqueue(Instant::now(), deadline, waker) {
                Ok(ticket) => ticket,
                Err(full) => return Poll::Ready(Err(full)),
            };
            let expiry = timer.insert(Box::pin(sleep_until(ticket.expires_at.into())));
            // Registers the timer; a permit may be granted already.
            let _ = expiry.as_mut().poll(cx);
            let settled = ticket.is_granted();
            waiting = Some(Queued { policy_state, ticket: Some(ticket) });
            if settled {
                cx.waker().wake_by_ref();
            }
            return Poll::Pending;
        };
        let over = timer.as_mut().is_none_or(|timer| timer.as_mut().poll(cx).is_ready());
        if !over && !ticket.is_granted() {
            return Poll::Pending;
        }
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        Poll::Ready(ticket.settle().ok_or(if late { LimitRefusal::Deadline } else { LimitRefusal::Limit }))
    })
    .await
}

/// A ticket that is settled however the wait ends, so that no permit is lost with a client that left.
struct Queued<'a> {
    policy_state: &'a Arc<PolicyState>,
    ticket: Option<crate::resilience::limit::QueueTicket>,
}

impl Queued<'_> {
    fn is_granted(&self) -> bool {
        self.ticket.as_ref().is_some_and(|ticket| ticket.is_granted())
    }

    fn settle(&mut self) -> Option<RequestPermit> {
        let granted = self.policy_state.requests.finish_wait(self.ticket.take()?);
        granted.then(|| RequestPermit(Arc::clone(self.policy_state)))
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        // A place that was granted in the meantime goes back at once.
        drop(self.settle());
    }
}

/// Rehearses failures: delays the request, refuses it, or both.
async fn inject(
    worker: &Worker,
    policy: &Policy,
    name: &str,
    observing: bool,
    until: WaitLimit,
) -> Result<(), ProxyError> {
    let Some(settings) = &policy.fault.0 else { return Ok(()) };
    let fault = worker.with_rng(|rng| settings.decide(rng.unit_f64(), rng.unit_f64()));
    if let Some(delay) = fault.delay.filter(|_| !observing) {
        let waited = Box::pin(until.wait(sleep(delay))).await;
        waited.map_err(|time_limit| time_limit.unsent(name, "the delay that `fault` injects"))?;
    }
    match fault.abort.and_then(|status| StatusCode::from_u16(status).ok()) {
        Some(status) => {
            let detail = format!("{name}: `fault.abort` is set");
            Err(ProxyError::new(Cause::FaultInjected, detail).with_status(status))
        }
        None => Ok(()),
    }
}

/// A breaker that is open.
pub fn breaker_open(name: &str, policy_state: &PolicyState, retry_after: Duration) -> ProxyError {
    let report = policy_state.breaker.state_report();
    ProxyError::new(
        Cause::BreakerOpen,
        format!("{name}: its circuit breaker is {} ({})", report.state.word(), report.reason),
    )
    .retry_after(retry_after)
}
