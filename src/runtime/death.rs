//! A thread or task that must live as long as the process, and did not.
//!
//! A worker that has panicked would leave a hole: its connections hang, and new ones are drawn into it. So the process
//! ends with an error instead, and whoever runs it starts another.

use std::sync::{Arc, OnceLock};

use tokio::sync::{Mutex, mpsc};

/// Deaths that are kept until somebody looks. One is enough.
const KEPT: usize = 16;

/// What has died, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    pub name: String,
    pub why: String,
}

/// Where deaths are reported to.
#[derive(Clone, Debug)]
pub struct Deaths {
    report: mpsc::Sender<Death>,
    reports: Arc<Mutex<mpsc::Receiver<Death>>>,
    /// The first one, from the moment it happens.
    happened: Arc<OnceLock<Death>>,
}

impl Default for Deaths {
    fn default() -> Self {
        let (report, reports) = mpsc::channel(KEPT);
        Self { report, reports: Arc::new(Mutex::new(reports)), happened: Arc::default() }
    }
}

impl Deaths {
    /// Watches over a thread or task for as long as it holds this.
    pub fn keep(&self, name: &str) -> Vigil {
        let happened = Arc::clone(&self.happened);
        Vigil { name: name.to_owned(), report: Some((self.report.clone(), happened)) }
    }

    /// The first death, if there was one. The process ends soon after it.
    pub fn happened(&self) -> Option<&Death> {
        self.happened.get()
    }

    /// Waits for the first death.
    pub async fn first(&self) -> Death {
        match self.reports.lock().await.recv().await {
            Some(death) => death,
            // There is a sender in `self`.
            None => std::future::pending().await,
        }
    }
}

/// Reports a death if it is dropped, as by a panic, before its end.
#[derive(Debug)]
pub struct Vigil {
    name: String,
    report: Option<(mpsc::Sender<Death>, Arc<OnceLock<Death>>)>,
}

impl Vigil {
    /// It has ended: as it was told to, or of an error.
    pub fn end(mut self, ended: Result<(), String>) {
        match ended {
            Ok(()) => self.report = None,
            Err(why) => self.tell(why),
        }
    }

    fn tell(&mut self, why: String) {
        if let Some((report, happened)) = self.report.take() {
            let death = Death { name: std::mem::take(&mut self.name), why };
            // Both know of an earlier one, which is enough, where they take no more.
            let _ = happened.set(death.clone());
            let _ = report.try_send(death);
        }
    }
}

impl Drop for Vigil {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell("it panicked".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_thread_that_panics_is_missed() {
        let deaths = Deaths::default();
        let vigil = deaths.keep("worker-0");
        let thread = std::thread::spawn(move || {
            let _vigil = vigil;
            panic!("on purpose");
        });
        assert!(thread.join().is_err());
        let death = Death { name: "worker-0".to_owned(), why: "it panicked".to_owned() };
        assert_eq!(deaths.happened(), Some(&death), "known before anything waits for it");
        assert_eq!(deaths.first().await, death);
    }

    #[tokio::test]
    async fn a_task_that_panics_is_missed() {
        let deaths = Deaths::default();
        let vigil = deaths.keep("tick");
        let task = tokio::spawn(async move {
            let _vigil = vigil;
            panic!("on purpose");
        });
        assert!(task.await.is_err());
        assert_eq!(deaths.first().await.name, "tick");
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_is_no_death_and_an_error_is_one() {
        let deaths = Deaths::default();
        deaths.keep("ends").end(Ok(()));
        let aborted = tokio::spawn(std::future::pending::<Vigil>());
        aborted.abort();
        drop(deaths.keep("cut"));
        assert_eq!(deaths.happened(), None);
        deaths.keep("fails").end(Err("no more".to_owned()));
        assert_eq!(deaths.first().await, Death { name: "fails".to_owned(), why: "no more".to_owned() });
        let more = tokio::time::timeout(std::time::Duration::from_secs(1), deaths.first());
        assert!(more.await.is_err());
    }
}
