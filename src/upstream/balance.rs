//! Which endpoint a try goes to: a pure choice among candidates. Time and randomness come in, an index comes out.
//!
//! | kind | choice | cost of a pick |
//! | --- | --- | --- |
//! | `p2c` | two drawn at random by weight; the one with the lower latency × (calls in flight + 1) | O(1), by weight O(log n) |
//! | `least-request` | fewest calls in flight per weight; ties at random by weight | O(n) |
//! | `round-robin` | in turn; with weights the smooth order of nginx (`a a b a c a a`) | O(1), with weights O(n) |
//! | `hash` | rendezvous hashing: the endpoint whose hash with the key is highest | O(n), some 2 µs for 1,000 |
//!
//! Rendezvous hashing and not a ring: an endpoint that goes moves exactly its own keys, one that comes takes exactly
//! its share, weights are exact, the next best is there for a retry, and there is no table to rebuild or keep (a ring
//! that balances as well has some 160 points per endpoint and worker). The price is one multiplication chain per
//! endpoint, over an array that stays in the first-level cache.
//!
//! By `p2c` and `least-request`, an endpoint where requests have just failed in a row is picked only where no other can
//! be used, but for one request now and then that tells whether it still fails.
//!
//! What can't be used is never picked, even when nothing else is left: the caller answers `no_endpoint`. An endpoint
//! that was tried already is picked again only where no other can be used.

use std::{
    cmp::Ordering,
    time::{Duration, Instant},
};

use crate::{
    config::Balance,
    rng::{Rng, mix},
};

/// What the balancer needs to know about an endpoint.
pub trait Candidate {
    /// Healthy, and neither ejected nor absent.
    fn usable(&self, now: Instant) -> bool;
    /// Requests have just failed here: by load or latency it is chosen only where no other can be used.
    fn avoided(&self, now: Instant) -> bool;
    /// It was avoided, and nothing has succeeded there since: a retry goes to it only where no other can be used.
    fn suspected(&self) -> bool;
    /// The latency to expect, e.g. of [`PeakEwma::cost`]; any unit, the same for all.
    fn latency(&self, now: Instant) -> f64;
    /// Calls that it has not answered yet.
    fn in_flight(&self) -> u32;
    /// Its share relative to the others, from 1.
    fn weight(&self) -> u32;
    /// The same for the same endpoint in every process, e.g. [`hash_key`] of its address.
    fn key(&self) -> u64;
}

/// Chooses among the endpoints of one upstream, for one worker.
#[derive(Debug)]
pub struct Balancer {
    kind: Kind,
    /// The candidates' weights and their running sums, by index; empty where all weights are the same.
    weights: Vec<u32>,
    sums: Vec<u64>,
    /// The candidates' keys, by index (hash only).
    keys: Vec<u64>,
    /// Whose turn is next (round-robin without weights).
    cursor: usize,
    /// What each has saved up for its turn (round-robin with weights).
    credit: Vec<i64>,
    len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    P2c,
    LeastRequest,
    RoundRobin,
    Hash,
}

/// Draws before the balancer looks at every candidate: enough unless most can't be used.
const DRAWS: usize = 8;

impl Balancer {
    pub fn new(balance: &Balance) -> Self {
        let kind = match balance {
            Balance::P2c => Kind::P2c,
            Balance::LeastRequest => Kind::LeastRequest,
            Balance::RoundRobin => Kind::RoundRobin,
            Balance::HashHeader(_) | Balance::HashCookie(_) => Kind::Hash,
        };
        Self {
            kind,
            weights: Vec::new(),
            sums: Vec::new(),
            keys: Vec::new(),
            cursor: 0,
            credit: Vec::new(),
            len: 0,
        }
    }

    /// Must be called with every new set of candidates, before the first pick from it. The only place that allocates.
    pub fn rebuild<C: Candidate>(&mut self, candidates: &[C], rng: &mut Rng) {
        self.len = candidates.len();
        self.weights.clear();
        self.sums.clear();
        self.keys.clear();
        self.credit.clear();
        let weight = |c: &C| c.weight().max(1);
        if candidates.windows(2).any(|pair| weight(&pair[0]) != weight(&pair[1])) {
            self.weights.extend(candidates.iter().map(weight));
            self.sums.extend(self.weights.iter().scan(0u64, |sum, weight| {
                *sum += u64::from(*weight);
                Some(*sum)
            }));
        }
        match self.kind {
            Kind::Hash => self.keys.extend(candidates.iter().map(Candidate::key)),
            Kind::RoundRobin => {
                // A random start: else the first endpoint gets the first call of every sidecar in a fleet.
                self.cursor = rng.below(self.len);
                if !self.sums.is_empty() {
                    self.credit.extend(candidates.iter().map(|c| rng.below(weight(c) as usize) as i64));
                }
            }
            Kind::P2c | Kind::LeastRequest => {}
        }
    }

    /// The index of the endpoint to use, or `None` where none can be used. `tried` holds indexes to avoid as long as
    /// others can be used; `hash` is what [`hash_key`] says of the caller's key: without one, `hash` chooses as `p2c`.
    pub fn pick<C: Candidate>(
        &mut self,
        candidates: &[C],
        now: Instant,
        rng: &mut Rng,
        tried: &[usize],
        hash: Option<u64>,
    ) -> Option<usize> {
        if self.len != candidates.len() {
            self.rebuild(candidates, rng);
        }
        let fresh = |i: usize| candidates[i].usable(now) && !tried.contains(&i);
        // One that fails at once always has the least latency and load. In turn or by hash, everyone gets its share.
        if matches!(self.kind, Kind::P2c | Kind::LeastRequest) {
            // A request that has failed once is not to find out whether another one still does.
            let well = |i: usize| fresh(i) && !candidates[i].suspected();
            if !tried.is_empty()
                && let Some(picked) = self.pick_where(candidates, now, rng, hash, well)
            {
                return Some(picked);
            }
            let good = |i: usize| fresh(i) && !candidates[i].avoided(now);
            let picked = self.pick_where(candidates, now, rng, hash, good);
            if picked.is_some() {
                return picked;
            }
        }
        let picked = self.pick_where(candidates, now, rng, hash, fresh);
        if picked.is_some() || tried.is_empty() {
            return picked;
        }
        self.pick_where(candidates, now, rng, hash, |i| candidates[i].usable(now))
    }

    /// The index of the endpoint that a hash names, whatever its state; `None` where endpoints are not chosen by hash.
    pub fn named(&self, hash: Option<u64>) -> Option<usize> {
        hash.filter(|_| self.kind == Kind::Hash).and_then(|hash| self.rendezvous(hash, |_| true))
    }

    fn pick_where<C: Candidate>(
        &mut self,
        candidates: &[C],
        now: Instant,
        rng: &mut Rng,
        hash: Option<u64>,
        allowed: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        match (self.kind, hash) {
            (Kind::LeastRequest, _) => self.least_request(candidates, rng, allowed),
            (Kind::RoundRobin, _) => self.round_robin(allowed),
            (Kind::Hash, Some(hash)) => self.rendezvous(hash, allowed),
            (Kind::P2c | Kind::Hash, _) => self.better_of_two(candidates, now, rng, allowed),
        }
    }

    fn better_of_two<C: Candidate>(
        &self,
        candidates: &[C],
        now: Instant,
        rng: &mut Rng,
        allowed: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let first = self.draw(rng, &allowed)?;
        // With weights the same one may be drawn twice: two distinct ones of two would always be both, whatever they weigh.
        let second = if self.sums.is_empty() {
            self.draw(rng, |i| i != first && allowed(i))
        } else {
            self.draw(rng, &allowed)
        };
        let cost = |i: usize| {
            let candidate = &candidates[i];
            candidate.latency(now) * (f64::from(candidate.in_flight()) + 1.0)
        };
        match second {
            Some(second) if second != first && cost(second) < cost(first) => Some(second),
            _ => Some(first),
        }
    }

    /// One of those allowed, at random by weight.
    fn draw(&self, rng: &mut Rng, allowed: impl Fn(usize) -> bool) -> Option<usize> {
        let total = self.sums.last().copied();
        for _ in 0..DRAWS.min(self.len) {
            let index = match total {
                None => rng.below(self.len),
                Some(total) => {
                    let point = rng.below(total as usize) as u64;
                    self.sums.partition_point(|sum| *sum <= point)
                }
            };
            if allowed(index) {
                return Some(index);
            }
        }
        let mut choice = Reservoir::default();
        for index in (0..self.len).filter(|i| allowed(*i)) {
            choice.offer(index, self.weight(index), rng);
        }
        choice.chosen
    }

    fn least_request<C: Candidate>(
        &self,
        candidates: &[C],
        rng: &mut Rng,
        allowed: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let mut best = None::<(u64, u64)>;
        let mut choice = Reservoir::default();
        for index in (0..self.len).filter(|i| allowed(*i)) {
            let (calls, weight) = (u64::from(candidates[index].in_flight()), self.weight(index));
            // calls / weight against that of the best, without the division: both factors have 32 bits.
            let order = best.map_or(Ordering::Less, |(c, w)| (calls * w).cmp(&(c * weight)));
            if order.is_lt() {
                best = Some((calls, weight));
                choice = Reservoir::default();
            }
            if order.is_le() {
                choice.offer(index, weight, rng);
            }
        }
        choice.chosen
    }

    fn round_robin(&mut self, allowed: impl Fn(usize) -> bool) -> Option<usize> {
        if self.credit.is_empty() {
            let next = (0..self.len).map(|step| (self.cursor + step) % self.len).find(|i| allowed(*i))?;
            self.cursor = (next + 1) % self.len;
            return Some(next);
        }
        // nginx's smooth weighted round-robin: everyone earns their weight, the richest pays what all have earned.
        let (mut total, mut richest) = (0, None::<usize>);
        for index in (0..self.len).filter(|i| allowed(*i)) {
            let weight = self.weight(index) as i64;
            total += weight;
            self.credit[index] += weight;
            if richest.is_none_or(|best| self.credit[index] > self.credit[best]) {
                richest = Some(index);
            }
        }
        self.credit[richest?] -= total;
        richest
    }

    fn rendezvous(&self, hash: u64, allowed: impl Fn(usize) -> bool) -> Option<usize> {
        // `allowed` is asked only of those that would win, which are few (ln n).
        let scores = self.keys.iter().map(|key| mix(hash ^ key)).enumerate();
        let mut best = None;
        if self.sums.is_empty() {
            let mut high = 0;
            for (index, score) in scores {
                if score >= high && allowed(index) {
                    (high, best) = (score, Some(index));
                }
            }
            return best;
        }
        // -ln(u) / weight is exponentially distributed: the smallest of them is at i with probability weight(i) / total.
        let mut low = f64::INFINITY;
        for (index, score) in scores {
            let unit = ((score >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
            let weight = self.weight(index) as f64;
            // -ln(u) is at least 1 - u: enough to pass over most of them without a logarithm.
            if 1.0 - unit < low * weight {
                let wait = -unit.ln() / weight;
                if wait < low && allowed(index) {
                    (low, best) = (wait, Some(index));
                }
            }
        }
        best
    }

    /// Relative: 1 where all are the same.
    fn weight(&self, index: usize) -> u64 {
        self.weights.get(index).map_or(1, |weight| u64::from(*weight))
    }
}

/// One of a stream of offers, at random by weight, without keeping them.
#[derive(Default)]
struct Reservoir {
    chosen: Option<usize>,
    total: u64,
}

impl Reservoir {
    fn offer(&mut self, index: usize, weight: u64, rng: &mut Rng) {
        self.total += weight;
        if (rng.below(self.total as usize) as u64) < weight {
            self.chosen = Some(index);
        }
    }
}

/// The 64-bit hash of a key, the same in every process and version: sidecars of one service must agree.
///
/// FNV-1a with its bits spread: good for spreading keys, no defence against someone who aims at one endpoint (who
/// could as well send the same key again).
pub fn hash_key(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    mix(fnv)
}

/// The latency of an endpoint, as a moving average that believes bad news at once and good news slowly.
///
/// A call slower than the average sets it; a faster one pulls it down by how much time has passed: after `DECAY` a
/// third of the old value is left. Without calls it sinks likewise, so that an endpoint that was slow is tried again.
#[derive(Clone, Copy, Debug)]
pub struct PeakEwma {
    seconds: f64,
    at: Instant,
}

impl PeakEwma {
    /// How long the past is remembered.
    pub const DECAY: Duration = Duration::from_secs(10);
    /// What to expect of an endpoint never called: slow enough that it isn't flooded while its answers are out, and
    /// sinking, so that it is tried soon.
    pub const UNKNOWN: Duration = Duration::from_millis(30);

    pub fn new(now: Instant) -> Self {
        Self { seconds: Self::UNKNOWN.as_secs_f64(), at: now }
    }

    /// A call took `latency`.
    pub fn observe(&mut self, latency: Duration, now: Instant) {
        let latency = latency.as_secs_f64();
        let kept = self.kept(now);
        self.seconds =
            if latency >= self.seconds { latency } else { self.seconds * kept + latency * (1.0 - kept) };
        self.at = self.at.max(now);
    }

    /// Seconds, never quite zero (so that calls in flight still count).
    pub fn cost(&self, now: Instant) -> f64 {
        (self.seconds * self.kept(now)).max(1e-6)
    }

    /// The share of the old value that is left at `now`.
    fn kept(&self, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.at);
        if elapsed.is_zero() { 1.0 } else { (-elapsed.as_secs_f64() / Self::DECAY.as_secs_f64()).exp() }
    }
}

#[cfg(test)]
mod tests;
