//! A sidecar as a child process of the same binary.

use std::{
    fs::{self, File},
    io,
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal};
use tokio::time::{Instant, sleep};

use super::DemoError;

const TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);

/// A temporary directory, removed when this is dropped.
#[derive(Debug)]
pub struct TemporaryDirectory(PathBuf);

impl TemporaryDirectory {
    pub fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("outrigger-demo-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A child process. Dropping this sends SIGTERM and waits for its end.
#[derive(Debug)]
struct Process(Child);

/// A running sidecar.
#[derive(Debug)]
pub struct Sidecar {
    name: &'static str,
    process: Process,
    config: PathBuf,
    log: PathBuf,
    pub inbound: SocketAddr,
    pub outbound: SocketAddr,
    pub admin: SocketAddr,
}

impl Sidecar {
    /// Starts it and waits until it is ready.
    pub async fn start(
        folder: &Path,
        name: &'static str,
        config: &str,
        otlp: Option<&str>,
    ) -> Result<Self, DemoError> {
        let path = |kind: &str| folder.join(format!("{name}.{kind}"));
        let (config_file, log, ready) = (path("toml"), path("log"), path("ready"));
        fs::write(&config_file, config)?;
        let child = Command::new(std::env::current_exe()?)
            .args(["run", "--log", "info", "-c"])
            .arg(&config_file)
            .arg("--ready-file")
            .arg(&ready)
            .env_remove("OUTRIGGER_LOG")
            .envs(otlp.map(|url| ("OTEL_EXPORTER_OTLP_ENDPOINT", url)))
            .envs(otlp.map(|_| ("OTEL_TRACES_SAMPLER", "always_on")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            // Ctrl-C goes to the demo only, which stops its sidecars itself.
            .process_group(0)
            .spawn()?;
        let mut process = Process(child);
        let failed = |what: String| DemoError::Sidecar {
            name,
            what,
            log: fs::read_to_string(&log).unwrap_or_default(),
        };
        let begin = Instant::now();
        let ready = loop {
            if let Ok(text) = fs::read_to_string(&ready)
                && let Ok(ready) = serde_json::from_str::<serde_json::Value>(&text)
            {
                break ready;
            }
            if let Some(status) = process.0.try_wait()? {
                return Err(failed(format!("ended: {status}")));
            }
            if begin.elapsed() > TIMEOUT {
                return Err(failed(format!("was not ready within {TIMEOUT:?}")));
            }
            sleep(POLL).await;
        };
        let bound = |what: &str| {
            let text = ready[what].as_str().unwrap_or_default();
            text.parse().map_err(|_| failed(format!("reported no address for {what}: {ready}")))
        };
        let (inbound, outbound, admin) = (bound("inbound")?, bound("outbound")?, bound("admin")?);
        Ok(Self { name, process, config: config_file, log, inbound, outbound, admin })
    }

    /// Replaces the configuration file and sends SIGHUP.
    pub fn reconfigure(&self, config: &str) -> io::Result<()> {
        fs::write(&self.config, config)?;
        self.process.signal(Signal::HUP);
        Ok(())
    }

    pub fn terminate(&self) {
        self.process.signal(Signal::TERM);
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> Result<ExitStatus, DemoError> {
        let begin = Instant::now();
        while begin.elapsed() < TIMEOUT {
            if let Some(status) = self.process.0.try_wait()? {
                return Ok(status);
            }
            sleep(POLL).await;
        }
        let what = format!("did not end within {TIMEOUT:?}");
        Err(DemoError::Sidecar { name: self.name, what, log: self.log() })
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Process {
    fn signal(&self, signal: Signal) {
        // Not reaped yet, so the process ID still belongs to it; signalling an ended process has no effect.
        let _ = rustix::process::kill_process(Pid::from_child(&self.0), signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // SIGTERM, so that it removes its token file; drain_timeout bounds the wait.
            self.signal(Signal::TERM);
            let _ = self.0.wait();
        }
    }
}
