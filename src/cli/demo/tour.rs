//! The scenes, in order.

use std::{sync::atomic::Ordering, time::Duration};

use http::Method;
use tokio::time::{Instant, sleep};

use super::{
    DemoError,
    http::call,
    stage::{SLOW, Stage, well},
    story::cause,
};

/// Between calls of the traffic that follows the tour.
const PACE: Duration = Duration::from_millis(500);
/// For what must happen by itself, on a slow machine too.
const PATIENCE: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(50);

/// Plays; true where all that it shows happened. Without `once` traffic goes on until it is dropped.
pub async fn tour(once: bool, otlp: Option<&str>) -> Result<bool, DemoError> {
    let mut stage = Stage::set(otlp).await?;
    stage.all_is_well().await?;
    stage.kept_alive_connections_are_reset().await?;
    stage.one_instance_fails().await?;
    stage.all_fail_without_a_breaker().await?;
    stage.all_fail_behind_a_breaker().await?;
    stage.slow().await?;
    stage.reload().await?;
    stage.gone().await?;
    if let Some(traces) = stage.traces().await? {
        println!();
        stage.story.tell(traces);
    }
    if once {
        stage.leave().await?;
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
        let good = well(&replies);
        let each = began.elapsed() / 20;
        self.story.check(good == 20, format!("{good} of 20 calls were answered 200, {each:.0?} each"));
        let reached = self.reached();
        self.story.check(reached == 20, format!("payments was called {reached} times, once for each"));
        let plain = call(self.instances[0].sidecar.inbound, Method::GET, "/price", "payments").await?;
        let refused = plain.status == 403 && cause(&plain).as_deref() == Some("not_allowed");
        self.story.check(refused, "all by mutual TLS: without a certificate payments is not reached");
        Ok(())
    }

    async fn kept_alive_connections_are_reset(&mut self) -> Result<(), DemoError> {
        self.story.scene("payments resets its kept-alive connections, after every 3rd answer");
        self.trouble(|trouble| trouble.reset_every.store(3, Ordering::Relaxed));
        let replies = self.visits(60, &Method::GET, "/price").await?;
        self.trouble(|trouble| trouble.reset_every.store(0, Ordering::Relaxed));
        let resets: u32 = self.instances.iter().map(|one| one.trouble.resets.load(Ordering::Relaxed)).sum();
        let good = well(&replies);
        if let Some(failed) = replies.iter().find(|reply| !reply.status.is_success()) {
            self.story.show(failed);
        }
        self.story.check(resets >= 10, format!("{resets} connections were reset under the proxy's hands"));
        self.story.check(good == 60, format!("{good} of 60 callers saw nothing of it"));
        Ok(())
    }

    async fn one_instance_fails(&mut self) -> Result<(), DemoError> {
        self.story.scene("One of payments' two instances answers 503 to everything");
        self.budget_is_back().await?;
        let before = self.count("payments", "retries", "sent").await?;
        self.instances[1].trouble.fails.store(true, Ordering::Relaxed);
        let (mut replies, mut ejected) = (Vec::new(), None);
        while ejected.is_none() && replies.len() < 200 {
            replies.extend(self.visits(1, &Method::GET, "/price").await?);
            let endpoints = self.status("payments").await?["endpoints"].clone();
            let out = endpoints.as_array().and_then(|all| all.iter().find(|e| e["state"] == "ejected"));
            ejected = out.and_then(|endpoint| endpoint["address"].as_str()).map(ToOwned::to_owned);
        }
        let (good, calls) = (well(&replies), replies.len());
        let retried = self.count("payments", "retries", "sent").await? - before;
        self.story.check(good == calls, format!("{good} of {calls} callers saw nothing of it"));
        self.story.check(
            retried > 0,
            format!("{retried} tries that failed were sent again, to the other instance"),
        );
        match &ejected {
            Some(address) => self.story.show_status(format!("{address} ejected")),
            None => self.story.tell("no endpoint was taken out"),
        }
        let bad = self.instances[1].sidecar.inbound.to_string();
        self.story.check(ejected == Some(bad), "after 5 failures in a row it was taken out for a while");
        self.instances[1].trouble.fails.store(false, Ordering::Relaxed);
        let back = self.endpoints_are_back().await?;
        self.story.check(back, "it is well again, and back");
        Ok(())
    }

    async fn all_fail_without_a_breaker(&mut self) -> Result<(), DemoError> {
        self.story.scene(
            "Both answer 503; the calls go by an upstream that has no breaker: its retry budget alone",
        );
        self.set_failing(true);
        let (began, before) = (Instant::now(), self.reached());
        let replies = self.visits(40, &Method::GET, "/report").await?;
        let (took, tries) = (began.elapsed(), self.reached() - before);
        self.set_failing(false);
        let told = replies.iter().filter(|reply| reply.status == 503).count();
        self.story.check(told == 40, format!("{told} of 40 callers were told what payments says: 503"));
        // A fifth of the calls, and ten more in any 10 s; without a budget, two retries for each call.
        let bound = 40 + 8 + 10 * (1 + took.as_secs() / 10);
        let held = u64::from(tries) > 40 && u64::from(tries) <= bound;
        self.story.check(
            held,
            format!("payments was sent {tries} tries, not the 120 that 2 retries each would be"),
        );
        let spent = self.count("reports", "retries", "budget").await?;
        let left = self.status("reports").await?["budget"]["available"].clone();
        self.story.show_status(format!("retries left {left}, {spent} not sent for want of budget"));
        self.story.check(spent > 0, "so retries do not make an outage worse");
        Ok(())
    }

    async fn all_fail_behind_a_breaker(&mut self) -> Result<(), DemoError> {
        self.story.scene("Both answer 503, with a circuit breaker before them");
        self.set_failing(true);
        let before = self.reached();
        let (mut refused, mut seen) = (0, None);
        for _ in 0..100 {
            let reply = self.visit(Method::GET, "/price").await?;
            if cause(&reply).as_deref() == Some("breaker_open") {
                refused += 1;
                if seen.is_none() {
                    self.story.tell("what the caller is told then:");
                    self.story.show(&reply);
                    seen = Some(self.status("payments").await?["breaker"].clone());
                }
            }
        }
        let tries = self.reached() - before;
        let breaker = seen.unwrap_or_default();
        self.story.show_status(format!("breaker {} ({})", breaker["state"], breaker["why"]));
        let open = breaker["state"] == "open" || breaker["state"] == "half_open";
        self.story.check(open, "the breaker opened");
        self.story.check(refused >= 50, format!("{refused} of 100 callers were refused at once"));
        self.story.check(tries < 50, format!("payments was left alone but for {tries} tries"));
        self.set_failing(false);
        let began = Instant::now();
        let mut closed = false;
        while !closed && began.elapsed() < PATIENCE {
            self.visit(Method::GET, "/price").await?;
            closed = self.status("payments").await?["breaker"]["state"] == "closed";
            sleep(POLL).await;
        }
        let took = began.elapsed();
        self.story.check(
            closed,
            format!("payments is well; {took:.1?} later, three trials having succeeded, it closed"),
        );
        let good = well(&self.visits(5, &Method::GET, "/price").await?);
        self.story.check(good == 5, format!("{good} of 5 callers got their answer"));
        Ok(())
    }

    async fn slow(&mut self) -> Result<(), DemoError> {
        self.story.scene(&format!("payments takes {SLOW:?}; shop.toml says timeout = \"1s\""));
        self.set_slow(SLOW);
        let began = Instant::now();
        let replies = self.visits(3, &Method::POST, "/checkout").await?;
        let each = began.elapsed() / 3;
        if let Some(first) = replies.first() {
            self.story.tell("what the caller is told:");
            self.story.show(first);
        }
        let told = replies.iter().filter(|reply| reply.status == 504 && cause(reply).is_some()).count();
        self.story.check(told == 3, format!("{told} of 3 callers were told so, after {each:.0?}"));
        Ok(())
    }

    async fn reload(&mut self) -> Result<(), DemoError> {
        self.story.scene("shop.toml is edited while all runs: timeout = \"20s\"");
        let taken = self.set_timeout("20s").await?;
        self.story.check(taken, "the sidecar took the change without a restart");
        let good = well(&self.visits(2, &Method::POST, "/checkout").await?);
        self.story.check(good == 2, format!("{good} of 2 callers waited {SLOW:?} and got their answer"));
        self.set_slow(Duration::ZERO);
        Ok(())
    }

    async fn gone(&mut self) -> Result<(), DemoError> {
        self.story.scene("One instance of payments is gone, then the other too");
        self.budget_is_back().await?;
        self.stop_instance(0);
        let good = well(&self.visits(10, &Method::POST, "/checkout").await?);
        let told =
            format!("{good} of 10 callers saw nothing: what never arrived may go elsewhere, a POST too");
        self.story.check(good == 10, told);
        self.stop_instance(1);
        let replies = self.visits(2, &Method::POST, "/checkout").await?;
        if let Some(first) = replies.first() {
            self.story.tell("with both gone, what the caller is told, by the sidecar next to the failure:");
            self.story.show(first);
        }
        let told = replies.iter().filter(|reply| reply.status.is_server_error() && cause(reply).is_some());
        let told = told.count();
        self.story.check(told == 2, format!("{told} of 2 callers were told at once"));
        self.start_instances().await?;
        self.budget_is_back().await?;
        let good = well(&self.visits(5, &Method::POST, "/checkout").await?);
        self.story
            .check(good == 5, format!("{good} of 5 callers got their answer as soon as they were back"));
        Ok(())
    }

    async fn leave(&mut self) -> Result<(), DemoError> {
        self.story.scene("The sidecar of an instance gets SIGTERM while a call is under way");
        self.set_slow(SLOW);
        let answered = self.reached();
        let arrived =
            |stage: &Self| stage.instances.each_ref().map(|one| one.trouble.arrived.load(Ordering::Relaxed));
        let before = arrived(self);
        let visit = tokio::spawn(self.visit(Method::POST, "/checkout"));
        let mut there = None;
        eventually(async || {
            let now = arrived(self);
            there = (0..now.len()).find(|index| now[*index] > before[*index]);
            Ok(there.is_some())
        })
        .await?;
        let sidecar = &mut self.instances[there.unwrap_or(0)].sidecar;
        sidecar.terminate();
        let ended = sidecar.ended().await?;
        let log = sidecar.log();
        let reply = visit.await.map_err(std::io::Error::other)??;
        let answered = self.reached() - answered;
        self.story.check(reply.status == 200 && answered == 1, "the call was finished first");
        self.story.check(ended.success(), format!("then the sidecar ended ({ended})"));
        if !ended.success() {
            self.story.tell(log);
        }
        Ok(())
    }

    /// Goes on for ever, for the admin page to show something.
    async fn traffic(&mut self) -> Result<bool, DemoError> {
        println!("light traffic goes on until Ctrl-C; look at http://{}/", self.shop_sidecar.admin);
        loop {
            let reply = self.visit(Method::GET, "/price").await?;
            if !reply.status.is_success() {
                self.story.show(&reply);
            }
            sleep(PACE).await;
        }
    }

    /// Lets the budget recover from the scene before: each is to show its own.
    async fn budget_is_back(&self) -> Result<bool, DemoError> {
        eventually(async || Ok(self.status("payments").await?["budget"]["available"].as_u64() >= Some(10)))
            .await
    }

    async fn endpoints_are_back(&self) -> Result<bool, DemoError> {
        eventually(async || {
            let status = self.status("payments").await?;
            Ok(status["endpoints"].as_array().is_some_and(|all| all.iter().all(|e| e["state"] == "healthy")))
        })
        .await
    }
}

/// Waits until it holds; false where it does not within [`PATIENCE`].
async fn eventually(mut holds: impl AsyncFnMut() -> Result<bool, DemoError>) -> Result<bool, DemoError> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if holds().await? {
            return Ok(true);
        }
        sleep(POLL).await;
    }
    Ok(false)
}
