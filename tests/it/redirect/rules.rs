//! The kernel rules: present once, removed again; and which connections they redirect.

use std::{
    net::{SocketAddr, TcpStream},
    process::Output,
    time::Duration,
};

use crate::support::{
    RawServer, eventually, has_tool,
    netns::{Lan, PROXY_USER, Pod},
    skip, tool,
};

const MORE: [&str; 6] = [
    "--skip-inbound-ports",
    "22,9000-9010",
    "--skip-outbound-ports",
    "25",
    "--skip-outbound-cidrs",
    "10.77.0.99/32,fd77::99/128",
];

fn stderr_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn applying_rules_is_idempotent_and_clearing_restores() {
    let Some(lan) = Lan::new() else { return };
    let pod = lan.pod();
    pod.command(0, &["nft", "add table inet others { chain c { type nat hook output priority 50; } ; }"]);
    let before = pod.rules();
    assert!(before.contains("others"), "{before}");
    pod.redirected(&["apply", "--skip-outbound-ports", "1-65535"]);
    let apply: Vec<&str> = ["apply"].into_iter().chain(MORE).collect();
    pod.redirected(&apply);
    let once = pod.rules();
    pod.redirected(&apply);
    assert_eq!(pod.rules(), once);
    assert!(once.contains("tcp dport 9000-9010 accept") && !once.contains("65535"), "{once}");
    pod.redirected(&["clear"]);
    assert_eq!(pod.rules(), before);
    pod.redirected(&["clear"]);
}

/// What netlink writes equals what `nft` makes of the printed rules.
#[test]
fn printed_rules_equal_applied_rules() {
    let Some(lan) = Lan::new() else { return };
    let pod = lan.pod();
    pod.redirected(&["apply"].into_iter().chain(MORE).collect::<Vec<_>>());
    let applied = pod.rules();
    let printed = pod.redirect(&["print"].into_iter().chain(MORE).collect::<Vec<_>>());
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("rules.nft");
    std::fs::write(&file, &printed.stdout).expect("write");
    // Twice: it replaces existing rules.
    for _ in 0..2 {
        let loaded = pod.command(0, &["nft", "-f", file.to_str().expect("a path")]);
        assert!(loaded.status.success(), "{}", stderr_of(&loaded));
        assert_eq!(pod.rules(), applied);
    }
}

#[test]
fn iptables_rules_are_applied_once_and_cleared() {
    let Some(lan) = Lan::new() else { return };
    if !has_tool(&["iptables", "ip6tables-restore"]) {
        return;
    }
    let pod = lan.pod();
    let saved =
        |program| String::from_utf8(pod.command(0, &[program, "-t", "nat", "-S"]).stdout).expect("text");
    let before = [saved("iptables"), saved("ip6tables")];
    let apply: Vec<&str> = ["apply", "--backend", "iptables"].into_iter().chain(MORE).collect();
    pod.redirected(&apply);
    let once = [saved("iptables"), saved("ip6tables")];
    pod.redirected(&apply);
    assert_eq!([saved("iptables"), saved("ip6tables")], once);
    assert!(once[0].contains("-d 10.77.0.99/32") && once[1].contains("-d fd77::99/128"), "{once:?}");
    assert_redirected(&lan, &pod);
    pod.redirected(&["clear"]);
    assert_eq!([saved("iptables"), saved("ip6tables")], before);
}

#[test]
fn connections_are_redirected_both_ways_except_the_proxys_own() {
    let Some(lan) = Lan::new() else { return };
    let pod = lan.pod();
    assert_redirected(&lan, &pod);
}

/// Two servers on the proxy's two ports, which say which one they are.
fn assert_redirected(lan: &Lan, pod: &Pod) {
    let by_iptables = pod.rules().contains("OUTRIGGER");
    if !by_iptables {
        pod.redirected(&["apply"].into_iter().chain(MORE).collect::<Vec<_>>());
    }
    let other = lan.pod();
    let say = |word: &'static str| {
        move |mut stream: TcpStream| {
            use std::io::Write;
            let _ = stream.write_all(word.as_bytes());
        }
    };
    let at = |address: &str| -> SocketAddr { address.parse().expect("an address") };
    let servers = pod.run(|| {
        [
            RawServer::start_at(at("127.0.0.1:4140"), say("outbound")),
            RawServer::start_at(at("[::1]:4140"), say("outbound")),
            RawServer::start_at(at("[::]:4143"), say("inbound")),
            RawServer::start_at(at("[::]:8080"), say("service")),
            RawServer::start_at(at("[::]:9005"), say("skipped")),
        ]
    });
    let others = other.run(|| {
        [RawServer::start_at(at("[::]:80"), say("other")), RawServer::start_at(at("[::]:25"), say("mail"))]
    });
    let ask = |address: SocketAddr| {
        use std::io::Read;
        let mut said = String::new();
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10));
        stream
            .and_then(|mut stream| stream.read_to_string(&mut said))
            .map(|_| said)
            .map_err(|error| error.kind())
    };
    for family in 0..2 {
        let there = |port| other.addresses(port)[family];
        let here = |port| pod.addresses(port)[family];
        // Outbound from the pod.
        assert_eq!(pod.run(|| ask(there(80))).as_deref(), Ok("outbound"));
        assert_eq!(pod.run(|| ask(there(25))).as_deref(), Ok("mail"), "a port that is skipped");
        assert_eq!(pod.run(|| ask(here(8080))).as_deref(), Ok("service"), "what stays in the pod");
        // Inbound to the pod.
        assert_eq!(other.run(|| ask(here(8080))).as_deref(), Ok("inbound"));
        assert_eq!(other.run(|| ask(here(9005))).as_deref(), Ok("skipped"));
        // By the proxy's user.
        let target = there(80).to_string().replace("[", "").replace("]", "");
        let (ip, port) = target.rsplit_once(':').expect("a port");
        let own = pod.command(PROXY_USER, &["ncat", "--recv-only", ip, port]);
        assert_eq!(String::from_utf8_lossy(&own.stdout), "other", "{}", stderr_of(&own));
    }
    // Link-local: redirected to the loopback address it would never arrive.
    let device = other.command(0, &["ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"]);
    let device = String::from_utf8_lossy(&device.stdout).into_owned();
    let link_local = device.split_whitespace().find(|word| word.starts_with("fe80:")).expect("an address");
    let link_local = format!("{}%eth0", link_local.split('/').next().expect("an address"));
    eventually("the link-local address can be called", || {
        let said = pod.command(0, &["ncat", "-w", "5", "--recv-only", &link_local, "80"]);
        String::from_utf8_lossy(&said.stdout) == "other"
    });
    // Nothing listens: refused, not bypassed.
    pod.run(|| drop(servers));
    let refused = |response| response == Err(std::io::ErrorKind::ConnectionRefused);
    for family in 0..2 {
        eventually("a refusal of the pod's", || refused(pod.run(|| ask(other.addresses(80)[family]))));
        eventually("a refusal of others", || refused(other.run(|| ask(pod.addresses(8080)[family]))));
    }
    other.run(|| drop(others));
}

#[test]
fn skipped_networks_bypass_the_proxy() {
    let Some(lan) = Lan::new() else { return };
    if !has_tool(&["iptables", "ip6tables-restore"]) {
        return;
    }
    let (pod, skipped, other) = (lan.pod(), lan.pod(), lan.pod());
    let [v4, v6] = skipped.addresses(80).map(|address| address.ip());
    let networks = format!("{v4}/32,{v6}/128");
    let there = |pod: &Pod| pod.run(|| RawServer::start_at("[::]:80".parse().expect("an address"), |_| {}));
    let _servers = [there(&skipped), there(&other)];
    for backend in ["nftables", "iptables"] {
        pod.redirected(&["apply", "--backend", backend, "--skip-outbound-cidrs", &networks]);
        for family in 0..2 {
            let call = |to: &Pod| pod.run(|| TcpStream::connect(to.addresses(80)[family]).map(drop));
            call(&skipped).expect("past the proxy, which does not run");
            let led = call(&other).map_err(|error| error.kind());
            assert_eq!(led, Err(std::io::ErrorKind::ConnectionRefused), "by {backend}");
        }
        pod.redirected(&["clear", "--backend", backend]);
    }
}

#[test]
fn missing_privileges_are_reported() {
    let Some(lan) = Lan::new() else { return };
    let pod = lan.pod();
    let binary = crate::support::binary_for_any_user();
    let output = pod.command(1000, &[binary.to_str().expect("a path"), "redirect", "apply"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr_of(&output).contains("NET_ADMIN"), "{}", stderr_of(&output));
    let output = pod.redirect(&["apply", "--skip-inbound-ports", "http"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr_of(&output).contains("`http` is neither a port"), "{}", stderr_of(&output));
    assert_eq!(pod.rules(), "");
}

/// Run by an unprivileged user, who can change nothing: this is the network of the machine that runs the tests.
#[test]
fn the_host_network_is_refused_unless_requested() {
    if !std::path::Path::new("/proc/sys/net/core/netdev_max_backlog").exists() {
        return skip("this is no initial network namespace");
    }
    if !rustix::process::geteuid().is_root() || !has_tool(&["setpriv"]) {
        return skip("root becomes another user for this");
    }
    let apply = |more: &[&str]| {
        let binary = crate::support::binary_for_any_user();
        let mut command = std::process::Command::new(tool("setpriv").expect("checked before"));
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"]);
        command.arg(binary).args(["redirect", "apply"]).args(more).output().expect("it runs")
    };
    let refused = apply(&[]);
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr_of(&refused);
    for part in
        ["network of the host", "--host", "port 4143", "user 4140, to port 4140", "Nothing was changed"]
    {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
    let meant = apply(&["--host"]);
    assert!(
        stderr_of(&meant).contains("NET_ADMIN") && !stderr_of(&meant).contains("network of the host"),
        "{meant:?}"
    );
}

/// An earlier rule of other software makes ours ineffective: that is detected at once.
#[test]
fn ineffective_rules_are_detected() {
    let Some(lan) = Lan::new() else { return };
    let pod = lan.pod();
    let first = "add table ip first { chain c { type filter hook output priority -300; tcp dport 4144 reject with tcp reset; } ; }";
    let output = pod.command(0, &["nft", first]);
    assert!(output.status.success(), "{}", stderr_of(&output));
    let output = pod.redirect(&["apply"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr_of(&output).contains("did not reach port 4140"), "{}", stderr_of(&output));
}
