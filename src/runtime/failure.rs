//! Failures of threads and tasks that must live as long as the process.
//!
//! After a panic of a worker its connections would hang, and new ones would still be assigned to it. So the process
//! ends with an error, and its supervisor restarts it.

use std::sync::{Arc, OnceLock};

use tokio::sync::{Mutex, mpsc};

/// Capacity of the channel of failures. One would be enough.
const CAPACITY: usize = 16;

/// A thread or task that failed, and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CriticalFailure {
    pub name: String,
    pub reason: String,
}

/// Collects the failures of critical threads and tasks.
#[derive(Clone, Debug)]
pub struct FailureMonitor {
    report: mpsc::Sender<CriticalFailure>,
    reports: Arc<Mutex<mpsc::Receiver<CriticalFailure>>>,
    /// The first failure, set when it happens.
    failure: Arc<OnceLock<CriticalFailure>>,
}

impl Default for FailureMonitor {
    fn default() -> Self {
        let (report, reports) = mpsc::channel(CAPACITY);
        Self { report, reports: Arc::new(Mutex::new(reports)), failure: Arc::default() }
    }
}

impl FailureMonitor {
    /// Returns a guard for a thread or task to hold while it runs.
    pub fn guard(&self, name: &str) -> FailureGuard {
        let failure = Arc::clone(&self.failure);
        FailureGuard { name: name.to_owned(), report: Some((self.report.clone(), failure)) }
    }

    /// The first failure, if there was one. The process ends soon after it.
    pub fn failure(&self) -> Option<&CriticalFailure> {
        self.failure.get()
    }

    /// Waits for the first failure.
    pub async fn wait(&self) -> CriticalFailure {
        match self.reports.lock().await.recv().await {
            Some(failure) => failure,
            // Unreachable: `self` holds a sender.
            None => std::future::pending().await,
        }
    }
}

/// Reports a failure if a panic drops it before [`Self::finish`].
#[derive(Debug)]
pub struct FailureGuard {
    name: String,
    report: Option<(mpsc::Sender<CriticalFailure>, Arc<OnceLock<CriticalFailure>>)>,
}

impl FailureGuard {
    /// The thread or task has ended, regularly or by an error.
    pub fn finish(mut self, result: Result<(), String>) {
        match result {
            Ok(()) => self.report = None,
            Err(reason) => self.report_failure(reason),
        }
    }

    fn report_failure(&mut self, why: String) {
        if let Some((report, first)) = self.report.take() {
            let failure = CriticalFailure { name: std::mem::take(&mut self.name), reason: why };
            // Either may be full already; the first failure is enough.
            let _ = first.set(failure.clone());
            let _ = report.try_send(failure);
        }
    }
}

impl Drop for FailureGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.report_failure("it panicked".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_of_a_thread_is_reported() {
        let monitor = FailureMonitor::default();
        let guard = monitor.guard("worker-0");
        let thread = std::thread::spawn(move || {
            let _guard = guard;
            panic!("on purpose");
        });
        assert!(thread.join().is_err());
        let failure = CriticalFailure { name: "worker-0".to_owned(), reason: "it panicked".to_owned() };
        assert_eq!(monitor.failure(), Some(&failure), "known before anything waits for it");
        assert_eq!(monitor.wait().await, failure);
    }

    #[tokio::test]
    async fn a_panic_of_a_task_is_reported() {
        let monitor = FailureMonitor::default();
        let guard = monitor.guard("tick");
        let task = tokio::spawn(async move {
            let _guard = guard;
            panic!("on purpose");
        });
        assert!(task.await.is_err());
        assert_eq!(monitor.wait().await.name, "tick");
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_is_reported_and_a_regular_end_is_not() {
        let monitor = FailureMonitor::default();
        monitor.guard("ends").finish(Ok(()));
        let aborted = tokio::spawn(std::future::pending::<FailureGuard>());
        aborted.abort();
        drop(monitor.guard("cut"));
        assert_eq!(monitor.failure(), None);
        monitor.guard("fails").finish(Err("no more".to_owned()));
        assert_eq!(
            monitor.wait().await,
            CriticalFailure { name: "fails".to_owned(), reason: "no more".to_owned() }
        );
        let more = tokio::time::timeout(std::time::Duration::from_secs(1), monitor.wait());
        assert!(more.await.is_err());
    }
}
