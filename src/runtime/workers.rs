//! The data plane's threads.
//!
//! A lone worker accepts for itself. With several, a thread of its own accepts and hands each connection to the worker
//! that was least busy of late; there it stays.

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

use super::{StartError, death::Deaths};
use crate::{
    model::Side,
    proxy::{
        accept::{self, BACKLOG, Listener, accept_loop, accept_rest},
        worker::{Shared, Worker, connections, drain_phase},
    },
    telemetry::metrics::{Awaited, WorkerLoad},
    upstream::squeeze,
};

/// Connections handed over and not yet taken, per worker: as many as the kernel keeps for a listener.
const HAND_OVER: usize = BACKLOG as usize;
/// How often idle connections are looked at.
const SWEEP: Duration = Duration::from_secs(1);
/// How often a worker says how busy it has been.
const BUSY_SAMPLE: Duration = Duration::from_millis(100);

/// The running threads.
#[derive(Debug)]
pub struct Workers {
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
    deaths: Deaths,
}

impl Workers {
    /// Ends the threads; what they still carry is cut.
    pub fn stop(self) {
        self.stop.send_replace(true);
        for thread in self.threads {
            // A worker that panicked has said so already.
            let _ = thread.join();
        }
    }

    fn spawn<F, Fut>(&mut self, name: &str, task: F) -> Result<(), StartError>
    where
        F: FnOnce(watch::Receiver<bool>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), String>>,
    {
        let stop = self.stop.subscribe();
        let vigil = self.deaths.keep(name);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            match runtime() {
                Ok(runtime) => {
                    let ended = runtime.block_on(task(stop));
                    runtime.shutdown_background();
                    vigil.end(ended);
                }
                Err(error) => vigil.end(Err(format!("it has no runtime: {error}"))),
            };
        });
        self.threads.push(thread.map_err(StartError::Worker)?);
        Ok(())
    }
}

pub(super) fn start(
    shared: &Arc<Shared>,
    listeners: Vec<Listener>,
    (count, deaths): (u16, Deaths),
) -> Result<Workers, StartError> {
    let stop = watch::Sender::new(false);
    let mut workers = Workers { stop, threads: Vec::new(), deaths };
    if count == 1 {
        let task = {
            let shared = Arc::clone(shared);
            move |stop| async move {
                let worker = Worker::new(shared, 0);
                let delivering = Rc::clone(&worker);
                let accepting = accept_all(listeners, &worker.shared, move |stream, peer, side, coming| {
                    accept::serve(&delivering, stream, peer, side.clone(), coming);
                });
                tokio::select! {
                    () = house_keeping(&worker, false, stop) => Ok(()),
                    why = failed(accepting) => Err(why),
                }
            }
        };
        workers.spawn("worker-0", task)?;
        return Ok(workers);
    }
    let mut seats = Vec::new();
    for index in 0..usize::from(count) {
        let (hand_over, taken) = mpsc::channel(HAND_OVER);
        seats.push(hand_over);
        let shared = Arc::clone(shared);
        workers.spawn(&format!("worker-{index}"), move |stop| async move {
            let worker = Worker::new(shared, index);
            let mut taking = JoinSet::new();
            taking.spawn_local(take(Rc::clone(&worker), taken));
            tokio::select! {
                () = house_keeping(&worker, true, stop) => Ok(()),
                why = failed(taking) => Err(why),
            }
        })?;
    }
    let shared = Arc::clone(shared);
    workers.spawn("accept", move |mut stop| async move {
        let loads = Arc::clone(&shared);
        let accepting = accept_all(listeners, &shared, move |stream, peer, side, coming| {
            hand_over(&seats, &loads.metrics.workers, stream, (peer, side.clone(), coming));
        });
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => Ok(()),
            why = failed(accepting) => Err(why),
        }
    })?;
    Ok(workers)
}

/// Waits for a task that fails, and says why; those that end well are let go.
async fn failed(mut tasks: JoinSet<Result<(), String>>) -> String {
    loop {
        match tasks.join_next().await {
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(why))) => return why,
            Some(Err(error)) => return format!("a task of it panicked ({error})"),
            None => return std::future::pending().await,
        }
    }
}

fn runtime() -> io::Result<LocalRuntime> {
    Builder::new_current_thread().enable_io().enable_time().build_local(LocalOptions::default())
}

/// Starts accepting on all listeners; each ends when its side drains, or fails.
fn accept_all<D>(listeners: Vec<Listener>, shared: &Shared, deliver: D) -> JoinSet<Result<(), String>>
where
    D: FnMut(TcpStream, SocketAddr, &Side, Awaited) + Clone + 'static,
{
    let mut tasks = JoinSet::new();
    for listener in listeners {
        let drains_at = drain_phase(&listener.side);
        let sockets = match listener.into_tokio() {
            Ok(sockets) => sockets,
            Err(error) => {
                tasks.spawn_local(async move { Err(format!("a listener cannot be registered: {error}")) });
                continue;
            }
        };
        for (side, socket) in sockets {
            let mut phase = shared.phase.subscribe();
            let mut deliver = deliver.clone();
            let counts = Arc::clone(connections(shared, &side));
            let listening = counts.listening();
            tasks.spawn_local(async move {
                let address =
                    socket.local_addr().map_or_else(|_| String::new(), |address| address.to_string());
                let mut deliver = |stream, peer, side: &_| deliver(stream, peer, side, counts.coming());
                tokio::select! {
                    error = accept_loop(&socket, &side, &mut deliver) => {
                        return Err(format!("its listener on {address} accepts nothing any more: {error}"));
                    }
                    _ = phase.wait_for(|phase| *phase >= drains_at) => {}
                }
                // Who is in the backlog has been told by the kernel that we are here.
                if let Err(error) = accept_rest(socket, &side, &mut deliver).await {
                    tracing::warn!(%error, address, "the last connections of a listener were lost");
                }
                drop(listening);
                Ok(())
            });
        }
    }
    tasks
}

type Handed = (std::net::TcpStream, (SocketAddr, Side, Awaited));
type Seat = mpsc::Sender<Handed>;

/// Gives a connection to the worker with the least recent work; fewer connections break ties.
fn hand_over(
    seats: &[Seat],
    loads: &[WorkerLoad],
    stream: TcpStream,
    (peer, side, coming): (SocketAddr, Side, Awaited),
) {
    let with_room = seats.iter().zip(loads).filter(|(seat, _)| seat.capacity() > 0);
    let least = with_room.min_by_key(|(seat, load)| {
        // Differences below a hundredth of the time are noise.
        let busy = load.recent.load(Ordering::Relaxed) / (BUSY_SAMPLE.as_nanos() as u64 / 100);
        // With those on their way, so that a burst is spread before the workers have seen any of it.
        let on_their_way = seat.max_capacity() - seat.capacity();
        (busy, load.connections.load(Ordering::Relaxed) + on_their_way)
    });
    let sent = match (least, stream.into_std()) {
        (Some((seat, _)), Ok(stream)) => seat.try_send((stream, (peer, side, coming))).is_ok(),
        _ => false,
    };
    if !sent {
        tracing::warn!(%peer, "a connection was refused: every worker is too far behind");
    }
}

async fn take(worker: Rc<Worker>, mut handed: mpsc::Receiver<Handed>) -> Result<(), String> {
    while let Some((stream, (peer, side, coming))) = handed.recv().await {
        match TcpStream::from_std(stream) {
            Ok(stream) => accept::serve(&worker, stream, peer, side, coming),
            Err(error) => tracing::warn!(%error, "cannot register a connection"),
        }
    }
    Ok(())
}

/// Closes what is idle, says how busy the worker is, until told to stop.
async fn house_keeping(worker: &Rc<Worker>, has_peers: bool, mut stop: watch::Receiver<bool>) {
    let metrics = tokio::runtime::Handle::current().metrics();
    if let Some(load) = worker.load() {
        let _ = load.runtime.set(metrics);
    }
    let sweeping = async {
        loop {
            if let Some(load) = worker.load() {
                load.beat();
            }
            tokio::time::sleep(SWEEP).await;
            worker.sweep();
        }
    };
    let squeezing = async {
        loop {
            let wanted = squeeze::wanted();
            worker.squeeze();
            wanted.await;
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
            let average = load.recent.load(Ordering::Relaxed) / 2 + busy / 2;
            load.recent.store(average, Ordering::Relaxed);
        }
    };
    tokio::select! {
        () = sweeping => {}
        () = sampling => {}
        () = squeezing => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}
