//! The data plane threads.
//!
//! A single worker accepts connections itself. With several, an accept thread hands each connection to the worker that
//! was least busy recently, where it stays.

#[cfg(test)]
mod tests;

use std::{
    future::Future,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::Duration,
};

use tokio::{
    net::TcpStream,
    runtime::{Builder, LocalOptions, LocalRuntime},
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{StartError, failure::FailureMonitor};
use crate::{
    model::Side,
    proxy::{
        accept::{self, BACKLOG, Listener, accept_loop, accept_rest},
        queue::deliverer,
        worker::{Shared, Worker, connection_counts, drain_phase},
    },
    telemetry::metrics::{PendingGuard, WorkerLoad},
    upstream::eviction,
};

/// Connections handed over to a worker that it has not taken yet: as many as the kernel's backlog of a listener.
const HAND_OVER: usize = BACKLOG as usize;
/// How often idle connections are checked.
const SWEEP: Duration = Duration::from_secs(1);
/// How often a worker samples its busy time.
const BUSY_SAMPLE: Duration = Duration::from_millis(100);

/// The running threads.
#[derive(Debug)]
pub struct Workers {
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
    failures: FailureMonitor,
}

impl Workers {
    /// Stops the threads; requests in flight are cut off.
    pub fn stop(self) {
        self.stop.send_replace(true);
        for thread in self.threads {
            // A panic was reported already.
            let _ = thread.join();
        }
    }

    fn spawn<F, Fut>(&mut self, name: &str, task: F) -> Result<(), StartError>
    where
        F: FnOnce(watch::Receiver<bool>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), String>>,
    {
        let stop = self.stop.subscribe();
        let guard = self.failures.guard(name);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            match runtime() {
                Ok(runtime) => {
                    let ended = runtime.block_on(task(stop));
                    runtime.shutdown_background();
                    guard.finish(ended);
                }
                Err(error) => guard.finish(Err(format!("cannot start its runtime: {error}"))),
            };
        });
        self.threads.push(thread.map_err(StartError::Worker)?);
        Ok(())
    }
}

pub(super) fn start(
    shared: &Arc<Shared>,
    listeners: Vec<Listener>,
    count: u16,
    failures: FailureMonitor,
) -> Result<Workers, StartError> {
    let stop = watch::Sender::new(false);
    let mut workers = Workers { stop, threads: Vec::new(), failures };
    if count == 1 {
        let task = {
            let shared = Arc::clone(shared);
            move |stop| async move {
                let worker = Worker::new(shared, 0);
                let serving = Rc::clone(&worker);
                let mut accepting =
                    accept_all(listeners, &worker.shared, move |stream, peer, side, pending| {
                        accept::serve(&serving, stream, peer, side.clone(), pending);
                    });
                accepting.spawn_local(deliver(Rc::clone(&worker)));
                tokio::select! {
                    () = housekeeping(&worker, false, stop) => Ok(()),
                    reason = first_failure(accepting) => Err(reason),
                }
            }
        };
        workers.spawn("worker-0", task)?;
        return Ok(workers);
    }
    let mut queues = Vec::new();
    for index in 0..usize::from(count) {
        let (queue, connections) = mpsc::channel(HAND_OVER);
        queues.push(queue);
        let shared = Arc::clone(shared);
        workers.spawn(&format!("worker-{index}"), move |stop| async move {
            let worker = Worker::new(shared, index);
            let mut taking = JoinSet::new();
            taking.spawn_local(take_connections(Rc::clone(&worker), connections));
            if index == 0 {
                taking.spawn_local(deliver(Rc::clone(&worker)));
            }
            tokio::select! {
                () = housekeeping(&worker, true, stop) => Ok(()),
                reason = first_failure(taking) => Err(reason),
            }
        })?;
    }
    let shared = Arc::clone(shared);
    workers.spawn("accept", move |mut stop| async move {
        let loads = Arc::clone(&shared);
        let accepting = accept_all(listeners, &shared, move |stream, peer, side, pending| {
            let connection = Accepted { stream, peer, side: side.clone(), pending };
            hand_over(&queues, &loads.metrics.workers, connection);
        });
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => Ok(()),
            reason = first_failure(accepting) => Err(reason),
        }
    })?;
    Ok(workers)
}

/// Delivers what is queued, on this worker. Ends at once where there is no store.
async fn deliver(worker: Rc<Worker>) -> Result<(), String> {
    deliverer::run(worker).await;
    Ok(())
}

/// Waits for the first task that fails; returns the reason. Tasks that succeed are ignored.
async fn first_failure(mut tasks: JoinSet<Result<(), String>>) -> String {
    loop {
        match tasks.join_next().await {
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(reason))) => return reason,
            Some(Err(error)) => return format!("one of its tasks panicked ({error})"),
            None => return std::future::pending().await,
        }
    }
}

fn runtime() -> io::Result<LocalRuntime> {
    Builder::new_current_thread().enable_io().enable_time().build_local(LocalOptions::default())
}

/// Starts accepting on all listeners. Each task ends when its side drains, or fails.
fn accept_all<D>(listeners: Vec<Listener>, shared: &Shared, deliver: D) -> JoinSet<Result<(), String>>
where
    D: FnMut(TcpStream, SocketAddr, &Side, PendingGuard) + Clone + 'static,
{
    let mut tasks = JoinSet::new();
    for listener in listeners {
        let drains_at = drain_phase(&listener.side);
        let sockets = match listener.into_tokio() {
            Ok(sockets) => sockets,
            Err(error) => {
                tasks.spawn_local(async move { Err(format!("cannot register a listener: {error}")) });
                continue;
            }
        };
        for (side, socket) in sockets {
            let mut phase = shared.phase.subscribe();
            let mut deliver = deliver.clone();
            let counts = Arc::clone(connection_counts(shared, &side));
            let listening = counts.count_listener();
            tasks.spawn_local(async move {
                let address =
                    socket.local_addr().map_or_else(|_| String::new(), |address| address.to_string());
                let mut deliver =
                    |stream, peer, side: &_| deliver(stream, peer, side, counts.count_pending());
                tokio::select! {
                    error = accept_loop(&socket, &side, &mut deliver) => {
                        return Err(format!("its listener on {address} failed: {error}"));
                    }
                    _ = phase.wait_for(|phase| *phase >= drains_at) => {}
                }
                // The kernel has completed the handshakes of connections in the backlog, so they must be served.
                if let Err(error) = accept_rest(socket, &side, &mut deliver).await {
                    tracing::warn!(%error, address, "connections in the backlog of a listener were lost");
                }
                drop(listening);
                Ok(())
            });
        }
    }
    tasks
}

/// An accepted connection on its way to a worker.
struct Accepted<S> {
    stream: S,
    peer: SocketAddr,
    side: Side,
    pending: PendingGuard,
}

type WorkerQueue = mpsc::Sender<Accepted<std::net::TcpStream>>;

/// Hands a connection to the worker with the least recent busy time; ties go to the one with fewer connections.
fn hand_over(queues: &[WorkerQueue], loads: &[WorkerLoad], connection: Accepted<TcpStream>) {
    let candidates = queues.iter().zip(loads).filter(|(queue, _)| queue.capacity() > 0);
    let least = candidates.min_by_key(|(queue, load)| {
        // Differences below 1 % of the time are noise.
        let busy = load.recent_busy.load(Ordering::Relaxed) / (BUSY_SAMPLE.as_nanos() as u64 / 100);
        // Including queued connections, so that a burst is spread before the workers have taken any of it.
        let queued = queue.max_capacity() - queue.capacity();
        (busy, load.connections.load(Ordering::Relaxed) + queued)
    });
    let Accepted { stream, peer, side, pending } = connection;
    let sent = match (least, stream.into_std()) {
        (Some((queue, _)), Ok(stream)) => queue.try_send(Accepted { stream, peer, side, pending }).is_ok(),
        _ => false,
    };
    if !sent {
        tracing::warn!(%peer, "connection refused: the queues of all workers are full");
    }
}

async fn take_connections(
    worker: Rc<Worker>,
    mut queue: mpsc::Receiver<Accepted<std::net::TcpStream>>,
) -> Result<(), String> {
    while let Some(Accepted { stream, peer, side, pending }) = queue.recv().await {
        match TcpStream::from_std(stream) {
            Ok(stream) => accept::serve(&worker, stream, peer, side, pending),
            Err(error) => tracing::warn!(%error, "cannot register a connection"),
        }
    }
    Ok(())
}

/// Closes idle connections and samples the load of the worker, until `stop`.
async fn housekeeping(worker: &Rc<Worker>, has_peers: bool, mut stop: watch::Receiver<bool>) {
    let metrics = tokio::runtime::Handle::current().metrics();
    if let Some(load) = worker.load() {
        let _ = load.runtime.set(metrics);
    }
    let sweeping = async {
        loop {
            if let Some(load) = worker.load() {
                load.record_heartbeat();
            }
            tokio::time::sleep(SWEEP).await;
            worker.sweep();
        }
    };
    let releasing = async {
        loop {
            let requested = eviction::requested();
            worker.release_idle();
            requested.await;
        }
    };
    let sampling = async {
        let Some(load) = worker.load().filter(|_| has_peers) else { return std::future::pending().await };
        let mut before = load.busy();
        loop {
            tokio::time::sleep(BUSY_SAMPLE).await;
            let now = load.busy();
            let busy = u64::try_from((now - before).as_nanos()).unwrap_or(u64::MAX);
            before = now;
            let average = load.recent_busy.load(Ordering::Relaxed) / 2 + busy / 2;
            load.recent_busy.store(average, Ordering::Relaxed);
        }
    };
    tokio::select! {
        () = sweeping => {}
        () = sampling => {}
        () = releasing => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}
