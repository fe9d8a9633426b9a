//! The real binary as a child process.

use std::{
    ffi::OsString,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use super::{
    WAIT_LIMIT, eventually,
    netns::{PROXY_USER, Pod},
};

/// All listeners on ports that the system chooses; a test's configuration is merged over it.
const BASE: &str = r#"
[runtime]
drain_timeout = "5s"
[inbound]
listen = "127.0.0.1:0"
[outbound]
listen = "127.0.0.1:0"
[admin]
listen = "127.0.0.1:0"
"#;

/// As in a pod: the ports to which redirection leads.
const POD: &str = r#"
[runtime]
drain_timeout = "5s"
[inbound]
listen = "[::]:4143"
[outbound]
listen = "localhost:4140"
[admin]
listen = "localhost:4191"
probe_listen = "[::]:4192"
"#;

/// The binary under test; `OUTRIGGER_BIN` names another build of it (CI measures the release build).
pub fn binary() -> PathBuf {
    std::env::var_os("OUTRIGGER_BIN").map_or_else(|| env!("CARGO_BIN_EXE_outrigger").into(), PathBuf::from)
}

/// The same where every user can run it: a checkout may be in a directory that only its owner may enter.
pub fn binary_for_any_user() -> PathBuf {
    static COPY: OnceLock<PathBuf> = OnceLock::new();
    let open = |path: &Path| fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o001 != 0);
    let binary = binary();
    if binary.ancestors().all(open) {
        return binary;
    }
    let copied = || {
        let copy = std::env::temp_dir().join(format!("outrigger-under-test-{}", std::process::id()));
        fs::copy(&binary, &copy).expect("a copy of the binary");
        copy
    };
    COPY.get_or_init(copied).clone()
}

/// What to start and how.
#[derive(Default)]
pub struct Launch {
    config: String,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    /// Put before the binary: `unshare --pid …`.
    wrapper: Vec<OsString>,
    service: Vec<OsString>,
    in_pod: bool,
}

/// A running proxy. Dropping it stops it.
pub struct Proxy {
    child: Child,
    directory: TempDir,
    ready: Value,
}

impl Launch {
    pub fn new(config: impl Into<String>) -> Self {
        Self { config: config.into(), ..Self::default() }
    }

    /// An argument of `outrigger run`.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Runs the binary by another program.
    pub fn wrapped<I: Into<OsString>>(mut self, command: impl IntoIterator<Item = I>) -> Self {
        self.wrapper = command.into_iter().map(Into::into).collect();
        self
    }

    /// Runs it as the sidecar of a pod.
    pub fn in_pod(mut self, pod: &Pod) -> Self {
        self.in_pod = true;
        self.wrapped(pod.as_user(PROXY_USER)).arg("--redirected")
    }

    /// `run … -- COMMAND`.
    pub fn service<I: Into<OsString>>(mut self, command: impl IntoIterator<Item = I>) -> Self {
        self.service = command.into_iter().map(Into::into).collect();
        self
    }

    /// Starts it and waits until it is ready.
    #[track_caller]
    pub fn start(self) -> Proxy {
        let mut proxy = self.spawn();
        let ready = proxy.directory.path().join("ready.json");
        let begin = Instant::now();
        loop {
            if let Some(value) = fs::read(&ready).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
                proxy.ready = value;
                return proxy;
            }
            if let Some(status) = proxy.child.try_wait().expect("wait") {
                panic!("the proxy ended before it was ready: {status}\n{}", proxy.stderr());
            }
            assert!(begin.elapsed() < WAIT_LIMIT, "the proxy is not ready:\n{}", proxy.stderr());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts it, ready or not.
    pub fn spawn(self) -> Proxy {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = |name| directory.path().join(name);
        fs::write(path("base.toml"), if self.in_pod { POD } else { BASE }).expect("write");
        if self.in_pod {
            // It runs as another user.
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).expect("chmod");
        }
        fs::write(path("outrigger.toml"), &self.config).expect("write");
        let mut words = self.wrapper;
        words.push(if self.in_pod { binary_for_any_user() } else { binary() }.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg("run").arg("-c").arg(path("base.toml"));
        command.arg("-c").arg(path("outrigger.toml")).arg("--ready-file").arg(path("ready.json"));
        command.args(&self.arguments);
        if !self.service.is_empty() {
            command.arg("--").args(&self.service);
        }
        for (name, _) in std::env::vars_os() {
            let lower = name.to_string_lossy().to_ascii_lowercase();
            if lower.ends_with("_proxy") || lower.starts_with("otel_") || lower.starts_with("outrigger_") {
                command.env_remove(&name);
            }
        }
        command.envs(self.environment).current_dir(directory.path()).stdin(Stdio::null());
        command.stdout(fs::File::create(path("stdout")).expect("create"));
        command.stderr(fs::File::create(path("stderr")).expect("create"));
        let child = command.spawn().expect("the binary starts");
        Proxy { child, directory, ready: Value::Null }
    }
}

impl Proxy {
    /// Starts the proxy with this configuration and waits until it is ready.
    #[track_caller]
    pub fn start(config: impl Into<String>) -> Self {
        Launch::new(config).start()
    }

    #[track_caller]
    fn bound(&self, address: &Value, what: &str) -> SocketAddr {
        let text = address.as_str().unwrap_or_else(|| panic!("no {what} in the ready file: {}", self.ready));
        text.parse().unwrap_or_else(|_| panic!("{what} is no address in the ready file: {}", self.ready))
    }

    #[track_caller]
    pub fn outbound(&self) -> SocketAddr {
        self.bound(&self.ready["outbound"], "outbound")
    }

    #[track_caller]
    pub fn inbound(&self) -> SocketAddr {
        self.bound(&self.ready["inbound"], "inbound")
    }

    #[track_caller]
    pub fn admin(&self) -> SocketAddr {
        self.bound(&self.ready["admin"], "admin")
    }

    /// The address of the upstream's own `listen`.
    #[track_caller]
    pub fn upstream(&self, name: &str) -> SocketAddr {
        self.bound(&self.ready["upstreams"][name], name)
    }

    pub fn ready(&self) -> &Value {
        &self.ready
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn stderr(&self) -> String {
        self.output("stderr")
    }

    pub fn stdout(&self) -> String {
        self.output("stdout")
    }

    fn output(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.path().join(name)).unwrap_or_default()).into_owned()
    }

    /// Replaces the configuration atomically, as an editor or a ConfigMap does.
    pub fn reconfigure(&self, config: &str) {
        let next = self.directory.path().join("outrigger.toml.next");
        fs::write(&next, config).expect("write");
        fs::rename(next, self.directory.path().join("outrigger.toml")).expect("rename");
    }

    /// `TERM`, `HUP`, …
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Waits for its exit.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the proxy's end", || {
            status = self.child.try_wait().expect("wait");
            status.is_some()
        });
        status.expect("an exit status")
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// CPU time of its running threads.
    #[track_caller]
    pub fn cpu_time(&self) -> Duration {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("/proc");
        let nanoseconds = threads.map(|thread| {
            let spent = fs::read_to_string(thread.expect("/proc").path().join("schedstat")).expect("/proc");
            spent.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
        });
        Duration::from_nanos(nanoseconds.sum())
    }

    /// Resident memory, KiB.
    #[track_caller]
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("/proc");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
    }
}

/// Sends a signal to one process.
pub fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).stderr(Stdio::null()).status();
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if self.is_running() {
            self.signal("TERM");
            let begin = Instant::now();
            while self.is_running() && begin.elapsed() < Duration::from_secs(2) {
                thread::sleep(Duration::from_millis(5));
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if thread::panicking() {
            eprintln!("--- the proxy's log\n{}---", self.stderr());
        }
    }
}
