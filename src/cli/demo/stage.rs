//! The set-up of the demo: two services with their sidecars, and the controls of their faults.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::SocketAddr,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use http::Method;
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use super::{
    DemoError,
    http::{Reply, send},
    services::{self, Faults, Service},
    sidecar::{Sidecar, TemporaryDirectory},
    story::Story,
};
use crate::{
    identity::issue::{Ca, IssueError, write_key},
    redact,
};

/// The response time of `payments` while it is slow.
pub const SLOW: Duration = Duration::from_millis(1500);
/// `timeout` of shop's requests at the start.
const TIMEOUT: &str = "1s";

/// Timeout for connecting to the collector.
const COLLECTOR_TIMEOUT: Duration = Duration::from_secs(1);

/// The trust domain of the services' certificates.
const TRUST_DOMAIN: &str = "demo.example";

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// One instance of `payments`.
pub struct Instance {
    pub faults: Arc<Faults>,
    pub sidecar: Sidecar,
    service: Option<Service>,
    at: SocketAddr,
}

/// All processes of the demo, and its output.
pub struct Stage {
    pub story: Story,
    pub instances: [Instance; 2],
    pub shop_sidecar: Sidecar,
    shop: Service,
    folder: TemporaryDirectory,
}

impl Instance {
    async fn start(
        folder: &TemporaryDirectory,
        name: &'static str,
        otlp: Option<&str>,
    ) -> Result<Self, DemoError> {
        let faults = Arc::new(Faults::default());
        let service = services::payments(ANY, Arc::clone(&faults)).await?;
        let at = service.address;
        let config = common(folder, "payments", at, "strict");
        let sidecar = Sidecar::start(folder.path(), name, &config, otlp).await?;
        Ok(Self { faults, sidecar, service: Some(service), at })
    }
}

/// Checks that the collector accepts connections.
async fn check_collector(otlp: &str) -> Result<(), String> {
    let url: http::Uri = otlp.parse().map_err(|_| "it is not a URL".to_owned())?;
    let host = url.host().ok_or("it names no host")?.trim_start_matches('[').trim_end_matches(']');
    let port = url.port_u16().unwrap_or(if url.scheme_str() == Some("https") { 443 } else { 80 });
    match timeout(COLLECTOR_TIMEOUT, TcpStream::connect((host, port))).await {
        Ok(connected) => connected.map(drop).map_err(|error| error.to_string()),
        Err(_) => Err(format!("no connection within {COLLECTOR_TIMEOUT:?}")),
    }
}

/// Writes a CA and a certificate for each service, as `outrigger certs` does.
fn write_certificates(folder: &TemporaryDirectory) -> Result<(), DemoError> {
    let ca = Ca::new(
        TRUST_DOMAIN.parse().map_err(|reason| IssueError::Name { name: TRUST_DOMAIN.to_owned(), reason })?,
    )?;
    std::fs::write(folder.path().join("ca.crt"), ca.certificate())?;
    for name in ["shop", "payments"] {
        let issued = ca.issue(name)?;
        std::fs::write(folder.path().join(format!("{name}.crt")), issued.certificate)?;
        write_key(&folder.path().join(format!("{name}.key")), &issued.key)?;
    }
    Ok(())
}

fn common(folder: &TemporaryDirectory, name: &str, service: SocketAddr, mtls: &str) -> String {
    let path = |file: String| folder.path().join(file).display().to_string();
    let (cert, key, ca) =
        (path(format!("{name}.crt")), path(format!("{name}.key")), path("ca.crt".to_owned()));
    format!(
        r#"
[service]
name = "{name}"
[runtime]
drain_timeout = "10s"
[inbound]
listen = "127.0.0.1:0"
forward_to = "{service}"
mtls = "{mtls}"
[identity]
cert = "{cert}"
key = "{key}"
ca = "{ca}"
[outbound]
listen = "127.0.0.1:0"
[admin]
listen = "localhost:0"
"#
    )
}

/// Times are shorter than the defaults, to keep the demo short. Round-robin, because requests come one at a time: a
/// balancer by latency could send all of them to the healthy instance, and there would be nothing to see.
fn shop_config(
    folder: &TemporaryDirectory,
    service: SocketAddr,
    payments: [SocketAddr; 2],
    timeout: &str,
) -> String {
    let [one, two] = payments;
    // Visitors have no certificate.
    let mut config = common(folder, "shop", service, "permissive");
    let identity = format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/payments");
    let store = folder.path().join("store").display().to_string();
    // Writing to a string cannot fail.
    let _ = write!(
        config,
        r#"
[[upstream]]
name = "payments"
endpoints = ["{one}", "{two}"]
identity = ["{identity}"]
balance = "round-robin"
timeout = "{timeout}"
retry = {{ budget = {{ min_per_second = 5, window = "2s" }} }}
breaker = {{ failure_rate = 0.0, open_for = {{ base = "1s", max = "2s" }} }}
outlier = {{ eject_for = {{ base = "1s", max = "2s" }} }}
[[upstream.route]]
match = {{ methods = ["POST"], path = "/orders*" }}
queue = {{ name = "orders", when = "always" }}
[store]
path = "{store}"
reserve = "64KiB"
[[queue]]
name = "orders"
backoff = {{ base = "200ms", max = "1s" }}
[[upstream]]
name = "reports"
endpoints = ["{one}", "{two}"]
identity = ["{identity}"]
breaker = false
outlier = false
"#
    );
    config
}

impl Stage {
    pub async fn start(otlp: Option<&str>) -> Result<Self, DemoError> {
        let folder = TemporaryDirectory::new()?;
        write_certificates(&folder)?;
        let one = Instance::start(&folder, "payments-1", otlp).await?;
        let two = Instance::start(&folder, "payments-2", otlp).await?;
        let shop_socket = TcpListener::bind(ANY).await?;
        let payments = [one.sidecar.inbound, two.sidecar.inbound];
        let config = shop_config(&folder, shop_socket.local_addr()?, payments, TIMEOUT);
        let shop_sidecar = Sidecar::start(folder.path(), "shop", &config, otlp).await?;
        let shop = services::shop(shop_sidecar.outbound, shop_socket).await?;

        println!("visitor ─▶ [sidecar] ─▶ shop ─▶ [sidecar] ═╦▶ [sidecar] ─▶ payments 1");
        println!("                                           ╚▶ [sidecar] ─▶ payments 2    ═ mutual TLS");
        println!("the admin page of shop's sidecar:       http://{}/", shop_sidecar.admin);
        println!("the admin pages of payments' sidecars:  http://{}/", one.sidecar.admin);
        println!("                                        http://{}/", two.sidecar.admin);
        if let Some(otlp) = otlp {
            let shown = redact::url(otlp);
            match check_collector(otlp).await {
                Ok(()) => {
                    println!("traces of all requests are sent to:     {shown}");
                    println!(
                        "in Jaeger, if that is the collector:    http://localhost:16686/search?service=shop"
                    );
                }
                Err(reason) => {
                    println!("no traces: {shown} cannot be reached ({reason}); start a collector there");
                }
            }
        }
        Ok(Self { story: Story::new(), instances: [one, two], shop_sidecar, shop, folder })
    }

    /// Sends a visitor's request, through all sidecars and services.
    pub fn visit(
        &self,
        method: Method,
        path: &'static str,
    ) -> impl Future<Output = Result<Reply, DemoError>> + Send + use<> {
        send(self.shop_sidecar.inbound, method, path, "shop")
    }

    pub async fn visits(
        &self,
        count: usize,
        method: &Method,
        path: &'static str,
    ) -> Result<Vec<Reply>, DemoError> {
        let mut replies = Vec::with_capacity(count);
        for _ in 0..count {
            replies.push(self.visit(method.clone(), path).await?);
        }
        Ok(replies)
    }

    /// The status of an upstream of shop's sidecar.
    pub async fn status(&self, upstream: &str) -> Result<serde_json::Value, DemoError> {
        let status = self.whole_status().await?;
        let upstreams = status["upstreams"].as_array();
        let found = upstreams.and_then(|all| all.iter().find(|one| one["name"] == upstream));
        Ok(found.cloned().unwrap_or_default())
    }

    /// The deliveries of shop's queue in this state.
    pub async fn deliveries(&self, state: &str) -> Result<u64, DemoError> {
        Ok(self.whole_status().await?["queues"][0]["messages"][state].as_u64().unwrap_or(0))
    }

    /// Why shop's queue is paused; none while it delivers.
    pub async fn paused(&self) -> Result<Option<String>, DemoError> {
        Ok(self.whole_status().await?["queues"][0]["paused"].as_str().map(ToOwned::to_owned))
    }

    /// How often each order arrived, by its `Idempotency-Key`, at all instances together.
    pub fn orders(&self) -> BTreeMap<String, u32> {
        let mut orders = BTreeMap::new();
        for one in &self.instances {
            for (key, count) in one.faults.orders.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                *orders.entry(key.clone()).or_default() += count;
            }
        }
        orders
    }

    async fn whole_status(&self) -> Result<serde_json::Value, DemoError> {
        let reply = send(self.shop_sidecar.admin, Method::GET, "/status", "localhost").await?;
        Ok(serde_json::from_slice(&reply.body).unwrap_or_default())
    }

    /// A summary of the exported traces; none where none are exported.
    pub async fn traces(&self) -> Result<Option<String>, DemoError> {
        let status = self.whole_status().await?;
        let traces = &status["traces"];
        if traces.is_null() {
            return Ok(None);
        }
        let count = |word: &str| traces["spans"][word].as_u64().unwrap_or(0);
        let (exported, lost) = (count("exported"), count("failed") + count("queue_full"));
        Ok(Some(match traces["last_error"].as_str() {
            Some(error) => {
                format!("traces: {exported} spans of shop's sidecar were exported, {lost} lost: {error}")
            }
            None => format!("traces: {exported} spans of shop's sidecar were exported so far, {lost} lost"),
        }))
    }

    /// A counter in the status of an upstream.
    pub async fn count(&self, upstream: &str, of: &str, word: &str) -> Result<u64, DemoError> {
        Ok(self.status(upstream).await?[of][word].as_u64().unwrap_or(0))
    }

    /// The number of responses of all instances so far.
    pub fn responses(&self) -> u32 {
        self.instances.iter().map(|one| one.faults.responses.load(Ordering::Relaxed)).sum()
    }

    pub fn set_faults(&self, set: impl Fn(&Faults)) {
        self.instances.iter().for_each(|one| set(&one.faults));
    }

    pub fn set_slow(&self, slow: Duration) {
        let slow = u64::try_from(slow.as_millis()).unwrap_or(u64::MAX);
        self.set_faults(|faults| faults.slow_ms.store(slow, Ordering::Relaxed));
    }

    pub fn set_failing(&self, fails: bool) {
        self.set_faults(|faults| faults.fails.store(fails, Ordering::Relaxed));
    }

    pub fn stop_instance(&mut self, index: usize) {
        self.instances[index].service = None;
    }

    /// Restarts stopped instances on their old ports.
    pub async fn start_instances(&mut self) -> Result<(), DemoError> {
        for one in self.instances.iter_mut().filter(|one| one.service.is_none()) {
            one.service = Some(services::payments(one.at, Arc::clone(&one.faults)).await?);
        }
        Ok(())
    }

    /// Changes `timeout` in shop's configuration; returns whether the change was applied.
    pub async fn set_timeout(&self, timeout: &str) -> Result<bool, DemoError> {
        let payments = self.instances.each_ref().map(|one| one.sidecar.inbound);
        self.shop_sidecar.reconfigure(&shop_config(&self.folder, self.shop.address, payments, timeout))?;
        for _ in 0..500 {
            if self.whole_status().await?["config"]["reloads"].as_u64().is_some_and(|count| count > 0) {
                return Ok(true);
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(false)
    }
}

pub fn successes(replies: &[Reply]) -> usize {
    replies.iter().filter(|reply| reply.status == 200).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The demo does not claim to export traces to a collector that does not run.
    #[tokio::test]
    async fn an_unreachable_collector_is_reported() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        assert_eq!(check_collector(&url).await, Ok(()));
        drop(listener);
        assert!(check_collector(&url).await.unwrap_err().contains("refused"));
        assert!(check_collector("not a url").await.is_err());
    }
}
