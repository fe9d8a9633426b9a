//! The lifecycle of the process: running, reload, drain, stop.
//!
//! ```text
//! Running ─SIGTERM─▶ DrainDelay ─drain_delay─▶ DrainingInbound ─▶ CMD ends ─▶ DrainingAll ─▶ stop
//!            │ not ready, still accepting         │ requests in flight finish
//!            └────────── POST /drain goes this far, and stays ───┘
//! ```
//!
//! A second SIGTERM or SIGINT stops at once, in any phase. After a SIGINT without CMD, outbound drains right after
//! inbound, without waiting for the service to end.

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
    failure::{CriticalFailure, FailureMonitor},
    reload::{self, Change, ReloadRequests, Reloads},
    service_port::ServicePort,
    signals::{self, SignalAction, Signals, StopSignal},
};
use crate::{
    config,
    proxy::worker::{Phase, Shared},
    telemetry::{log::LogHandle, metrics::ConnectionCounters},
    watch::WatchReason,
};

/// The least time that the service gets to end after SIGTERM, even where the drain took all of `drain_timeout`.
const MIN_SERVICE_SHUTDOWN: Duration = Duration::from_secs(2);
/// How long outbound connections get to close after the service has ended.
const CLOSING: Duration = Duration::from_millis(500);
/// How long the export of the last spans may take.
const FINAL_EXPORT: Duration = Duration::from_secs(2);
/// A service that has opened no outbound connection by then probably ignores `http_proxy`.
const FIRST_REQUEST: Duration = Duration::from_secs(30);

/// What the admin server reads and controls.
#[derive(Debug)]
pub struct Control {
    pub shared: Arc<Shared>,
    pub addresses: Addresses,
    /// The addresses of the admin server, once it is bound.
    pub admin: OnceLock<AdminAddresses>,
    pub log: LogHandle,
    pub started: Instant,
    pub reloads: Reloads,
    pub reload_requests: ReloadRequests,
    /// Whether the service accepts connections.
    pub service_port: Arc<ServicePort>,
    pub failures: FailureMonitor,
    discovered: AtomicBool,
    drain: watch::Sender<bool>,
}

/// `host:port`, or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminAddresses {
    pub admin: String,
    pub probe: Option<String>,
    /// The file of the admin token.
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
            failures: proxy.failures.clone(),
            discovered: AtomicBool::new(false),
            drain: watch::Sender::new(false),
        })
    }

    pub fn phase(&self) -> Phase {
        *self.shared.phase.borrow()
    }

    /// Why the proxy is not ready for new requests; none where it is. Independent of the service.
    pub fn not_ready(&self) -> Option<&'static str> {
        if self.failures.failure().is_some() {
            return Some("failed: a thread of the process has failed, and the process ends");
        }
        match self.phase() {
            Phase::Running if self.discovered.load(Ordering::Relaxed) => {
                let identity = self.shared.identity.not_ready(SystemTime::now());
                let store = || self.shared.queues.as_ref().and_then(|queues| queues.not_ready());
                identity.or_else(|| self.shared.interception.not_ready()).or_else(store)
            }
            Phase::Running => Some("starting: the endpoints of some upstreams are not resolved yet"),
            Phase::DrainDelay => Some("leaving: shutting down, requests are still accepted"),
            Phase::DrainingInbound => Some("draining: inbound requests in flight are finished"),
            Phase::DrainingAll => Some("stopping"),
        }
    }

    /// Marks the first discovery as done, or waited for long enough.
    pub fn set_discovered(&self) {
        self.discovered.store(true, Ordering::Relaxed);
    }

    /// Starts the inbound drain; false where it was requested before.
    pub fn request_drain(&self) -> bool {
        !self.drain.send_replace(true)
    }
}

/// The parts of the process that [`Lifecycle::run`] drives until the end.
pub struct Lifecycle {
    pub proxy: Proxy,
    pub control: Arc<Control>,
    pub child: Option<Child>,
    pub signals: Signals,
    /// Changes of the configuration files. Dropped before the watcher, which may block on sending to it.
    pub changes: mpsc::Receiver<Change>,
    /// Watches the configuration files.
    pub watcher: config::Watcher,
    /// Stop without waiting: set on a second stop signal, or after a failure.
    pub stop_now: bool,
}

/// Why the process ends.
enum EndCause {
    Signal(StopSignal),
    /// The service ended with this exit code.
    Service(u8),
    /// A critical thread or task failed.
    Failure(CriticalFailure),
}

impl Lifecycle {
    /// Runs until a stop signal, the end of the service or a failure. Returns the exit code.
    pub async fn run(mut self) -> u8 {
        let code = self.run_to_end().await;
        let shared = Arc::clone(&self.proxy.shared);
        self.proxy.stop();
        // After the workers, so that requests that were cut off are logged.
        shared.request_telemetry.access_log.finish();
        if !self.stop_now {
            tokio::select! {
                () = shared.traces.flush(FINAL_EXPORT) => {}
                _ = self.signals.next_stop() => {}
            }
        }
        code
    }

    async fn run_to_end(&mut self) -> u8 {
        let Self { proxy, control, child, signals, watcher, changes, stop_now: at_once } = self;
        let mut drain = pin!(drain_inbound(proxy, control));
        let (mut drained, mut after_drain) = (false, None);
        let mut first_request = pin!(stays_silent(&control.shared.metrics.outbound));
        let mut awaits_first_request = child.is_some();
        let cause = loop {
            tokio::select! {
                action = signals.next() => match action {
                    SignalAction::Stop(signal) => break EndCause::Signal(signal),
                    SignalAction::Reload => {
                        control.shared.request_telemetry.access_log.reopen();
                        // SIGHUP confirms the change, whatever the files contain.
                        watcher.trigger(WatchReason::Confirmed);
                    }
                    SignalAction::DrainThenForward(signal) if !drained => {
                        let signal_name = signals::signal_name(signal);
                        tracing::info!(signal = signal_name, "draining inbound, then forwarding the signal");
                        control.request_drain();
                        after_drain = Some(signal);
                    }
                    other => act_on_service(other, child.as_ref()),
                },
                reason = control.reload_requests.next() => watcher.trigger(reason),
                Some(change) = changes.recv() => {
                    let reason = change.reason;
                    let outcome = reload::apply(proxy, &control.reloads, change);
                    control.reload_requests.reply(reason, &outcome);
                }
                code = ended(child) => break EndCause::Service(code),
                failure = proxy.wait_failure() => break EndCause::Failure(failure),
                () = &mut drain, if !drained => {
                    drained = true;
                    if let (Some(signal), Some(child)) = (after_drain.take(), &child) {
                        child.forward(signal);
                    }
                },
                silent = &mut first_request, if awaits_first_request => {
                    awaits_first_request = false;
                    if silent {
                        tracing::warn!(
                            "no outbound connection has come in {}s: the service may ignore http_proxy; let it send \
                             Host: UPSTREAM to the outbound port, or give the upstream a `listen` of its own",
                            FIRST_REQUEST.as_secs()
                        );
                    }
                }
            }
        };
        match cause {
            EndCause::Failure(failure) => {
                log_failure(&failure);
                // Connections of the failed thread are lost; the service still gets time to end.
                end_service(child, Instant::now(), MIN_SERVICE_SHUTDOWN).await;
                *at_once = true;
                1
            }
            EndCause::Service(code) => {
                tracing::info!(code, "the service has ended; stopping");
                proxy.set_phase(Phase::DrainingAll);
                let drain_timeout = *control.shared.snapshot.load().config.runtime.drain_timeout;
                proxy.wait_deliveries(Instant::now() + drain_timeout).await;
                proxy.wait_outbound_drained(CLOSING).await;
                code
            }
            EndCause::Signal(signal) => {
                let settings = control.shared.snapshot.load().config.runtime.clone();
                let delay = if drained { Duration::ZERO } else { *settings.drain_delay };
                let deadline = Instant::now() + delay + *settings.drain_timeout;
                tracing::info!(%signal, "shutting down: draining inbound");
                control.request_drain();
                let service = child.clone();
                let shutdown = async {
                    if !drained {
                        tokio::select! {
                            () = &mut drain => {}
                            _ = ended(child) => tracing::warn!("the service ended before inbound was drained"),
                        }
                    }
                    // Before the service ends: it is what inbound deliveries are sent to.
                    proxy.wait_deliveries(deadline).await;
                    let code = end_service(child, deadline, *settings.drain_timeout).await;
                    let service = match (&child, signal) {
                        (Some(_), _) => ServiceState::Ended,
                        (None, StopSignal::Terminate | StopSignal::Quit) => ServiceState::External,
                        (None, StopSignal::Interrupt) => ServiceState::NotAwaited,
                    };
                    drain_outbound(proxy, service, deadline).await;
                    code
                };
                let finished = tokio::select! {
                    code = shutdown => Some(code),
                    signal = second_stop(signals, service.as_ref()) => {
                        tracing::warn!(%signal, "second stop signal: stopping at once");
                        *at_once = true;
                        None
                    }
                    failure = proxy.wait_failure() => {
                        log_failure(&failure);
                        *at_once = true;
                        None
                    }
                };
                match (finished, child.as_mut()) {
                    (Some(code), _) => code,
                    (None, Some(child)) => {
                        child.kill();
                        child.wait().await
                    }
                    (None, None) => 1,
                }
            }
        }
    }
}

/// Logs the failure that ends the process.
pub fn log_failure(CriticalFailure { name, reason: why }: &CriticalFailure) {
    tracing::error!("{name} has failed: {why}; the process ends, so that its supervisor restarts it");
}

/// Acts on a signal that is meant for the service.
fn act_on_service(action: SignalAction, child: Option<&Child>) {
    match (action, child) {
        (SignalAction::Forward(signal) | SignalAction::DrainThenForward(signal), Some(child)) => {
            child.forward(signal)
        }
        (SignalAction::Suspend, Some(child)) => {
            child.forward(rustix::process::Signal::TSTP);
            // As without a handler; SIGCONT resumes both.
            let stopped =
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
            if let Err(error) = stopped {
                tracing::debug!(%error, "cannot suspend on SIGTSTP");
            }
        }
        (
            SignalAction::Ignore(signal)
            | SignalAction::Forward(signal)
            | SignalAction::DrainThenForward(signal),
            _,
        ) => {
            tracing::info!(signal = signals::signal_name(signal), "signal ignored: it has no meaning here");
        }
        (SignalAction::Stop(_) | SignalAction::Reload | SignalAction::Suspend, _) => {}
    }
}

/// Waits for the next stop signal; signals for the service are still forwarded.
async fn second_stop(signals: &mut Signals, child: Option<&Child>) -> StopSignal {
    loop {
        match signals.next().await {
            SignalAction::Stop(signal) => return signal,
            other => act_on_service(other, child),
        }
    }
}

/// Waits for the end of the service, forever where there is none.
async fn ended(child: &mut Option<Child>) -> u8 {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
    }
}

/// Once requested: becomes not ready, accepts for `drain_delay`, then lets inbound requests finish.
async fn drain_inbound(proxy: &Proxy, control: &Control) {
    // The sender lives in `control`.
    let _ = control.drain.subscribe().wait_for(|requested| *requested).await;
    let settings = control.shared.snapshot.load().config.runtime.clone();
    if let Some(delay) = settings.drain_delay.limit() {
        proxy.set_phase(Phase::DrainDelay);
        sleep(delay).await;
    }
    let open = || control.shared.metrics.inbound.open.load(Ordering::Relaxed).max(0);
    let before = open();
    proxy.set_phase(Phase::DrainingInbound);
    let began = Instant::now();
    if proxy.wait_inbound_drained(*settings.drain_timeout).await {
        tracing::info!(connections = before, took = ?began.elapsed(), "inbound is drained, no connection was cut off");
    } else {
        let cut = open();
        let drained = (before - cut).max(0);
        let limit = settings.drain_timeout;
        tracing::warn!(drained, cut, "inbound was not drained within drain_timeout = {limit}");
    }
}

/// Sends SIGTERM to the service, and SIGKILL after `deadline`. Returns its exit code; 0 where there is none.
async fn end_service(child: &mut Option<Child>, deadline: Instant, drain_timeout: Duration) -> u8 {
    let Some(child) = child else { return 0 };
    child.terminate();
    let deadline = deadline.max(Instant::now() + MIN_SERVICE_SHUTDOWN.min(drain_timeout));
    if let Ok(code) = timeout_at(deadline, child.wait()).await {
        return code;
    }
    tracing::warn!(pid = child.pid(), "the service did not end in time after SIGTERM: killed");
    child.kill();
    child.wait().await
}

/// Whether the service may still send requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServiceState {
    /// It was a child process, and has ended.
    Ended,
    /// Another supervisor ends it: it counts as running while it keeps a connection to the proxy.
    External,
    /// It may keep running; only its requests in flight are finished.
    NotAwaited,
}

async fn drain_outbound(proxy: &Proxy, service: ServiceState, deadline: Instant) {
    if service == ServiceState::External {
        tokio::select! {
            () = proxy.wait_outbound_idle() => {}
            () = sleep_until(deadline) => {}
        }
    }
    let limit = match service {
        ServiceState::NotAwaited => deadline.saturating_duration_since(Instant::now()).max(CLOSING),
        ServiceState::Ended | ServiceState::External => CLOSING,
    };
    proxy.set_phase(Phase::DrainingAll);
    let open = proxy.shared.metrics.outbound.open.load(Ordering::Relaxed).max(0);
    if proxy.wait_outbound_drained(limit).await {
        tracing::info!("stopped: outbound is drained too");
    } else {
        let cut = proxy.shared.metrics.outbound.open.load(Ordering::Relaxed).max(0);
        tracing::warn!(drained = (open - cut).max(0), cut, "stopped: outbound connections were still open");
    }
}

/// Waits [`FIRST_REQUEST`]; returns whether no outbound connection was opened until then.
async fn stays_silent(outbound: &ConnectionCounters) -> bool {
    sleep(FIRST_REQUEST).await;
    outbound.total.load(Ordering::Relaxed) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_silent_service_is_reported_after_a_while() {
        let (outbound, began) = (ConnectionCounters::default(), Instant::now());
        assert!(stays_silent(&outbound).await);
        assert_eq!(began.elapsed(), FIRST_REQUEST);
        drop(outbound.count_open());
        assert!(!stays_silent(&outbound).await, "a closed connection counts too");
    }
}
