//! Hedging: a second copy of an idempotent request where the first is slow.

use std::{pin::pin, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    attempt::{Answer, Failed, Outgoing},
    body::Replay,
    connect,
    deliver::may_be_failure,
    exchange::{Carried, Exchange},
    tries::{Asked, Number, Over, SoFar},
};
use crate::{
    resilience::{deadline::timeout_header_millis, hedge},
    telemetry::record::AttemptReason,
    upstream::local::PickCriteria,
};

impl Exchange<'_> {
    /// One try under the clock, and a second copy at another endpoint if no answer has come after `delay`.
    pub(super) async fn hedged(
        &self,
        asked: (Asked, Number),
        began: Instant,
        delay: Duration,
        carried: &mut Carried,
        so_far: &mut SoFar,
    ) -> Over {
        let Carried { clock, outgoing, replay, .. } = carried;
        let replay = &*replay;
        let SoFar { counted, tried, .. } = so_far;
        let left = clock.left(began);
        let mut head = outgoing.clone();
        let send =
            self.send(&self.endpoints[asked.0.index], (&mut head, true), replay, None, (asked.1, began));
        let (mut first, mut second) = (Some(asked), None);
        // The copy that failed while the other one was still under way.
        let mut lost = None;
        let over = |result, (asked, number): (Asked, Number), began| {
            Over::new(Ok(result), (asked.index, asked.permit), number, began)
        };
        let mut work = Box::pin(async {
            let mut send = pin!(send);
            tokio::select! {
                biased;
                result = &mut send => return (result, began),
                () = sleep(delay) => {}
            }
            let left = left.map(|left| left.saturating_sub(began.elapsed()));
            let in_time = left.is_none_or(|left| timeout_header_millis(left).is_some());
            let asked = first.as_ref().map_or(0, |(asked, _)| asked.index);
            let other = if in_time { self.hedge(asked, replay, tried) } else { None };
            let Some(other) = other else { return (send.await, began) };
            *counted += 1;
            let sent = Instant::now();
            let (number, made) = self.begin(&other, (AttemptReason::Hedge, Duration::ZERO), sent, outgoing);
            tried.push(other.index);
            self.tell_next_hop(left, outgoing, made);
            let endpoint = &self.endpoints[other.index];
            let mut copy = pin!(self.send(endpoint, (outgoing, false), replay, None, (number, sent)));
            second = Some((other, number));
            // Whichever answers well first; a failure waits for the other one.
            tokio::select! {
                result = &mut send => {
                    if succeeded(&result) { second = None; return (result, began) }
                    lost = first.take().map(|asked| over(result, asked, began));
                    (copy.await, sent)
                }
                result = &mut copy => {
                    if succeeded(&result) { first = None; return (result, sent) }
                    lost = second.take().map(|asked| over(result, asked, sent));
                    (send.await, began)
                }
            }
        });
        let result = clock.run(self.call.progress, work.as_mut()).await;
        // The loser is cancelled here and counts nowhere: its permit is dropped.
        drop(work);
        let (result, began) = match result {
            Ok((result, began)) => (Ok(result), began),
            Err(ran_out) => (Err(ran_out), began),
        };
        if let Some(lost) = lost {
            self.judge(lost, replay, clock);
        }
        if first.is_none() && second.is_some() && result.as_ref().is_ok_and(succeeded) {
            self.guards().counters.retries.increment("hedge_won");
        }
        let (index, permit, number) = first
            .or(second)
            .map_or((0, None, Number::MAX), |(asked, number)| (asked.index, asked.permit, number));
        Over::new(result, (index, permit), number, began)
    }

    /// How long after the first copy a second one is to be sent.
    pub(super) fn hedge_delay(&self, outgoing: &Outgoing, replay: &Replay, tries: u32) -> Option<Duration> {
        let settings = self.policy.hedge.0?;
        let call = hedge::HedgeCandidate {
            method: &outgoing.method,
            idempotency_key: self.call.idempotency_key,
            body_ready: replay.is_empty(),
            attempts: tries,
            max_retries: self.policy.retry.as_ref().map_or(0, |retry| retry.max),
            breaker_closed: self.guards().breaker.is_closed(),
        };
        let now = Instant::now().into_std();
        settings.delay(&call, |percent| self.guards().quantile(percent, now).get())
    }

    /// Where the second copy goes, if it may be sent.
    fn hedge(&self, first: usize, replay: &Replay, tried: &[usize]) -> Option<Asked> {
        let guards = self.guards();
        let avoid: Vec<usize> = tried.iter().copied().chain([first]).collect();
        let wanted = PickCriteria { tried: &avoid, hash: None, probe: None };
        let index = connect::pick(self.call.connection, &self.target.local, &self.endpoints, &wanted).ok()?;
        let allowed = replay.is_empty()
            && guards.breaker.is_closed()
            && connect::check_address(
                self.call.view,
                self.call.connection,
                self.target,
                self.endpoints[index].address(),
            )
            .is_ok();
        if !allowed {
            return None;
        }
        let permit = self.permit(Instant::now()).ok()?;
        // Last, so that nothing is spent on a copy that isn't sent.
        if !guards.budget.withdraw(Instant::now().into_std()) {
            return None;
        }
        guards.counters.retries.increment("hedge");
        Some(Asked { index, permit, last: false })
    }
}

/// Whether a copy's answer ends the race with the other copy.
fn succeeded(result: &Result<Answer, Failed>) -> bool {
    result.as_ref().is_ok_and(|answer| !may_be_failure(answer.response.status(), answer.present))
}
