//! The scenes, in order.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::Method;
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};

use super::{
    DemoError,
    http::{Reply, call},
    services::{self, Service, Trouble},
    sidecar::{Folder, Sidecar},
    story::{Story, cause},
};

/// How slow `payments` is when it is slow.
const SLOW: Duration = Duration::from_millis(900);
/// Between calls of the traffic that follows the tour.
const PACE: Duration = Duration::from_millis(500);

/// The whole stage.
struct Stage {
    story: Story,
    trouble: Arc<Trouble>,
    payments: Option<Service>,
    payments_at: SocketAddr,
    payments_sidecar: Sidecar,
    shop_sidecar: Sidecar,
    _shop: Service,
    _folder: Folder,
}

/// Plays; true where all that it shows happened. Without `once` traffic goes on until it is dropped.
pub async fn tour(once: bool) -> Result<bool, DemoError> {
    let mut stage = Stage::set().await?;
    stage.all_is_well().await?;
    stage.kept_alive_connections_are_reset().await?;
    stage.slow().await?;
    stage.reload().await?;
    stage.refused().await?;
    if once {
        stage.leave().await?;
        return Ok(stage.story.summary());
    }
    stage.story.summary();
    stage.traffic().await
}

fn shop_config(service: SocketAddr, payments: SocketAddr, timeout: &str) -> String {
    format!(
        r#"
[service]
name = "shop"
[runtime]
drain_timeout = "2s"
[inbound]
listen = "127.0.0.1:0"
forward_to = "{service}"
[outbound]
listen = "127.0.0.1:0"
[admin]
listen = "localhost:0"
[[upstream]]
name = "payments"
endpoints = ["{payments}"]
timeout = "{timeout}"
"#
    )
}

fn payments_config(service: SocketAddr) -> String {
    format!(
        r#"
[service]
name = "payments"
[runtime]
drain_timeout = "2s"
[inbound]
listen = "127.0.0.1:0"
forward_to = "{service}"
[outbound]
listen = "127.0.0.1:0"
[admin]
listen = "localhost:0"
"#
    )
}

impl Stage {
    async fn set() -> Result<Self, DemoError> {
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let folder = Folder::new()?;
        let trouble = Arc::new(Trouble::default());
        let payments = services::payments(any, Arc::clone(&trouble)).await?;
        let payments_at = payments.address;
        let payments_sidecar =
            Sidecar::start(folder.path(), "payments", &payments_config(payments_at)).await?;
        let shop_socket = TcpListener::bind(any).await?;
        let config = shop_config(shop_socket.local_addr()?, payments_sidecar.inbound, "500ms");
        let shop_sidecar = Sidecar::start(folder.path(), "shop", &config).await?;
        let shop = services::shop(shop_sidecar.outbound, shop_socket).await?;

        println!("visitor ─▶ [sidecar] ─▶ shop ─▶ [sidecar] ─▶ [sidecar] ─▶ payments");
        println!("the admin page of shop's sidecar:     http://{}/", shop_sidecar.admin);
        println!("the admin page of payments' sidecar:  http://{}/", payments_sidecar.admin);
        Ok(Self {
            story: Story::new(),
            trouble,
            payments: Some(payments),
            payments_at,
            payments_sidecar,
            shop_sidecar,
            _shop: shop,
            _folder: folder,
        })
    }

    /// A visitor's call, through everything.
    async fn visit(&self, method: Method, path: &str) -> Result<Reply, DemoError> {
        call(self.shop_sidecar.inbound, method, path, "shop").await
    }

    async fn visits(&self, count: usize, method: &Method, path: &str) -> Result<Vec<Reply>, DemoError> {
        let mut replies = Vec::with_capacity(count);
        for _ in 0..count {
            replies.push(self.visit(method.clone(), path).await?);
        }
        Ok(replies)
    }

    async fn all_is_well(&mut self) -> Result<(), DemoError> {
        self.story.scene("All is well");
        let began = Instant::now();
        let replies = self.visits(20, &Method::POST, "/checkout").await?;
        let good = well(&replies);
        let each = began.elapsed() / 20;
        self.story.check(good == 20, format!("{good} of 20 calls were answered 200, {each:.0?} each"));
        let reached = self.trouble.answers.load(Ordering::Relaxed);
        self.story.check(reached == 20, format!("payments was called {reached} times, once for each"));
        Ok(())
    }

    async fn kept_alive_connections_are_reset(&mut self) -> Result<(), DemoError> {
        self.story.scene("payments resets its kept-alive connections, after every 3rd answer");
        self.trouble.reset_every.store(3, Ordering::Relaxed);
        let before = self.trouble.resets.load(Ordering::Relaxed);
        let replies = self.visits(60, &Method::GET, "/price").await?;
        self.trouble.reset_every.store(0, Ordering::Relaxed);
        let resets = self.trouble.resets.load(Ordering::Relaxed) - before;
        let good = well(&replies);
        if let Some(failed) = replies.iter().find(|reply| !reply.status.is_success()) {
            self.story.show(failed);
        }
        self.story.check(resets >= 10, format!("{resets} connections were reset under the proxy's hands"));
        self.story.check(good == 60, format!("{good} of 60 callers saw nothing of it"));
        Ok(())
    }

    async fn slow(&mut self) -> Result<(), DemoError> {
        self.story.scene(&format!("payments takes {SLOW:?}; shop.toml says timeout = \"500ms\""));
        self.set_slow(SLOW);
        let began = Instant::now();
        let replies = self.visits(3, &Method::POST, "/checkout").await?;
        let each = began.elapsed() / 3;
        if let Some(first) = replies.first() {
            self.story.tell("what the caller is told:");
            self.story.show(first);
        }
        let told = replies.iter().filter(|reply| {
            reply.status == 504 && cause(reply).is_some_and(|cause| cause.ends_with("timeout"))
        });
        let told = told.count();
        self.story.check(told == 3, format!("{told} of 3 callers were told so, after {each:.0?}"));
        Ok(())
    }

    async fn reload(&mut self) -> Result<(), DemoError> {
        self.story.scene("shop.toml is edited while all runs: timeout = \"3s\"");
        let service = self._shop.address;
        self.shop_sidecar.reconfigure(&shop_config(service, self.payments_sidecar.inbound, "3s"))?;
        let taken = self.reloaded().await?;
        self.story.check(taken, "the sidecar took the change without a restart");
        let good = well(&self.visits(2, &Method::POST, "/checkout").await?);
        self.story.check(good == 2, format!("{good} of 2 callers waited {SLOW:?} and got their answer"));
        self.set_slow(Duration::ZERO);
        Ok(())
    }

    async fn reloaded(&self) -> Result<bool, DemoError> {
        for _ in 0..100 {
            let reply = call(self.shop_sidecar.admin, Method::GET, "/status", "localhost").await?;
            let status: serde_json::Value = serde_json::from_slice(&reply.body).unwrap_or_default();
            if status["config"]["reloads"].as_u64().is_some_and(|count| count > 0) {
                return Ok(true);
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(false)
    }

    async fn refused(&mut self) -> Result<(), DemoError> {
        self.story.scene("payments is gone, then comes back");
        self.payments = None;
        let replies = self.visits(3, &Method::POST, "/checkout").await?;
        if let Some(first) = replies.first() {
            self.story.tell("what the caller is told, by the sidecar next to the failure:");
            self.story.show(first);
        }
        let told = replies.iter().filter(|reply| reply.status == 502 && cause(reply).is_some()).count();
        self.story.check(told == 3, format!("{told} of 3 callers were told at once"));
        self.payments = Some(services::payments(self.payments_at, Arc::clone(&self.trouble)).await?);
        let good = well(&self.visits(5, &Method::POST, "/checkout").await?);
        self.story.check(good == 5, format!("{good} of 5 callers got their answer as soon as it was back"));
        Ok(())
    }

    async fn leave(&mut self) -> Result<(), DemoError> {
        self.story.scene("payments' sidecar gets SIGTERM while a call is under way");
        self.set_slow(SLOW);
        let answered = self.trouble.answers.load(Ordering::Relaxed);
        let visit = call(self.shop_sidecar.inbound, Method::POST, "/checkout", "shop");
        let sidecar = &mut self.payments_sidecar;
        let (reply, ended) = tokio::join!(visit, async {
            // Half of the time that payments takes: the call is certainly there.
            sleep(SLOW / 2).await;
            sidecar.terminate();
            sidecar.ended().await
        });
        let (reply, ended) = (reply?, ended?);
        let answered = self.trouble.answers.load(Ordering::Relaxed) - answered;
        self.story.check(reply.status == 200 && answered == 1, "the call was finished first");
        self.story.check(ended.success(), format!("then the sidecar ended ({ended})"));
        if !ended.success() {
            self.story.tell(self.payments_sidecar.log());
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

    fn set_slow(&self, slow: Duration) {
        self.trouble.slow_ms.store(u64::try_from(slow.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

fn well(replies: &[Reply]) -> usize {
    replies.iter().filter(|reply| reply.status == 200).count()
}
