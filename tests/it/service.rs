//! `run -- CMD`: signals that are meant for CMD, the service's exit with its sidecar's, and the wait for its port.

use std::{fs, net::TcpListener, path::Path, process::Command, process::Output};

use crate::support::{Launch, Proxy, RawClient, Upstream, binary, eventually, free_port, signal, text};

fn shell(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// A service that prints its PID and then the signals that it gets.
fn listening() -> Proxy {
    let script = "for s in QUIT USR1 USR2 WINCH; do trap \"echo got $s\" $s; done; echo pid $$; while :; do sleep 0.02; done";
    let proxy = Launch::new("").service(shell(script)).start();
    eventually("the service to be up", || proxy.stdout().contains("pid "));
    proxy
}

fn pid_of(proxy: &Proxy) -> u32 {
    let said = proxy.stdout();
    let number = said.lines().find_map(|line| line.strip_prefix("pid "));
    number.and_then(|number| number.trim().parse().ok()).expect("its number")
}

/// `R`, `S`, `T`, …; none if the process does not exist.
fn state_of(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next().filter(|state| *state != 'Z')
}

#[test]
fn terminating_signals_are_forwarded_to_the_service() {
    let mut proxy = listening();
    for name in ["USR1", "USR2", "WINCH", "QUIT"] {
        proxy.signal(name);
        eventually(name, || proxy.stdout().contains(&format!("got {name}")));
        assert!(proxy.is_running(), "ended by SIG{name}");
    }
    // Once more during the drain, and then during the shutdown.
    let count = |proxy: &Proxy| proxy.stdout().matches("got USR1").count();
    proxy.signal("USR1");
    eventually("a second one", || count(&proxy) == 2);
    proxy.signal("TERM");
    let pid = pid_of(&proxy);
    proxy.wait();
    assert_eq!(state_of(pid), None);
}

/// An image with `STOPSIGNAL SIGQUIT` (nginx) or `SIGWINCH` (httpd): drain, signal, exit code.
#[test]
fn an_images_stop_signal_drains_inbound_first_and_the_exit_code_is_the_services() {
    for name in ["QUIT", "WINCH"] {
        let server = Upstream::http1(|_| async { text("ok") });
        let script = format!("trap 'echo signalled; exit 9' {name}; echo up; while :; do sleep 0.02; done");
        let config =
            format!("[runtime]\ndrain_delay = \"300ms\"\n[inbound]\nforward_to = \"{}\"\n", server.address());
        let mut proxy = Launch::new(config).wrapped(["setsid"]).service(shell(&script)).start();
        eventually("the service to be up", || proxy.stdout().contains("up"));
        let mut client = RawClient::connect(proxy.inbound());
        let get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        assert_eq!(client.ask(get).field("connection"), None);
        proxy.signal(name);
        eventually("the drain", || {
            let response = RawClient::connect(proxy.inbound()).ask(get);
            response.field("connection") == Some("close")
        });
        assert!(!proxy.stdout().contains("signalled"), "before inbound has drained");
        assert_eq!(proxy.wait().code(), Some(9), "{name}: {}", proxy.stderr());
        assert!(proxy.stdout().contains("signalled"));
    }
}

/// The kernel sends SIGWINCH to all foreground processes of a terminal that is resized.
#[test]
fn a_terminal_resize_does_not_drain() {
    // The other end of the terminal stays open in the sidecar itself.
    let on_terminal = "import fcntl, os, sys, termios\nos.setsid()\nfar, near = os.openpty()\n\
                       fcntl.ioctl(near, termios.TIOCSCTTY, 0)\nos.set_inheritable(far, True)\nos.execvp(sys.argv[1], sys.argv[1:])";
    let server = Upstream::http1(|_| async { text("ok") });
    let config =
        format!("[runtime]\ndrain_delay = \"2m\"\n[inbound]\nforward_to = \"{}\"\n", server.address());
    let script = "trap 'echo resized' WINCH; echo up; while :; do sleep 0.02; done";
    let wrapper = ["python3", "-c", on_terminal];
    let mut proxy = Launch::new(config).wrapped(wrapper).service(shell(script)).start();
    eventually("the service to be up", || proxy.stdout().contains("up"));
    proxy.signal("WINCH");
    eventually("the service to get the signal", || proxy.stdout().contains("resized"));
    let response = RawClient::connect(proxy.inbound()).ask("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((response.status(), response.field("connection")), (200, None));
    assert!(proxy.is_running());
}

#[test]
fn stop_and_continue_apply_to_service_and_sidecar() {
    let proxy = listening();
    let pid = pid_of(&proxy);
    proxy.signal("TSTP");
    eventually("both to be stopped", || state_of(pid) == Some('T') && state_of(proxy.pid()) == Some('T'));
    proxy.signal("CONT");
    eventually("both to go on", || state_of(pid) != Some('T') && state_of(proxy.pid()) != Some('T'));
}

/// The sidecar alone: signals whose default action would kill it silently.
#[test]
fn a_sidecar_without_a_service_drains_on_sigquit_and_ignores_other_signals() {
    let mut proxy = Proxy::start("");
    for name in ["USR1", "USR2"] {
        proxy.signal(name);
        eventually("a word on it", || proxy.stderr().contains(&format!("SIG{name}")));
    }
    assert!(proxy.is_running());
    proxy.signal("QUIT");
    assert_eq!(proxy.wait().code(), Some(0), "{}", proxy.stderr());
}

#[test]
fn the_service_ends_with_a_killed_sidecar() {
    let script = "trap '' TERM HUP INT; echo pid $$; while :; do sleep 0.02; done";
    let mut proxy = Launch::new("").service(shell(script)).start();
    eventually("the service to be up", || proxy.stdout().contains("pid "));
    let pid = pid_of(&proxy);
    let parent = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let parent = parent.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)).map(str::to_owned);
    assert_eq!(parent, Some(proxy.pid().to_string()), "nothing stands between them");
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).expect("it runs");
    assert_eq!(name.trim(), "sh", "it is the service, by its own name");
    proxy.signal("KILL");
    proxy.wait();
    eventually("the service's end", || state_of(pid).is_none());
}

#[test]
fn the_internal_exec_command_requires_its_parent() {
    let orphan = Command::new(binary()).args(["exec-service", "--parent", "1", "--", "true"]).output();
    let orphan = orphan.expect("it runs");
    assert_eq!(orphan.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&orphan.stderr).contains("has ended"), "{orphan:?}");
    let script = format!("exec {} exec-service --parent $PPID -- /dev/null", binary().display());
    let output = Command::new("sh").args(["-c", &script]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(126), "{output:?}");
    let help = Command::new(binary()).arg("--help").output().expect("it runs");
    assert!(!String::from_utf8_lossy(&help.stdout).contains("exec-service"));
}

/// The file exists but cannot be executed: only exec reports that.
#[test]
fn a_service_with_a_missing_interpreter_is_reported() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("service");
    fs::write(&file, "#!/no/such/interpreter\n").expect("write");
    let executable = Command::new("chmod").arg("755").arg(&file).status().expect("chmod");
    assert!(executable.success());
    let mut proxy = Launch::new("").service([file.as_path()]).spawn();
    assert_eq!(proxy.wait().code(), Some(127), "{}", proxy.stderr());
    assert!(proxy.stderr().contains("the interpreter in its first line"), "{}", proxy.stderr());
}

fn wait_for(proxy: &Proxy, patience: &str) -> Output {
    let admin = proxy.admin().to_string();
    Command::new(binary()).args(["status", "--admin", &admin, "--wait", patience]).output().expect("it runs")
}

#[test]
fn status_waits_until_the_service_listens() {
    let port = free_port();
    let go = tempfile::tempdir().expect("a folder");
    let go = go.path().join("go");
    let listen = python_that_listens(&go, port);
    let Some(listen) = listen else { return };
    let proxy = Launch::new("").arg("--app").arg(port.to_string()).service(listen).start();
    let early = wait_for(&proxy, "300ms");
    assert_eq!(early.status.code(), Some(1), "{early:?}");
    let printed = String::from_utf8_lossy(&early.stderr).into_owned();
    assert!(printed.contains(&format!("127.0.0.1:{port}")) && printed.contains("--app"), "{printed}");
    let ready = RawClient::connect(proxy.admin()).ask("GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(ready.status(), 200, "readiness never waits for the service");
    let admin = proxy.admin().to_string();
    let shown = Command::new(binary()).args(["status", "--admin", &admin]).output().expect("it runs");
    assert!(String::from_utf8_lossy(&shown.stdout).contains("NOTHING ACCEPTS"), "{shown:?}");
    fs::write(&go, "").expect("write");
    let late = wait_for(&proxy, "60s");
    assert!(late.status.success(), "{late:?}");
}

/// Listens once a file exists.
fn python_that_listens(go: &Path, port: u16) -> Option<Vec<String>> {
    let python = crate::support::tool("python3")?;
    let script = format!(
        "import os,time,socket\nwhile not os.path.exists({:?}): time.sleep(0.02)\ns=socket.socket(); s.setsockopt(1,2,1); s.bind(('127.0.0.1',{port})); s.listen()\nwhile True: s.accept()",
        go.display()
    );
    Some(vec![python.display().to_string(), "-c".to_owned(), script])
}

/// A service that the sidecar did not start: as in a pod without native sidecars, whose containers start only when the
/// sidecar's hook has returned.
#[test]
fn status_wait_without_a_service_waits_for_the_sidecar_only() {
    let proxy = Proxy::start("");
    let waited = wait_for(&proxy, "10s");
    assert!(waited.status.success(), "{waited:?}");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let proxy = Launch::new("").arg("--app").arg(port.to_string()).start();
    assert!(wait_for(&proxy, "10s").status.success());
    signal(proxy.pid(), "TERM");
}
