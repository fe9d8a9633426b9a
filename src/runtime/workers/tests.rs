use super::*;
use crate::runtime::failure::CriticalFailure;

fn workers() -> Workers {
    Workers { stop: watch::Sender::new(false), threads: Vec::new(), failures: FailureMonitor::default() }
}

/// Housekeeping runs in a worker's main task, and a listener's failure ends it.
#[tokio::test]
async fn a_worker_that_panics_or_fails_is_reported_by_its_name() {
    async fn panics() -> Result<(), String> {
        tokio::time::sleep(Duration::from_millis(1)).await;
        panic!("on purpose");
    }
    let mut panicking = workers();
    panicking.spawn("worker-1", |_| panics()).unwrap();
    let failure = CriticalFailure { name: "worker-1".to_owned(), reason: "it panicked".to_owned() };
    assert_eq!(panicking.failures.wait().await, failure);
    assert_eq!(panicking.failures.failure(), Some(&failure));
    panicking.stop();

    let mut failing = workers();
    failing.spawn("accept", |_| async { Err("its listener is gone".to_owned()) }).unwrap();
    let failure = CriticalFailure { name: "accept".to_owned(), reason: "its listener is gone".to_owned() };
    assert_eq!(failing.failures.wait().await, failure);
    failing.stop();
}

#[tokio::test]
async fn a_worker_that_is_stopped_is_not_reported() {
    let mut workers = workers();
    let stops = |mut stop: watch::Receiver<bool>| async move {
        let _ = stop.wait_for(|stop| *stop).await;
        Ok(())
    };
    workers.spawn("worker-0", stops).unwrap();
    let monitor = workers.failures.clone();
    workers.stop();
    assert_eq!(monitor.failure(), None);
}

/// Accepting and taking connections over run in tasks of their own.
#[tokio::test]
async fn a_panic_in_a_task_of_a_worker_fails_the_worker() {
    let mut tasks = JoinSet::new();
    tasks.spawn(async { Ok(()) });
    tasks.spawn(async { panic!("on purpose") });
    let reason = first_failure(tasks).await;
    assert!(reason.contains("one of its tasks panicked"), "{reason}");
}
