//! Hedging: a second copy of an idempotent request where the first is slow. Performs what [`RetryPlan`] says.

use std::{pin::pin, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    address_check,
    attempt::{AttemptError, Outgoing, UpstreamResponse},
    attempts::{FinishedAttempt, PlannedAttempt, RecordIndex, StartedAttempt},
    body::Replay,
    deliver::may_be_failure,
    endpoints,
    exchange::{Exchange, RequestState},
};
use crate::{
    resilience::{
        hedge,
        retry::{Action, AttemptKind, Event, RequestCopy, RetryPlan},
    },
    upstream::local::PickCriteria,
};

impl Exchange<'_> {
    /// One attempt under the clock, and a second copy at another endpoint if no response has come after `delay`.
    pub(super) async fn hedged(
        &self,
        started: StartedAttempt,
        delay: Duration,
        state: &mut RequestState,
        plan: &mut RetryPlan<'_>,
    ) -> FinishedAttempt {
        let RequestState { clock, outgoing, replay, .. } = state;
        let replay = &*replay;
        let (index, began) = (started.endpoint_index, started.began);
        let left = clock.left(began);
        let mut head = outgoing.clone();
        let send = self.send(started.dispatch(true), &mut head, replay, None);
        let (mut first, mut second) = (Some(started), None);
        // The copy that failed while the other one was still under way.
        let mut lost = None;
        let mut work = Box::pin(async {
            let mut send = pin!(send);
            tokio::select! {
                biased;
                result = &mut send => return result,
                () = sleep(delay) => {}
            }
            let time_left = left.map(|left| left.saturating_sub(began.elapsed()));
            let Some(planned) = self.plan_copy(index, time_left, replay, plan) else { return send.await };
            let (copy, made) = self.begin_attempt(planned, Instant::now(), outgoing);
            self.write_attempt_fields(time_left, outgoing, made);
            let mut send_copy = pin!(self.send(copy.dispatch(false), outgoing, replay, None));
            second = Some(copy);
            loop {
                let (copy, result) = tokio::select! {
                    result = &mut send, if first.is_some() => (RequestCopy::First, result),
                    result = &mut send_copy, if second.is_some() => (RequestCopy::Hedge, result),
                };
                let event = Event::CopyEnded { copy, succeeded: succeeded(&result) };
                let is_settled = matches!(plan.next(event, Instant::now().into_std()), Action::Settle(_));
                let (this, other) = match copy {
                    RequestCopy::First => (&mut first, &mut second),
                    RequestCopy::Hedge => (&mut second, &mut first),
                };
                if is_settled {
                    // The other copy is cancelled and counts nowhere: its permit is dropped.
                    *other = None;
                    return result;
                }
                lost = this.take().map(|attempt| attempt.finish(Ok(result)));
            }
        });
        let result = clock.run(self.progress(), work.as_mut()).await;
        drop(work);
        if let Some(lost) = lost {
            self.judge(lost, replay, clock);
        }
        if first.is_none() && second.is_some() && result.as_ref().is_ok_and(succeeded) {
            self.policy_state().counters.retries.increment("hedge_won");
        }
        let unknown =
            || StartedAttempt { endpoint_index: index, permit: None, record_index: RecordIndex::MAX, began };
        first.or(second).unwrap_or_else(unknown).finish(result)
    }

    /// How long after the first copy a second one is to be sent.
    pub(super) fn hedge_delay(
        &self,
        outgoing: &Outgoing,
        replay: &Replay,
        attempts: u32,
    ) -> Option<Duration> {
        let settings = self.policy.hedge.0?;
        let call = hedge::HedgeCandidate {
            method: &outgoing.method,
            idempotency_key: self.request.idempotency_key,
            body_ready: replay.is_empty(),
            attempts,
            max_retries: self.policy.retry.as_ref().map_or(0, |retry| retry.max),
            breaker_closed: self.policy_state().breaker.is_closed(),
        };
        let now = Instant::now().into_std();
        settings.delay(&call, |percent| self.policy_state().quantile(percent, now).get())
    }

    /// Where the second copy goes, if it may be sent. `first`: the endpoint of the first one.
    fn plan_copy(
        &self,
        first: usize,
        time_left: Option<Duration>,
        replay: &Replay,
        plan: &mut RetryPlan<'_>,
    ) -> Option<PlannedAttempt> {
        let now = Instant::now();
        if plan.next(Event::HedgeDue { time_left }, now.into_std()) != Action::PickCopy {
            return None;
        }
        let avoided: Vec<usize> = plan.failed_endpoints().iter().copied().chain([first]).collect();
        let wanted = PickCriteria { tried: &avoided, hash: None, probe: None };
        let origin = self.request.origin;
        let index = endpoints::pick(origin.worker, &self.target.serving, &self.endpoints, &wanted).ok()?;
        let address = self.endpoints[index].address();
        let is_allowed = replay.is_empty()
            && self.policy_state().breaker.is_closed()
            && address_check::check_address(origin.view, origin.worker, self.target, address).is_ok();
        if !is_allowed {
            return None;
        }
        let permit = self.permit(now).ok()?;
        if plan.next(Event::CopyAdmitted { endpoint: index }, now.into_std()) != Action::SendCopy {
            return None;
        }
        self.policy_state().counters.retries.increment("hedge");
        let (kind, waited) = (AttemptKind::Hedge, Duration::ZERO);
        Some(PlannedAttempt { endpoint_index: index, permit, kind, waited, is_last: false })
    }
}

/// Whether a copy's response ends the race with the other copy.
fn succeeded(result: &Result<UpstreamResponse, AttemptError>) -> bool {
    result.as_ref().is_ok_and(|response| !may_be_failure(response.head.status(), response.present))
}
