//! The scenes of the demo, in order.

use std::{sync::atomic::Ordering, time::Duration};

use http::Method;
use tokio::time::{Instant, sleep};

use super::{
    DemoError,
    http::send,
    stage::{SLOW, Stage, successes},
    story::cause,
};

/// Interval between requests of the traffic after the tour.
const PACE: Duration = Duration::from_millis(500);
/// Limit for conditions that are waited for; enough for a slow machine.
const TIMEOUT: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(50);

/// Runs all scenes; true where all checks passed. Without `once`, sends light traffic until it is dropped.
pub async fn tour(once: bool, otlp: Option<&str>) -> Result<bool, DemoError> {
    let mut stage = Stage::start(otlp).await?;
    stage.all_is_well().await?;
    stage.kept_alive_connections_are_reset().await?;
    stage.one_instance_fails().await?;
    stage.all_fail_without_a_breaker().await?;
    stage.all_fail_behind_a_breaker().await?;
    stage.slow().await?;
    stage.reload().await?;
    stage.stopped().await?;
    stage.orders_wait().await?;
    if let Some(traces) = stage.traces().await? {
        println!();
        stage.story.print(traces);
    }
    if once {
        stage.drain().await?;
        return Ok(stage.story.summary());
    }
    stage.story.summary();
    stage.traffic().await
}

impl Stage {
    async fn all_is_well(&mut self) -> Result<(), DemoError> {
        self.story.scene("All is well");
        let began = Instant::now();
        let replies = self.visits(20, &Method::POST, "/checkout").await?;
        let good = successes(&replies);
        let each = began.elapsed() / 20;
        self.story.check(good == 20, format!("{good} of 20 requests got 200, {each:.0?} each"));
        let reached = self.responses();
        self.story.check(reached == 20, format!("payments got {reached} requests, one for each"));
        let plain = send(self.instances[0].sidecar.inbound, Method::GET, "/price", "payments").await?;
        let refused = plain.status == 403 && cause(&plain).as_deref() == Some("not_allowed");
        self.story
            .check(refused, "all over mutual TLS: without a certificate a request does not reach payments");
        Ok(())
    }

    async fn kept_alive_connections_are_reset(&mut self) -> Result<(), DemoError> {
        self.story.scene("payments resets its keep-alive connections after every 3rd response");
        self.set_faults(|faults| faults.reset_every.store(3, Ordering::Relaxed));
        let replies = self.visits(60, &Method::GET, "/price").await?;
        self.set_faults(|faults| faults.reset_every.store(0, Ordering::Relaxed));
        let resets: u32 = self.instances.iter().map(|one| one.faults.resets.load(Ordering::Relaxed)).sum();
        let good = successes(&replies);
        if let Some(failed) = replies.iter().find(|reply| !reply.status.is_success()) {
            self.story.show(failed);
        }
        self.story.check(resets >= 10, format!("{resets} connections were reset"));
        self.story.check(good == 60, format!("{good} of 60 clients were not affected"));
        Ok(())
    }

    async fn one_instance_fails(&mut self) -> Result<(), DemoError> {
        self.story.scene("One of the two instances of payments responds 503 to everything");
        self.wait_for_budget().await?;
        let before = self.count("payments", "retries", "sent").await?;
        self.instances[1].faults.fails.store(true, Ordering::Relaxed);
        let (mut replies, mut ejected) = (Vec::new(), None);
        while ejected.is_none() && replies.len() < 200 {
            replies.extend(self.visits(1, &Method::GET, "/price").await?);
            let endpoints = self.status("payments").await?["endpoints"].clone();
            let out = endpoints.as_array().and_then(|all| all.iter().find(|e| e["state"] == "ejected"));
            ejected = out.and_then(|endpoint| endpoint["address"].as_str()).map(ToOwned::to_owned);
        }
        let (good, requests) = (successes(&replies), replies.len());
        let retried = self.count("payments", "retries", "sent").await? - before;
        self.story.check(good == requests, format!("{good} of {requests} clients were not affected"));
        self.story
            .check(retried > 0, format!("{retried} failed attempts were retried on the other instance"));
        match &ejected {
            Some(address) => self.story.show_status(format!("{address} ejected")),
            None => self.story.print("no endpoint was ejected"),
        }
        let bad = self.instances[1].sidecar.inbound.to_string();
        self.story.check(ejected == Some(bad), "it was ejected for a while, after 5 failures in a row");
        self.instances[1].faults.fails.store(false, Ordering::Relaxed);
        let restored = self.wait_for_endpoints().await?;
        self.story.check(restored, "it recovered and was restored");
        Ok(())
    }

    async fn all_fail_without_a_breaker(&mut self) -> Result<(), DemoError> {
        self.story.scene(
            "Both respond 503, behind an upstream without a breaker: only the retry budget limits retries",
        );
        self.set_failing(true);
        let (began, before) = (Instant::now(), self.responses());
        let replies = self.visits(40, &Method::GET, "/report").await?;
        let (took, attempts) = (began.elapsed(), self.responses() - before);
        self.set_failing(false);
        let failed = replies.iter().filter(|reply| reply.status == 503).count();
        self.story.check(failed == 40, format!("{failed} of 40 clients got the 503 of payments"));
        // The budget: a fifth of the requests, and ten more in any 10 s. Without it: two retries for each request.
        let bound = 40 + 8 + 10 * (1 + took.as_secs() / 10);
        let bounded = u64::from(attempts) > 40 && u64::from(attempts) <= bound;
        self.story.check(
            bounded,
            format!("payments got {attempts} attempts, not the 120 of 2 retries for each request"),
        );
        let spent = self.count("reports", "retries", "budget").await?;
        let left = self.status("reports").await?["budget"]["available"].clone();
        self.story.show_status(format!("retries left {left}, {spent} not sent because the budget was spent"));
        self.story.check(spent > 0, "so retries do not make an outage worse");
        Ok(())
    }

    async fn all_fail_behind_a_breaker(&mut self) -> Result<(), DemoError> {
        self.story.scene("Both respond 503, behind a circuit breaker");
        self.set_failing(true);
        let before = self.responses();
        let (mut refused, mut seen) = (0, None);
        for _ in 0..100 {
            let reply = self.visit(Method::GET, "/price").await?;
            if cause(&reply).as_deref() == Some("breaker_open") {
                refused += 1;
                if seen.is_none() {
                    self.story.print("the response that the client then gets:");
                    self.story.show(&reply);
                    seen = Some(self.status("payments").await?["breaker"].clone());
                }
            }
        }
        let attempts = self.responses() - before;
        let breaker = seen.unwrap_or_default();
        self.story.show_status(format!("breaker {} ({})", breaker["state"], breaker["why"]));
        let open = breaker["state"] == "open" || breaker["state"] == "half_open";
        self.story.check(open, "the breaker opened");
        self.story.check(refused >= 50, format!("{refused} of 100 requests were refused at once"));
        self.story.check(attempts < 50, format!("payments got only {attempts} attempts"));
        self.set_failing(false);
        let began = Instant::now();
        let mut closed = false;
        while !closed && began.elapsed() < TIMEOUT {
            self.visit(Method::GET, "/price").await?;
            closed = self.status("payments").await?["breaker"]["state"] == "closed";
            sleep(POLL).await;
        }
        let took = began.elapsed();
        self.story.check(
            closed,
            format!(
                "payments recovered; {took:.1?} later, after three successful trials, the breaker closed"
            ),
        );
        let good = successes(&self.visits(5, &Method::GET, "/price").await?);
        self.story.check(good == 5, format!("{good} of 5 clients got 200"));
        Ok(())
    }

    async fn slow(&mut self) -> Result<(), DemoError> {
        self.story.scene(&format!("payments takes {SLOW:?}; shop.toml says timeout = \"1s\""));
        self.set_slow(SLOW);
        let began = Instant::now();
        let replies = self.visits(3, &Method::POST, "/checkout").await?;
        let each = began.elapsed() / 3;
        if let Some(first) = replies.first() {
            self.story.print("the response that the client gets:");
            self.story.show(first);
        }
        let timed_out = replies.iter().filter(|reply| reply.status == 504 && cause(reply).is_some()).count();
        self.story.check(timed_out == 3, format!("{timed_out} of 3 clients got it, after {each:.0?}"));
        Ok(())
    }

    async fn reload(&mut self) -> Result<(), DemoError> {
        self.story.scene("shop.toml is edited while everything runs: timeout = \"20s\"");
        let applied = self.set_timeout("20s").await?;
        self.story.check(applied, "the sidecar applied the change without a restart");
        let good = successes(&self.visits(2, &Method::POST, "/checkout").await?);
        self.story.check(good == 2, format!("{good} of 2 clients waited {SLOW:?} and got 200"));
        self.set_slow(Duration::ZERO);
        Ok(())
    }

    async fn stopped(&mut self) -> Result<(), DemoError> {
        self.story.scene("One instance of payments is stopped, then the other too");
        self.wait_for_budget().await?;
        self.stop_instance(0);
        let good = successes(&self.visits(10, &Method::POST, "/checkout").await?);
        let text = format!(
            "{good} of 10 clients were not affected: a request that was never sent is retried, POST too"
        );
        self.story.check(good == 10, text);
        self.stop_instance(1);
        let replies = self.visits(2, &Method::POST, "/checkout").await?;
        if let Some(first) = replies.first() {
            self.story.print("with both stopped, the response of the sidecar next to the failure:");
            self.story.show(first);
        }
        let failed = replies.iter().filter(|reply| reply.status.is_server_error() && cause(reply).is_some());
        let failed = failed.count();
        self.story.check(failed == 2, format!("{failed} of 2 clients got it at once"));
        self.start_instances().await?;
        self.wait_for_budget().await?;
        let good = successes(&self.visits(5, &Method::POST, "/checkout").await?);
        self.story.check(good == 5, format!("{good} of 5 clients got 200 as soon as both were restarted"));
        Ok(())
    }

    async fn orders_wait(&mut self) -> Result<(), DemoError> {
        self.story.scene("payments is gone, and orders have a queue: they are accepted, and delivered later");
        self.stop_instance(0);
        self.stop_instance(1);
        let mut replies = self.visits(100, &Method::POST, "/order").await?;
        replies.extend(self.visits(1, &Method::POST, "/order/broken").await?);
        let accepted = replies.iter().filter(|reply| reply.status == 202).count();
        if let Some(last) = replies.last() {
            self.story.print("the response that the client gets, as soon as its order is on the disk:");
            self.story.show(last);
        }
        self.story
            .check(accepted == 101, format!("{accepted} of 101 orders got 202, one of them a broken one"));
        let paused = eventually(async || Ok(self.paused().await?.is_some())).await?;
        let why = self.paused().await?.unwrap_or_default();
        self.story.check(paused, format!("the queue waits, and no attempt is spent ({why})"));
        self.start_instances().await?;
        let delivered = eventually(async || Ok(self.deliveries("done").await? == 100)).await?;
        let orders = self.orders();
        let once = orders.len() == 100 && orders.values().all(|count| *count == 1);
        self.story.check(
            delivered && once,
            format!(
                "payments is back: {} orders arrived, each with a key of its own, each once",
                orders.len()
            ),
        );
        let dead = eventually(async || Ok(self.deliveries("dead").await? == 1)).await?;
        self.story.check(dead, "the broken one is a dead letter: `outrigger queue ls --dead` lists it");
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), DemoError> {
        self.story.scene("The sidecar of an instance gets SIGTERM while a request is in flight");
        self.set_slow(SLOW);
        let before_responses = self.responses();
        let arrived =
            |stage: &Self| stage.instances.each_ref().map(|one| one.faults.arrived.load(Ordering::Relaxed));
        let before = arrived(self);
        let visit = tokio::spawn(self.visit(Method::POST, "/checkout"));
        let mut serving = None;
        eventually(async || {
            let now = arrived(self);
            serving = (0..now.len()).find(|index| now[*index] > before[*index]);
            Ok(serving.is_some())
        })
        .await?;
        let sidecar = &mut self.instances[serving.unwrap_or(0)].sidecar;
        sidecar.terminate();
        let ended = sidecar.ended().await?;
        let log = sidecar.log();
        let reply = visit.await.map_err(std::io::Error::other)??;
        let responses = self.responses() - before_responses;
        self.story.check(reply.status == 200 && responses == 1, "the request was finished first");
        self.story.check(ended.success(), format!("then the sidecar ended ({ended})"));
        if !ended.success() {
            self.story.print(log);
        }
        Ok(())
    }

    /// Sends requests forever, so that the admin page shows something.
    async fn traffic(&mut self) -> Result<bool, DemoError> {
        println!(
            "light traffic continues until Ctrl-C; the admin page is http://{}/",
            self.shop_sidecar.admin
        );
        loop {
            let reply = self.visit(Method::GET, "/price").await?;
            if !reply.status.is_success() {
                self.story.show(&reply);
            }
            sleep(PACE).await;
        }
    }

    /// Waits until the retry budget has recovered, so that scenes do not affect each other.
    async fn wait_for_budget(&self) -> Result<bool, DemoError> {
        eventually(async || Ok(self.status("payments").await?["budget"]["available"].as_u64() >= Some(10)))
            .await
    }

    async fn wait_for_endpoints(&self) -> Result<bool, DemoError> {
        eventually(async || {
            let status = self.status("payments").await?;
            Ok(status["endpoints"].as_array().is_some_and(|all| all.iter().all(|e| e["state"] == "healthy")))
        })
        .await
    }
}

/// Polls until the condition holds; false where it does not within [`TIMEOUT`].
async fn eventually(mut condition: impl AsyncFnMut() -> Result<bool, DemoError>) -> Result<bool, DemoError> {
    let began = Instant::now();
    while began.elapsed() < TIMEOUT {
        if condition().await? {
            return Ok(true);
        }
        sleep(POLL).await;
    }
    Ok(false)
}
