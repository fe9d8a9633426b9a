//! The stage: two services with their sidecars, and the hands behind it.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::Method;
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use super::{
    DemoError,
    http::{Reply, call},
    services::{self, Service, Trouble},
    sidecar::{Folder, Sidecar},
    story::Story,
};
use crate::{
    identity::issue::{Ca, IssueError, write_key},
    redact,
};

/// How slow `payments` is when it is slow.
pub const SLOW: Duration = Duration::from_millis(1500);
/// `timeout` of shop's calls at first.
const TIMEOUT: &str = "1s";

/// What a collector gets to accept a connection.
const COLLECTOR_PATIENCE: Duration = Duration::from_secs(1);

/// Whose certificates the services have.
const TRUST_DOMAIN: &str = "demo.example";

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// One instance of `payments`.
pub struct Instance {
    pub trouble: Arc<Trouble>,
    pub sidecar: Sidecar,
    service: Option<Service>,
    at: SocketAddr,
}

/// The whole stage.
pub struct Stage {
    pub story: Story,
    pub instances: [Instance; 2],
    pub shop_sidecar: Sidecar,
    shop: Service,
    folder: Folder,
}

impl Instance {
    async fn start(folder: &Folder, name: &'static str, otlp: Option<&str>) -> Result<Self, DemoError> {
        let trouble = Arc::new(Trouble::default());
        let service = services::payments(ANY, Arc::clone(&trouble)).await?;
        let at = service.address;
        let config = common(folder, "payments", at, "strict");
        let sidecar = Sidecar::start(folder.path(), name, &config, otlp).await?;
        Ok(Self { trouble, sidecar, service: Some(service), at })
    }
}

/// Whether something accepts connections where traces are to go.
async fn collector_accepts(otlp: &str) -> Result<(), String> {
    let url: http::Uri = otlp.parse().map_err(|_| "it is not a URL".to_owned())?;
    let host = url.host().ok_or("it names no host")?.trim_start_matches('[').trim_end_matches(']');
    let port = url.port_u16().unwrap_or(if url.scheme_str() == Some("https") { 443 } else { 80 });
    match timeout(COLLECTOR_PATIENCE, TcpStream::connect((host, port))).await {
        Ok(connected) => connected.map(drop).map_err(|error| error.to_string()),
        Err(_) => Err(format!("no connection within {COLLECTOR_PATIENCE:?}")),
    }
}

/// A CA, and a certificate for each service, as `outrigger certs` makes them.
fn certificates(folder: &Folder) -> Result<(), DemoError> {
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

fn common(folder: &Folder, name: &str, service: SocketAddr, mtls: &str) -> String {
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

/// Times are shorter than the defaults, for nobody wants to wait long for a show. Turn by turn, since callers come one
/// at a time: by latency all of them might go to the instance that is well, and there would be nothing to see.
fn shop_config(folder: &Folder, service: SocketAddr, payments: [SocketAddr; 2], timeout: &str) -> String {
    let [one, two] = payments;
    // Visitors have no certificate.
    let mut config = common(folder, "shop", service, "permissive");
    let who = format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/payments");
    // Writing to a string cannot fail.
    let _ = write!(
        config,
        r#"
[[upstream]]
name = "payments"
endpoints = ["{one}", "{two}"]
identity = ["{who}"]
balance = "round-robin"
timeout = "{timeout}"
retry = {{ budget = {{ min_per_second = 5, window = "2s" }} }}
breaker = {{ failure_rate = 0.0, open_for = {{ base = "1s", max = "2s" }} }}
outlier = {{ eject_for = {{ base = "1s", max = "2s" }} }}
[[upstream]]
name = "reports"
endpoints = ["{one}", "{two}"]
identity = ["{who}"]
breaker = false
outlier = false
"#
    );
    config
}

impl Stage {
    pub async fn set(otlp: Option<&str>) -> Result<Self, DemoError> {
        let folder = Folder::new()?;
        certificates(&folder)?;
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
            match collector_accepts(otlp).await {
                Ok(()) => {
                    println!("traces of all requests are sent to:     {shown}");
                    println!(
                        "in Jaeger, if that is one:              http://localhost:16686/search?service=shop"
                    );
                }
                Err(reason) => {
                    println!("no traces: {shown} cannot be reached ({reason}); start a collector there");
                }
            }
        }
        Ok(Self { story: Story::new(), instances: [one, two], shop_sidecar, shop, folder })
    }

    /// A visitor's call, through everything.
    pub fn visit(
        &self,
        method: Method,
        path: &'static str,
    ) -> impl Future<Output = Result<Reply, DemoError>> + Send + use<> {
        call(self.shop_sidecar.inbound, method, path, "shop")
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

    /// What shop's sidecar says of an upstream.
    pub async fn status(&self, upstream: &str) -> Result<serde_json::Value, DemoError> {
        let status = self.whole_status().await?;
        let upstreams = status["upstreams"].as_array();
        let found = upstreams.and_then(|all| all.iter().find(|one| one["name"] == upstream));
        Ok(found.cloned().unwrap_or_default())
    }

    async fn whole_status(&self) -> Result<serde_json::Value, DemoError> {
        let reply = call(self.shop_sidecar.admin, Method::GET, "/status", "localhost").await?;
        Ok(serde_json::from_slice(&reply.body).unwrap_or_default())
    }

    /// What became of the traces, in words; none where none are sent.
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

    /// One of the counts in it.
    pub async fn count(&self, upstream: &str, of: &str, word: &str) -> Result<u64, DemoError> {
        Ok(self.status(upstream).await?[of][word].as_u64().unwrap_or(0))
    }

    /// How many calls the instances have answered so far.
    pub fn reached(&self) -> u32 {
        self.instances.iter().map(|one| one.trouble.answers.load(Ordering::Relaxed)).sum()
    }

    pub fn trouble(&self, make: impl Fn(&Trouble)) {
        self.instances.iter().for_each(|one| make(&one.trouble));
    }

    pub fn set_slow(&self, slow: Duration) {
        let slow = u64::try_from(slow.as_millis()).unwrap_or(u64::MAX);
        self.trouble(|trouble| trouble.slow_ms.store(slow, Ordering::Relaxed));
    }

    pub fn set_failing(&self, fails: bool) {
        self.trouble(|trouble| trouble.fails.store(fails, Ordering::Relaxed));
    }

    pub fn stop_instance(&mut self, index: usize) {
        self.instances[index].service = None;
    }

    /// Those that were stopped come back to where they were.
    pub async fn start_instances(&mut self) -> Result<(), DemoError> {
        for one in self.instances.iter_mut().filter(|one| one.service.is_none()) {
            one.service = Some(services::payments(one.at, Arc::clone(&one.trouble)).await?);
        }
        Ok(())
    }

    /// Edits shop's configuration; whether that took effect.
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

pub fn well(replies: &[Reply]) -> usize {
    replies.iter().filter(|reply| reply.status == 200).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is printed of traces is true: a collector that is not there is told.
    #[tokio::test]
    async fn a_collector_that_is_not_there_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        assert_eq!(collector_accepts(&url).await, Ok(()));
        drop(listener);
        assert!(collector_accepts(&url).await.unwrap_err().contains("refused"));
        assert!(collector_accepts("not a url").await.is_err());
    }
}
