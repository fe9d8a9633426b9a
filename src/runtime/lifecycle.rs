//! The life of the process: running, reloading, draining, gone.
//!
//! ```text
//! Running ─SIGTERM─▶ Leaving ─drain_delay─▶ DrainingInbound ─▶ CMD ends ─▶ DrainingAll ─▶ stop
//!            │ not ready, still accepting      │ calls in flight finish    │ nobody is left to call out
//!            └────────── POST /drain goes this far, and stays ───┘
//! ```
//!
//! A second SIGTERM or SIGINT stops at once, wherever this has got to. After a SIGINT without CMD nobody waits for the
//! service to leave: outbound drains right after inbound.

use std::{
    pin::pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout_at},
};

use super::{
    Addresses, Proxy,
    child::Child,
    death::{Death, Deaths},
    reload::{self, Change, ReloadRequests, Reloads},
    service_port::ServicePort,
    signals::{self, Signals, Stop, Wish},
};
use crate::{
    config,
    proxy::worker::{Phase, Shared},
    telemetry::{log::LogHandle, metrics::Connections},
    watch::Reason,
};

/// What the service gets at least to end by itself, even where draining took all of `drain_timeout`.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// What connections get to close once nobody is left behind them.
const CLOSING: Duration = Duration::from_millis(500);
/// What the collector gets to take the last spans.
const LAST_SPANS: Duration = Duration::from_secs(2);
/// A service that has not called out by then probably does not look at `http_proxy`.
const FIRST_CALL: Duration = Duration::from_secs(30);

/// What the admin server sees and steers.
#[derive(Debug)]
pub struct Control {
    pub shared: Arc<Shared>,
    pub addresses: Addresses,
    /// Where the admin server is bound, once it is.
    pub admin: OnceLock<AdminAddresses>,
    pub log: LogHandle,
    pub started: Instant,
    pub reloads: Reloads,
    pub reload_requests: ReloadRequests,
    /// Whether the service listens.
    pub service_port: Arc<ServicePort>,
    pub deaths: Deaths,
    discovered: AtomicBool,
    drain: watch::Sender<bool>,
}

/// `host:port`, or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminAddresses {
    pub admin: String,
    pub probe: Option<String>,
    /// Where the token is that changes need.
    pub token_file: Option<std::path::PathBuf>,
}

impl Control {
    pub fn new(proxy: &Proxy, log: LogHandle, reloads: Reloads) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::clone(&proxy.shared),
            addresses: proxy.addresses.clone(),
            admin: OnceLock::new(),
            log,
            started: Instant::now(),
            reloads,
            reload_requests: ReloadRequests::default(),
            service_port: Arc::default(),
            deaths: proxy.deaths.clone(),
            discovered: AtomicBool::new(false),
            drain: watch::Sender::new(false),
        })
    }

    pub fn phase(&self) -> Phase {
        *self.shared.phase.borrow()
    }

    /// Why no new calls should be sent here; none where they should. The service itself does not matter to it.
    pub fn not_ready(&self) -> Option<&'static str> {
        if self.deaths.happened().is_some() {
            return Some("failed: a part of the process has died, and the process ends");
        }
        match self.phase() {
            Phase::Running if self.discovered.load(Ordering::Relaxed) => {
                let identity = self.shared.identity.not_ready(SystemTime::now());
                identity.or_else(|| self.shared.interception.not_ready())
            }
            Phase::Running => Some("starting: not every upstream's endpoints have been looked up yet"),
            Phase::Leaving => Some("leaving: calls are still accepted, send no new ones"),
            Phase::DrainingInbound => Some("draining: inbound calls in flight are finished"),
            Phase::DrainingAll => Some("stopping"),
        }
    }

    /// Discovery has answered, or was waited for long enough.
    pub fn set_discovered(&self) {
        self.discovered.store(true, Ordering::Relaxed);
    }

    /// Starts the inbound drain; false where it had been asked for before.
    pub fn request_drain(&self) -> bool {
        !self.drain.send_replace(true)
    }
}

/// Everything that is needed to live until the end.
pub struct Lifecycle {
    pub proxy: Proxy,
    pub control: Arc<Control>,
    pub child: Option<Child>,
    pub signals: Signals,
    /// What the configuration's files hold when they change. Goes before the watcher, which may be waiting to tell.
    pub changes: mpsc::Receiver<Change>,
    /// Watches the configuration's files.
    pub watcher: config::Watcher,
    /// Told twice to stop: nothing is waited for any more.
    pub at_once: bool,
}

enum End {
    Signal(Stop),
    Child(u8),
    /// Of a part of this process.
    Death(Death),
}

impl Lifecycle {
    /// Lives until it is told to end or the service has ended. Returns the exit code.
    pub async fn run(mut self) -> u8 {
        let code = self.live().await;
        let shared = Arc::clone(&self.proxy.shared);
        self.proxy.stop();
        // Behind the calls that were cut.
        shared.calls.access_log.finish();
        if !self.at_once {
            tokio::select! {
                () = shared.traces.flush(LAST_SPANS) => {}
                _ = self.signals.stop() => {}
            }
        }
        code
    }

    async fn live(&mut self) -> u8 {
        let Self { proxy, control, child, signals, watcher, changes, at_once } = self;
        let mut drain = pin!(drain_inbound(proxy, control));
        let (mut drained, mut after_drain) = (false, None);
        let mut first_call = pin!(nothing_came(&control.shared.metrics.outbound));
        let mut waits_for_call = child.is_some();
        let end = loop {
            tokio::select! {
                wish = signals.next() => match wish {
                    Wish::Stop(signal) => break End::Signal(signal),
                    Wish::Reload => {
                        control.shared.calls.access_log.reopen();
                        // Whoever sends a signal means it, whatever the files hold.
                        watcher.trigger(Reason::Confirmed);
                    }
                    Wish::DrainThenForward(signal) if !drained => {
                        let signal_name = signals::name(signal);
                        tracing::info!(signal = signal_name, "inbound drains, then the service gets the signal");
                        control.request_drain();
                        after_drain = Some(signal);
                    }
                    other => act_on_service(other, child.as_ref()),
                },
                reason = control.reload_requests.next() => watcher.trigger(reason),
                Some(change) = changes.recv() => {
                    let reason = change.reason;
                    let outcome = reload::apply(proxy, &control.reloads, change);
                    control.reload_requests.answer(reason, &outcome);
                }
                code = ended(child) => break End::Child(code),
                death = proxy.death() => break End::Death(death),
                () = &mut drain, if !drained => {
                    drained = true;
                    if let (Some(signal), Some(child)) = (after_drain.take(), &child) {
                        child.forward(signal);
                    }
                },
                nothing_came = &mut first_call, if waits_for_call => {
                    waits_for_call = false;
                    if nothing_came {
                        tracing::warn!(
                            "no outbound connection has come in {}s: the service may not look at http_proxy; let it \
                             send Host: UPSTREAM to the outbound port, or give the upstream a `listen` of its own",
                            FIRST_CALL.as_secs()
                        );
                    }
                }
            }
        };
        match end {
            End::Death(death) => {
                tell_of(&death);
                // Connections that it carried are lost; the service gets its time to end.
                end_service(child, Instant::now(), LAST_WORDS).await;
                *at_once = true;
                1
            }
            End::Child(code) => {
                tracing::info!(code, "the service has ended, and so does its sidecar");
                proxy.set_phase(Phase::DrainingAll);
                proxy.outbound_drained(CLOSING).await;
                code
            }
            End::Signal(signal) => {
                let settings = control.shared.snapshot.load().config.runtime.clone();
                let delay = if drained { Duration::ZERO } else { *settings.drain_delay };
                let deadline = Instant::now() + delay + *settings.drain_timeout;
                tracing::info!(%signal, "leaving: inbound drains first");
                control.request_drain();
                let service = child.clone();
                let leave = async {
                    if !drained {
                        tokio::select! {
                            () = &mut drain => {}
                            _ = ended(child) => tracing::warn!("the service ended before inbound was drained"),
                        }
                    }
                    let code = end_service(child, deadline, *settings.drain_timeout).await;
                    let service = match (&child, signal) {
                        (Some(_), _) => Service::Gone,
                        (None, Stop::Terminate | Stop::Quit) => Service::Elsewhere,
                        (None, Stop::Interrupt) => Service::NotWaitedFor,
                    };
                    drain_outbound(proxy, service, deadline).await;
                    code
                };
                let finished = tokio::select! {
                    code = leave => Some(code),
                    signal = second_stop(signals, service.as_ref()) => {
                        tracing::warn!(%signal, "told twice: stopping at once");
                        *at_once = true;
                        None
                    }
                    death = proxy.death() => {
                        tell_of(&death);
                        *at_once = true;
                        None
                    }
                };
                match (finished, child.as_mut()) {
                    (Some(code), _) => code,
                    (None, Some(child)) => {
                        child.kill();
                        child.ended().await
                    }
                    (None, None) => 1,
                }
            }
        }
    }
}

/// Says why the process ends.
pub fn tell_of(Death { name, why }: &Death) {
    tracing::error!("{name} has died: {why}; the process ends, so that another takes its place");
}

/// Does what a signal asks for that is not for this process.
fn act_on_service(wish: Wish, child: Option<&Child>) {
    match (wish, child) {
        (Wish::Forward(signal) | Wish::DrainThenForward(signal), Some(child)) => child.forward(signal),
        (Wish::Suspend, Some(child)) => {
            child.forward(rustix::process::Signal::TSTP);
            // As it would have been without a handler; SIGCONT comes for both.
            let stopped =
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
            if let Err(error) = stopped {
                tracing::debug!(%error, "could not stop by SIGTSTP");
            }
        }
        (Wish::Ignore(signal) | Wish::Forward(signal) | Wish::DrainThenForward(signal), _) => {
            tracing::info!(
                signal = signals::name(signal),
                "a signal was ignored: nothing here is done by it"
            );
        }
        (Wish::Stop(_) | Wish::Reload | Wish::Suspend, _) => {}
    }
}

/// The next wish to end, while what is meant for the service still reaches it.
async fn second_stop(signals: &mut Signals, child: Option<&Child>) -> Stop {
    loop {
        match signals.next().await {
            Wish::Stop(signal) => return signal,
            other => act_on_service(other, child),
        }
    }
}

/// Waits for the end of the service, for ever where there is none.
async fn ended(child: &mut Option<Child>) -> u8 {
    match child {
        Some(child) => child.ended().await,
        None => std::future::pending().await,
    }
}

/// Once asked for: stops being ready, accepts for `drain_delay`, then lets inbound calls finish.
async fn drain_inbound(proxy: &Proxy, control: &Control) {
    // The sender lives in `control`.
    let _ = control.drain.subscribe().wait_for(|asked| *asked).await;
    let settings = control.shared.snapshot.load().config.runtime.clone();
    if let Some(delay) = settings.drain_delay.limit() {
        proxy.set_phase(Phase::Leaving);
        sleep(delay).await;
    }
    let open = || control.shared.metrics.inbound.open.load(Ordering::Relaxed).max(0);
    let before = open();
    proxy.set_phase(Phase::DrainingInbound);
    let began = Instant::now();
    if proxy.inbound_drained(*settings.drain_timeout).await {
        tracing::info!(connections = before, took = ?began.elapsed(), "inbound is drained, nothing was cut");
    } else {
        let cut = open();
        let drained = (before - cut).max(0);
        let limit = settings.drain_timeout;
        tracing::warn!(drained, cut, "inbound was not drained within drain_timeout = {limit}");
    }
}

/// Asks the service to end, and makes it. Its exit code; 0 where there is none.
async fn end_service(child: &mut Option<Child>, deadline: Instant, drain_timeout: Duration) -> u8 {
    let Some(child) = child else { return 0 };
    child.terminate();
    let deadline = deadline.max(Instant::now() + LAST_WORDS.min(drain_timeout));
    if let Ok(code) = timeout_at(deadline, child.ended()).await {
        return code;
    }
    tracing::warn!(pid = child.pid(), "the service did not end on SIGTERM in time: killed");
    child.kill();
    child.ended().await
}

/// Who may still call out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    /// It was ours, and has ended.
    Gone,
    /// Somebody else ends it: it lives as long as it keeps a connection to us.
    Elsewhere,
    /// It may live on; only its calls in flight are finished.
    NotWaitedFor,
}

async fn drain_outbound(proxy: &Proxy, service: Service, deadline: Instant) {
    if service == Service::Elsewhere {
        tokio::select! {
            () = proxy.outbound_quiet() => {}
            () = sleep_until(deadline) => {}
        }
    }
    let patience = match service {
        Service::NotWaitedFor => deadline.saturating_duration_since(Instant::now()).max(CLOSING),
        Service::Gone | Service::Elsewhere => CLOSING,
    };
    proxy.set_phase(Phase::DrainingAll);
    let open = proxy.shared.metrics.outbound.open.load(Ordering::Relaxed).max(0);
    if proxy.outbound_drained(patience).await {
        tracing::info!("stopped: outbound is drained too");
    } else {
        let cut = proxy.shared.metrics.outbound.open.load(Ordering::Relaxed).max(0);
        tracing::warn!(drained = (open - cut).max(0), cut, "stopped: outbound connections were still open");
    }
}

/// Waits as long as a service may take for its first call; whether none came.
async fn nothing_came(outbound: &Connections) -> bool {
    sleep(FIRST_CALL).await;
    outbound.total.load(Ordering::Relaxed) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_service_gets_its_time_before_it_is_told_of() {
        let (outbound, began) = (Connections::default(), Instant::now());
        assert!(nothing_came(&outbound).await);
        assert_eq!(began.elapsed(), FIRST_CALL);
        drop(outbound.opened());
        assert!(!nothing_came(&outbound).await, "one that has ended came, too");
    }
}
