//! Network namespaces that represent pods: each with its own network, all on one bridge, IPv4 and IPv6.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{binary, has_tool, skip, tool};

/// The proxy's user in a pod.
pub const PROXY_USER: u32 = 4140;

/// A bridge in its own namespace, which is removed with the last of its pods.
pub struct Lan(Arc<Namespace>, AtomicU8);

/// A namespace on the bridge.
pub struct Pod {
    namespace: Namespace,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    _lan: Arc<Namespace>,
}

struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("or{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        Self(name)
    }

    fn ip(&self, arguments: &str) {
        let words: Vec<&str> = ["-n", &self.0].into_iter().chain(arguments.split_whitespace()).collect();
        ip(&words);
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new(tool("ip").unwrap_or_default()).args(["netns", "del", &self.0]).status();
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new(tool("ip").expect("ip")).args(arguments).output().expect("ip runs");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Lan {
    /// None if the machine does not allow it; then the test reports that it is skipped.
    #[track_caller]
    pub fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip("network namespaces are made by root");
            return None;
        }
        if !has_tool(&["ip", "nft", "setpriv"]) {
            return None;
        }
        let lan = Namespace::new();
        lan.ip("link add bridge0 type bridge");
        lan.ip("addr add 10.77.0.1/24 dev bridge0");
        lan.ip("addr add fd77::1/64 dev bridge0 nodad");
        lan.ip("link set bridge0 up");
        Some(Self(Arc::new(lan), AtomicU8::new(10)))
    }

    pub fn pod(&self) -> Pod {
        let number = self.1.fetch_add(1, Ordering::Relaxed);
        let (v4, v6) =
            (Ipv4Addr::new(10, 77, 0, number), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into()));
        let namespace = Namespace::new();
        let lan = &self.0.0;
        namespace.ip(&format!("link add eth0 type veth peer name veth{number} netns {lan}"));
        self.0.ip(&format!("link set veth{number} master bridge0 up"));
        namespace.ip(&format!("addr add {v4}/24 dev eth0"));
        namespace.ip(&format!("addr add {v6}/64 dev eth0 nodad"));
        namespace.ip("link set eth0 up");
        namespace.ip("route add default via 10.77.0.1");
        namespace.ip("-6 route add default via fd77::1");
        Pod { namespace, v4, v6, _lan: Arc::clone(&self.0) }
    }
}

impl Pod {
    pub fn addresses(&self, port: u16) -> [SocketAddr; 2] {
        [(IpAddr::from(self.v4), port).into(), (IpAddr::from(self.v6), port).into()]
    }

    /// Runs a closure on a thread in the pod; its sockets and processes stay there.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let file = fs::File::open(format!("/run/netns/{}", self.namespace.0)).expect("the namespace");
        thread::scope(|scope| {
            let entered = scope.spawn(|| {
                use std::os::fd::AsFd;
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("root");
                inside()
            });
            match entered.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// The command prefix that runs a command in the pod as a user.
    pub fn as_user(&self, user: u32) -> Vec<String> {
        let user = user.to_string();
        let words = ["ip", "netns", "exec", &self.namespace.0, "setpriv", "--reuid", &user, "--regid", &user];
        words.into_iter().map(str::to_owned).chain(["--clear-groups".to_owned()]).collect()
    }

    /// Runs a command in the pod as a user, to its end.
    pub fn command(&self, user: u32, words: &[&str]) -> Output {
        let before = self.as_user(user);
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new(tool(&before[0]).expect("ip"));
        command.args(&before[1..]).args(words).env("PATH", path).output().expect("it runs")
    }

    /// `outrigger redirect …` as its init container does.
    pub fn redirect(&self, arguments: &[&str]) -> Output {
        let binary = binary();
        let words: Vec<&str> = [binary.to_str().expect("a path"), "redirect"]
            .into_iter()
            .chain(arguments.iter().copied())
            .collect();
        self.command(0, &words)
    }

    /// The same; it must succeed.
    #[track_caller]
    pub fn redirected(&self, arguments: &[&str]) {
        let output = self.redirect(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// All rules of the pod's kernel.
    pub fn rules(&self) -> String {
        String::from_utf8(self.command(0, &["nft", "list", "ruleset"]).stdout).expect("text")
    }
}
