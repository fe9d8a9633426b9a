//! Load balancing: a pure choice among candidates. Time and randomness are arguments, an index is the result.
//!
//! | algorithm | choice | cost of a pick |
//! | --- | --- | --- |
//! | `p2c` | of two drawn by weight: the lower latency × (requests in flight + 1) | O(1), with weights O(log n) |
//! | `least-request` | fewest requests in flight per weight; ties at random by weight | O(n) |
//! | `round-robin` | in turn; with weights the smooth order of nginx (`a a b a c a a`) | O(1), with weights O(n) |
//! | `hash` | rendezvous hashing: the endpoint whose hash with the key is highest | O(n), some 2 µs for 1,000 |
//!
//! Rendezvous hashing instead of a ring: a removed endpoint moves exactly its own keys, a new one takes exactly its
//! share, weights are exact, the second choice is available for a retry, and there is no table to rebuild or keep (a
//! ring that balances as well has some 160 points per endpoint and worker). The price is one multiplication chain per
//! endpoint, over an array that stays in the L1 cache.
//!
//! With `p2c` and `least-request`, an endpoint with recent failures in a row is chosen only if no other one is
//! usable, except for an occasional request that finds out whether it still fails.
//!
//! An unusable endpoint is never chosen, even if nothing else is left: the request fails with `no_endpoint`. An
//! endpoint that the request has already tried is chosen again only if no other one is usable.

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
    /// Whether requests have failed here in a row or a connection broke: by load or latency it is chosen only if no other
    /// one is usable.
    fn avoided(&self, now: Instant) -> bool;
    /// Whether requests have failed here in a row without a success since, or a connection broke lately: a retry goes to
    /// it only if no other one is usable.
    fn suspected(&self, now: Instant) -> bool;
    /// The expected latency, e.g. [`PeakEwma::cost`]; any unit, the same for all candidates.
    fn latency(&self, now: Instant) -> f64;
    /// Requests that it has not responded to yet.
    fn in_flight(&self) -> u32;
    /// Its share relative to the others, from 1.
    fn weight(&self) -> u32;
    /// Equal for the same endpoint in every process, e.g. [`hash_key`] of its address.
    fn key(&self) -> u64;
}

/// Chooses among the endpoints of one upstream, for one worker.
#[derive(Debug)]
pub struct Balancer {
    algorithm: Algorithm,
    /// The candidates' weights and their running sums, by index; empty if all weights are equal.
    weights: Vec<u32>,
    sums: Vec<u64>,
    /// The candidates' keys, by index (hash only).
    keys: Vec<u64>,
    /// The next index (round-robin without weights).
    cursor: usize,
    /// The credit of each candidate (round-robin with weights).
    credit: Vec<i64>,
    len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    P2c,
    LeastRequest,
    RoundRobin,
    Hash,
}

/// Random draws before the balancer scans all candidates: enough unless most are unusable.
const DRAWS: usize = 8;

impl Balancer {
    pub fn new(balance: &Balance) -> Self {
        let algorithm = match balance {
            Balance::P2c => Algorithm::P2c,
            Balance::LeastRequest => Algorithm::LeastRequest,
            Balance::RoundRobin => Algorithm::RoundRobin,
            Balance::HashHeader(_) | Balance::HashCookie(_) => Algorithm::Hash,
        };
        Self {
            algorithm,
            weights: Vec::new(),
            sums: Vec::new(),
            keys: Vec::new(),
            cursor: 0,
            credit: Vec::new(),
            len: 0,
        }
    }

    /// Must be called for every new set of candidates, before the first pick from it. The only function that
    /// allocates.
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
        match self.algorithm {
            Algorithm::Hash => self.keys.extend(candidates.iter().map(Candidate::key)),
            Algorithm::RoundRobin => {
                // A random start: otherwise the first endpoint would get the first request of every sidecar in a
                // fleet.
                self.cursor = rng.below(self.len);
                if !self.sums.is_empty() {
                    self.credit.extend(candidates.iter().map(|c| rng.below(weight(c) as usize) as i64));
                }
            }
            Algorithm::P2c | Algorithm::LeastRequest => {}
        }
    }

    /// The index of the endpoint to use, or `None` if none is usable. `tried` holds indexes to avoid as long as
    /// others are usable; `hash` is [`hash_key`] of the request's key: without one, `hash` balancing works as `p2c`.
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
        let untried = |i: usize| candidates[i].usable(now) && !tried.contains(&i);
        // An endpoint that fails at once always has the least latency and load. Round-robin and hash give each its
        // share anyway.
        if matches!(self.algorithm, Algorithm::P2c | Algorithm::LeastRequest) {
            // A request that has failed once must not test whether another endpoint still fails.
            let unsuspected = |i: usize| untried(i) && !candidates[i].suspected(now);
            if !tried.is_empty()
                && let Some(picked) = self.pick_where(candidates, now, rng, hash, unsuspected)
            {
                return Some(picked);
            }
            let preferred = |i: usize| untried(i) && !candidates[i].avoided(now);
            let picked = self.pick_where(candidates, now, rng, hash, preferred);
            if picked.is_some() {
                return picked;
            }
        }
        let picked = self.pick_where(candidates, now, rng, hash, untried);
        if picked.is_some() || tried.is_empty() {
            return picked;
        }
        self.pick_where(candidates, now, rng, hash, |i| candidates[i].usable(now))
    }

    /// The index of the endpoint for a hash, whatever its state; `None` unless balancing by hash.
    pub fn hash_target(&self, hash: Option<u64>) -> Option<usize> {
        hash.filter(|_| self.algorithm == Algorithm::Hash).and_then(|hash| self.rendezvous(hash, |_| true))
    }

    fn pick_where<C: Candidate>(
        &mut self,
        candidates: &[C],
        now: Instant,
        rng: &mut Rng,
        hash: Option<u64>,
        allowed: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        match (self.algorithm, hash) {
            (Algorithm::LeastRequest, _) => self.least_request(candidates, rng, allowed),
            (Algorithm::RoundRobin, _) => self.round_robin(allowed),
            (Algorithm::Hash, Some(hash)) => self.rendezvous(hash, allowed),
            (Algorithm::P2c | Algorithm::Hash, _) => self.better_of_two(candidates, now, rng, allowed),
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
        // With weights the same one may be drawn twice: two distinct draws of two candidates would always be both,
        // regardless of weights.
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
            let (requests, weight) = (u64::from(candidates[index].in_flight()), self.weight(index));
            // requests / weight compared with that of the best, without a division: both factors have 32 bits.
            let order = best.map_or(Ordering::Less, |(c, w)| (requests * w).cmp(&(c * weight)));
            if order.is_lt() {
                best = Some((requests, weight));
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
        // nginx's smooth weighted round-robin: each earns its weight, the one with most credit is chosen and pays
        // what all have earned.
        let (mut total, mut best) = (0, None::<usize>);
        for index in (0..self.len).filter(|i| allowed(*i)) {
            let weight = self.weight(index) as i64;
            total += weight;
            self.credit[index] += weight;
            if best.is_none_or(|best| self.credit[index] > self.credit[best]) {
                best = Some(index);
            }
        }
        self.credit[best?] -= total;
        best
    }

    fn rendezvous(&self, hash: u64, allowed: impl Fn(usize) -> bool) -> Option<usize> {
        // `allowed` is evaluated only for those that would win, which are few (ln n).
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
        // -ln(u) / weight is exponentially distributed: the smallest is at i with probability weight(i) / total.
        let mut low = f64::INFINITY;
        for (index, score) in scores {
            let unit = ((score >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
            let weight = self.weight(index) as f64;
            // -ln(u) is at least 1 - u: enough to skip most candidates without a logarithm.
            if 1.0 - unit < low * weight {
                let wait = -unit.ln() / weight;
                if wait < low && allowed(index) {
                    (low, best) = (wait, Some(index));
                }
            }
        }
        best
    }

    /// Relative: 1 if all are equal.
    fn weight(&self, index: usize) -> u64 {
        self.weights.get(index).map_or(1, |weight| u64::from(*weight))
    }
}

/// One of a stream of offers, at random by weight, without storing them.
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

/// The 64-bit hash of a key, equal in every process and version: the sidecars of one service must agree.
///
/// FNV-1a with mixed bits: good at spreading keys, no defence against a client that aims at one endpoint (which could
/// as well send the same key again).
pub fn hash_key(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    mix(fnv)
}

/// The latency of an endpoint, as a moving average that rises at once and falls slowly.
///
/// A latency above the average replaces it; a lower one pulls it down by how much time has passed: after `DECAY` a
/// third of the old value is left. Without requests it decays likewise, so that an endpoint that was slow is used
/// again.
#[derive(Clone, Copy, Debug)]
pub struct PeakEwma {
    seconds: f64,
    at: Instant,
}

impl PeakEwma {
    /// The time constant of the decay.
    pub const DECAY: Duration = Duration::from_secs(10);
    /// The expected latency of an endpoint never used: high enough that it is not flooded before its first responses,
    /// and decaying, so that it is used soon.
    pub const UNKNOWN: Duration = Duration::from_millis(30);

    pub fn new(now: Instant) -> Self {
        Self { seconds: Self::UNKNOWN.as_secs_f64(), at: now }
    }

    /// Records a request that took `latency`.
    pub fn observe(&mut self, latency: Duration, now: Instant) {
        let latency = latency.as_secs_f64();
        let kept = self.kept(now);
        self.seconds =
            if latency >= self.seconds { latency } else { self.seconds * kept + latency * (1.0 - kept) };
        self.at = self.at.max(now);
    }

    /// Seconds, never quite zero (so that requests in flight still count).
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
