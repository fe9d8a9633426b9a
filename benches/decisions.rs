//! The cost of each decision of a request, in nanoseconds: `cargo bench`, or `cargo bench -- routing`.
//!
//! Each bench is the work for a successful request; for retry, breaker, budget and ejection also for a failed one. Time
//! and random numbers are arguments, as in the proxy; nothing waits.

use std::{
    hash::RandomState,
    hint::black_box,
    net::SocketAddr,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Version};
use outrigger::{
    config::{
        Balance, ForwardedHeaders, HeaderEdits, Policy, Route, RouteMatch, Source, Sources, load_sources,
    },
    field_set::FieldSet,
    model::{CompiledEdits, Router, Via},
    proxy::{
        headers::{self, ForwardedClient},
        request_check,
    },
    resilience::{
        backoff::RetryHint,
        breaker::{Breaker, BreakerSettings},
        budget::{BudgetSettings, RetryBudget},
        classify::{AttemptOutcome, Health, RetryAdvice},
        limit::{LimitSettings, NotifyWaiter, RequestLimit},
        outlier::{AttemptTimes, EndpointOutcome, OutlierDetector, OutlierSettings},
        rate::{RateKey, RateLimit, RateSettings},
        retry::{FailedAttempt, Replayability, RetryContext, RetryDecision, RetryPolicy, RetrySettings},
    },
    rng::Rng,
    units::Ratio,
    upstream::balance::{Balancer, Candidate, PeakEwma, hash_key},
};

const SIZES: [usize; 3] = [1, 100, 10_000];

fn retry(c: &mut Criterion) {
    let policy = RetryPolicy::new(Some(RetrySettings::default()));
    // A budget that is never exhausted, so that every round decides the same.
    let settings =
        BudgetSettings { ratio: Ratio::constant(1.0), min_per_second: 1000, ..BudgetSettings::default() };
    let (budget, begin) = (RetryBudget::new(settings), Instant::now());
    let tried = FailedAttempt {
        is_repeatable: policy.is_repeatable(&Method::GET, false),
        is_grpc: false,
        attempts: 1,
        free_retry_used: false,
        resends: 0,
        body: Replayability::Unread,
        is_committed: false,
    };
    let mut group = c.benchmark_group("retry");
    for (name, status) in [("a good answer", StatusCode::OK), ("a 503", StatusCode::SERVICE_UNAVAILABLE)] {
        let mut now = begin;
        group.bench_function(name, |b| {
            b.iter(|| {
                let outcome = AttemptOutcome::http(black_box(status), RetryAdvice::None, None);
                now += Duration::from_millis(10);
                budget.deposit();
                let time_left = Some(Duration::from_secs(10));
                let moment =
                    RetryContext { now, time_left, hint: RetryHint::None, random: 0.5, budget: &budget };
                let decision = policy.decide(&tried, &outcome, &moment);
                assert_eq!(
                    matches!(decision, RetryDecision::Retry(_)),
                    status != StatusCode::OK,
                    "{decision:?}"
                );
            });
        });
    }
    group.bench_function("a request in the budget", |b| b.iter(|| budget.deposit()));
}

fn policy_state(c: &mut Criterion) {
    let now = Instant::now();
    let mut group = c.benchmark_group("policy_state");
    for (name, health) in [("success", Health::Success), ("failure", Health::Failure)] {
        // It stays closed, whatever is reported to it.
        let settings =
            BreakerSettings { consecutive_failures: 0, min_requests: u32::MAX, ..BreakerSettings::default() };
        let breaker = Breaker::new(settings, now);
        group.bench_function(format!("breaker, a {name}"), |b| {
            b.iter(|| {
                let Ok(permit) = breaker.admit(now).permit else { panic!("the breaker is open") };
                breaker.report(permit, health, now, 0.5)
            });
        });
        let outliers = OutlierDetector::new(
            OutlierSettings { consecutive_failures: 0, ..OutlierSettings::default() },
            now,
        );
        let address = SocketAddr::from(([10, 0, 0, 1], 80));
        outliers.update(&[address], now);
        let Some(endpoint) = outliers.endpoint(&address) else { panic!("it was just put there") };
        group.bench_function(format!("ejection, a {name}"), |b| {
            let evidence =
                if health == Health::Success { EndpointOutcome::Success } else { EndpointOutcome::Failure };
            let times = AttemptTimes { began: now, ended: now };
            b.iter(|| outliers.report(&address, &endpoint, evidence, times, 0.5));
        });
    }
    let limit = RequestLimit::<Silent>::new(LimitSettings::default());
    group.bench_function("limit, a place taken and given back", |b| {
        b.iter(|| {
            assert!(limit.try_acquire());
            limit.release(|| now);
        });
    });
    for per in [RateKey::Upstream, RateKey::Peer] {
        let name = format!("rate limit, {per:?}");
        let settings = RateSettings { rate: 1_000_000, burst: 1_000_000, per };
        let (rate, mut later) = (RateLimit::new(&settings, now, RandomState::new()), now);
        group.bench_function(name, |b| {
            b.iter(|| {
                later += Duration::from_micros(1);
                rate.admit(black_box(b"10.0.0.1"), later)
            });
        });
    }
}

/// Notifies no waiter.
struct Silent;

impl NotifyWaiter for Silent {
    fn notify(self) {}
}

struct Endpoint {
    latency: PeakEwma,
    key: u64,
}

impl Candidate for Endpoint {
    fn usable(&self, _: Instant) -> bool {
        true
    }
    fn avoided(&self, _: Instant) -> bool {
        false
    }
    fn suspected(&self, _: Instant) -> bool {
        false
    }
    fn latency(&self, now: Instant) -> f64 {
        self.latency.cost(now)
    }
    fn in_flight(&self) -> u32 {
        1
    }
    fn weight(&self) -> u32 {
        1
    }
    fn key(&self) -> u64 {
        self.key
    }
}

fn balance(c: &mut Criterion) {
    let mut group = c.benchmark_group("balance");
    let begin = Instant::now();
    for balance in
        [Balance::P2c, Balance::LeastRequest, Balance::RoundRobin, Balance::HashHeader("x-user".to_owned())]
    {
        for size in [3usize, 1000] {
            let endpoint = |number: usize| Endpoint {
                latency: PeakEwma::new(begin),
                key: hash_key(&number.to_le_bytes()),
            };
            let endpoints: Vec<Endpoint> = (0..size).map(endpoint).collect();
            let (mut balancer, mut rng) = (Balancer::new(&balance), Rng::from_seed(7));
            balancer.rebuild(&endpoints, &mut rng);
            let (now, hash) = (begin + Duration::from_secs(1), Some(hash_key(b"somebody")));
            group.bench_function(BenchmarkId::new(format!("{balance:?}"), size), |b| {
                b.iter(|| balancer.pick(&endpoints, now, &mut rng, &[], hash));
            });
        }
    }
}

/// The router of a configuration with `size` upstreams, the first of which has `size` routes.
fn router(size: usize) -> Router {
    let upstream = |number| format!("[[upstream]]\nname = 'svc-{number}'\nendpoints = ['127.0.0.1:80']\n");
    let route =
        |number| format!("[[upstream.route]]\nmatch = {{ path = '/v1/r{number}/*' }}\ntimeout = '9s'\n");
    let text =
        std::iter::once(upstream(0)).chain((0..size).map(route)).chain((1..size).map(upstream)).collect();
    let sources = Sources(vec![Source { path: "bench.toml".into(), text }]);
    match load_sources(sources, &|_| None) {
        Ok(loaded) => Router::new(&loaded.config),
        Err(problems) => panic!("{problems}"),
    }
}

fn routing(c: &mut Criterion) {
    let mut group = c.benchmark_group("routing");
    for size in SIZES {
        let router = router(size);
        let (host, path) = (format!("svc-{}", size - 1), format!("/v1/r{}/orders?page=2", size - 1));
        let path = path.split('?').next().unwrap_or_default();
        assert_eq!(router.upstream(&host, None), Some(size - 1));
        group.bench_function(BenchmarkId::new("host", size), |b| {
            b.iter(|| router.upstream(black_box(&host), Some(80)));
        });
        let Some(routes) = router.routes(0) else { panic!("the first upstream has routes") };
        let fields = request_headers();
        assert_eq!(routes.find(&Method::GET, path, &fields), Some(size - 1));
        group.bench_function(BenchmarkId::new("path", size), |b| {
            b.iter(|| routes.find(&Method::GET, black_box(path), &fields));
        });
    }
}

/// The header fields of a typical client.
fn request_headers() -> HeaderMap {
    [
        ("host", "svc-0"),
        ("user-agent", "grpc-node-js/1.9.5"),
        ("accept", "application/json"),
        ("accept-encoding", "gzip, br"),
        ("content-type", "application/json"),
        ("content-length", "120"),
        ("authorization", "Bearer 0123456789abcdef"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("connection", "keep-alive"),
    ]
    .into_iter()
    .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
    .collect()
}

fn rewriting(c: &mut Criterion) {
    let mut group = c.benchmark_group("headers");
    let (via, address) = (Via::new("outrigger-1a2b".to_owned()), HeaderValue::from_static("10.0.0.1"));
    let mut request = Request::new(());
    *request.headers_mut() = request_headers();
    group.bench_function("which fields there are", |b| b.iter(|| FieldSet::of(black_box(request.headers()))));
    let present = FieldSet::of(request.headers());
    group.bench_function("guard", |b| b.iter(|| request_check::check(black_box(&request), present).is_ok()));
    let setup = request_headers;
    let small = criterion::BatchSize::SmallInput;
    group.bench_function("rewrite", |b| {
        b.iter_batched(
            setup,
            |mut map| {
                let said = headers::remove_hop_by_hop(&mut map, present).is_ok();
                headers::remove_proxy_credentials(&mut map, present);
                headers::remove_spoofed(&mut map, present);
                let host = Some(HeaderValue::from_static("svc-0"));
                headers::set_forwarded(
                    &mut map,
                    ForwardedHeaders::Replace,
                    ForwardedClient { address: &address, proto: "http", host },
                );
                via.append(&mut map, Version::HTTP_11);
                (map, said)
            },
            small,
        );
    });
    let edit = HeaderEdits {
        set: [("x-team".to_owned(), outrigger::redact::Secret::redact_url("shop"))].into_iter().collect(),
        remove: vec!["user-agent".to_owned()],
    };
    let edits = CompiledEdits::new(&Route {
        request_headers: edit,
        ..Route::new(RouteMatch::default(), Policy::default())
    });
    group.bench_function("edits of a route", |b| {
        b.iter_batched(
            setup,
            |mut map| {
                edits.request.apply(&mut map);
                map
            },
            small,
        );
    });
}

criterion_group!(benches, retry, policy_state, balance, routing, rewriting);
criterion_main!(benches);
