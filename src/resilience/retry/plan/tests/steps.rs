//! How an attempt is sent, hedged, judged and ended, and the rules that hold then.

use super::*;
use crate::resilience::outlier::AttemptTimes;

impl World<'_> {
    /// What holds whenever a byte may go out.
    pub(super) fn check_send(&mut self, index: usize, kind: AttemptKind) {
        self.sent += 1;
        let (setup, now) = (self.setup, self.now);
        let request = &mut self.requests[index];
        assert!(!request.is_over && !request.is_committed, "a response has gone to the client");
        assert!(request.deadline.is_none_or(|deadline| now + MS <= deadline), "no time is left");
        assert!(!request.has_lost_body, "its body cannot be sent again");
        assert!(request.first.is_some(), "no permit");
        let method = &METHODS[usize::from(request.arrival.method)];
        let is_idempotent = [Method::GET, Method::DELETE].contains(method) || request.arrival.idempotency_key;
        let may_repeat = match setup.retry.as_ref().map(|retry| &retry.methods) {
            None | Some(RetryMethods::Idempotent) => is_idempotent,
            Some(RetryMethods::All) => true,
            Some(RetryMethods::Listed(names)) => names.iter().any(|name| name == method.as_str()),
        };
        // What is hedged is idempotent, and was sent twice already.
        let may_repeat = may_repeat || (is_idempotent && request.was_hedged);
        assert!(may_repeat || !request.is_touched, "{method} a second time");
        match kind {
            AttemptKind::First | AttemptKind::Fallback => request.counting += 1,
            AttemptKind::Retry | AttemptKind::Hedge => {
                assert!(kind == AttemptKind::Hedge || !setup.observes_retries, "retries are only observed");
                request.counting += 1;
                let granted =
                    if kind == AttemptKind::Hedge { now } else { request.granted.expect("a grant") };
                self.charged.push(granted);
            }
            AttemptKind::Reconnect => request.reconnects += 1,
            AttemptKind::NextEndpoint | AttemptKind::Sibling => request.elsewhere += 1,
        }
        let max = setup.retry.as_ref().map_or(0, |retry| retry.max);
        assert!(request.counting <= 1 + max, "{} attempts", request.counting);
        let is_at_most_once = setup.retry.as_ref().is_some_and(|retry| retry.max == 0);
        let free = if is_at_most_once { 0 } else { 1 + MAX_RESENDS };
        assert!(request.reconnects <= free, "{} free attempts", request.reconnects);
        assert!(request.elsewhere <= setup.endpoints as u32, "{} moves", request.elsewhere);
    }

    /// Reports an outcome as the proxy does.
    pub(super) fn judge(&mut self, index: usize, flight: Flight) -> Event {
        let Flight { endpoint, began, permit, scripted, .. } = flight;
        let (now, outcome) = (self.at(), scripted.outcome());
        let (breaker, random) = (Arc::clone(&self.breaker), self.random());
        let evidence = EndpointOutcome::new(&outcome, outcome.health(), false);
        self.outliers.report(
            &address(endpoint),
            &self.health[endpoint],
            evidence,
            AttemptTimes { began: self.start + began, ended: now },
            random,
        );
        breaker.report(permit, outcome.health(), now, random);
        let reached = match outcome.kind {
            OutcomeKind::Connect(_) | OutcomeKind::RefusedStream => false,
            OutcomeKind::Reset(reset) => reset.request_sent,
            _ => outcome.advice != RetryAdvice::Elsewhere,
        };
        let time_left = self.time_left(index);
        let healthy = self.healthy();
        let request = &mut self.requests[index];
        request.is_touched |= reached;
        if scripted.is_success() {
            request.is_committed = true;
            return Event::Succeeded;
        }
        request.has_lost_body |= scripted.loses_body;
        let failed = request.plan.failed_endpoints();
        let untried = |other: &usize| *other != endpoint && !failed.contains(other);
        Event::Failed(AttemptFailure {
            endpoint,
            outcome,
            hint: scripted.hint,
            body: if request.has_lost_body { Replayability::NotKept } else { Replayability::Buffered },
            time_left,
            random,
            is_absent: self.health[endpoint].is_absent(),
            has_alternative: (0..healthy).filter(untried).any(|other| self.health[other].is_available(now)),
            has_sibling: self.setup.are_siblings && (0..self.setup.endpoints).any(|other| untried(&other)),
        })
    }

    pub(super) fn finish(&mut self, index: usize, finish: Finish) {
        let (now, granted) = (self.at(), self.now);
        let request = &mut self.requests[index];
        if finish == Finish::Result(Stop::Observed) {
            // It would have been sent, and is charged as if it were.
            self.charged.push(granted);
        }
        // Whatever comes after that, nothing is done any more.
        let events = [
            Event::Ready { time_left: None },
            Event::Admitted,
            Event::Picked { has_body: true },
            Event::Succeeded,
            Event::HedgeDue { time_left: None },
            Event::CopyAdmitted { endpoint: 0 },
        ];
        for event in events {
            let action = request.plan.next(event, now);
            assert!(matches!(action, Action::Finish(_)), "{action:?} after the end");
        }
        (request.permit, request.first, request.copy) = (None, None, None);
        request.is_over = true;
    }

    /// What holds when all requests are over.
    pub(super) fn check_end(&mut self) {
        assert!(self.requests.iter().all(|request| request.is_over), "a request was forgotten");
        let budget = self.setup.retry.clone().unwrap_or_default().budget;
        let window = budget.window.0;
        self.charged.sort_unstable();
        for from in &self.charged {
            let within = |at: &&Duration| **at >= *from && **at <= *from + window;
            let (charged, requests) =
                (self.charged.iter().filter(within).count(), self.arrived.iter().filter(within).count());
            let bound = budget.bound(requests as u64);
            assert!(charged as f64 <= bound + 1e-6, "{charged} retries, {bound} allowed");
        }
        // Whatever was granted and not sent has gone back.
        if *budget.ratio == 0.0 {
            let open = self.charged.iter().filter(|at| self.now - **at <= window).count();
            let places = (f64::from(budget.min_per_second) * window.as_secs_f64()) as usize;
            assert_eq!(self.limits.budget.available(self.at()), places - open, "grants are lost");
        }
        // A trial's permit holds the breaker.
        assert_eq!(Arc::strong_count(&self.breaker), 1, "permits are lost");
    }

    pub(super) fn send(&mut self, index: usize, next: NextAttempt) {
        self.check_send(index, next.kind);
        let request = &mut self.requests[index];
        request.is_hedged = false;
        let method = &METHODS[usize::from(request.arrival.method)];
        let call = hedge::HedgeCandidate {
            method,
            idempotency_key: request.arrival.idempotency_key,
            body_ready: true,
            // That is the machine's to count.
            attempts: 0,
            max_retries: 1,
            breaker_closed: self.breaker.is_closed(),
        };
        let after = |ms| HedgeSettings { after: HedgeAfter::Fixed(HumanDuration::from_millis(ms)) };
        let hedge = self.setup.hedge_ms.and_then(|ms| after(ms).delay(&call, |_| None));
        self.fly(index, RequestCopy::First);
        if let Some(delay) = hedge {
            let sent = self.sent;
            self.schedule(self.now + delay, index, Due::Hedge(sent));
        }
    }

    pub(super) fn hedge(&mut self, index: usize, number: u32) {
        if self.requests[index].first.as_ref().is_none_or(|first| first.number != number) {
            return;
        }
        let time_left = self.time_left(index);
        self.step(index, Event::HedgeDue { time_left });
    }

    /// Schedules the end of a copy, which the deadline may bring.
    pub(super) fn fly(&mut self, index: usize, copy: RequestCopy) {
        let (now, sent) = (self.now, self.sent);
        let request = &mut self.requests[index];
        let flight = if copy == RequestCopy::First { &mut request.first } else { &mut request.copy };
        let flight = flight.as_mut().expect("a copy to be sent");
        flight.number = sent;
        let mut end = now + Duration::from_millis(flight.scripted.took_ms);
        if let Some(deadline) = request.deadline.filter(|deadline| *deadline < end) {
            end = deadline;
            flight.scripted =
                Scripted { ending: OutcomeKind::Timeout, advice: RetryAdvice::None, ..flight.scripted };
        }
        self.schedule(end, index, Due::End(copy, sent));
    }

    pub(super) fn send_copy(&mut self, index: usize) {
        // A copy of what may be under way.
        let request = &mut self.requests[index];
        (request.is_hedged, request.was_hedged) = (true, true);
        self.check_send(index, AttemptKind::Hedge);
        self.fly(index, RequestCopy::Hedge);
    }

    pub(super) fn pick_copy(&mut self, index: usize) -> Option<Event> {
        let (healthy, now) = (self.healthy(), self.at());
        let request = &self.requests[index];
        let avoided = request.first.as_ref().map(|flight| flight.endpoint);
        let failed = request.plan.failed_endpoints();
        let endpoint = (0..healthy).find(|other| !failed.contains(other) && Some(*other) != avoided)?;
        if !self.breaker.is_closed() {
            return None;
        }
        let permit = self.breaker.admit(now).permit.ok()?;
        let scripted = self.next_scripted();
        self.requests[index].copy = Some(Flight { endpoint, began: self.now, permit, scripted, number: 0 });
        Some(Event::CopyAdmitted { endpoint })
    }
}
