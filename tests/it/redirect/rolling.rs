//! A service of three replicas that are replaced one after the other as the kubelet does it, under constant load.

use std::{
    io::Write,
    process::{Command, Stdio},
    thread,
};

use super::pods::{at, pki, service, sidecar};
use crate::support::{
    Proxy, RawClient, Upstream, binary_for_any_user, has_tool,
    netns::{Lan, PROXY_USER, Pod},
    pki::{Pki, id},
    text, tool,
};

const REPLICAS: usize = 3;

/// `OUTRIGGER_ROUNDS` for fewer.
fn restarts() -> usize {
    std::env::var("OUTRIGGER_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(100)
}

/// A pod: the service and its sidecar, in the order in which they end.
struct Replica {
    service: Upstream,
    sidecar: Proxy,
    pod: Pod,
}

impl Replica {
    fn start(lan: &Lan, pki: &Pki) -> Self {
        let pod = lan.pod();
        let config = format!(
            "{}[inbound]\nmtls = \"strict\"\n[runtime]\ndrain_delay = \"500ms\"\n",
            pki.section("payments")
        );
        let service = service(&pod, 8080, "payments");
        let sidecar = sidecar(&pod, &config);
        Self { service, sidecar, pod }
    }

    /// Ends a pod with a native sidecar as the kubelet does: the preStop hooks run at once; the service gets SIGTERM
    /// after its own hook; the sidecar when the service has exited. Meanwhile the service sends requests.
    fn end(mut self, database: &Pod) {
        let drain = self.pod.command(PROXY_USER, &[binary_for_any_user().to_str().expect("a path"), "drain"]);
        assert!(drain.status.success(), "{}", String::from_utf8_lossy(&drain.stderr));
        for _ in 0..40 {
            let address = database.addresses(5432)[0];
            let response = self.pod.run(|| {
                RawClient::connect(address)
                    .ask("GET / HTTP/1.1\r\nHost: database\r\nConnection: close\r\n\r\n")
            });
            assert_eq!(
                response.status(),
                200,
                "a request of a service that is about to exit: {}",
                response.text()
            );
            thread::sleep(std::time::Duration::from_millis(20));
        }
        drop(self.service);
        self.sidecar.signal("TERM");
        assert_eq!(self.sidecar.wait().code(), Some(0), "{}", self.sidecar.stderr());
    }
}

#[test]
#[ignore = "100 restarts; root"]
fn replacing_replicas_fails_no_request() {
    let Some(lan) = Lan::new() else { return };
    if !has_tool(&["h2load"]) {
        return;
    }
    let (front, database, pki) = (lan.pod(), lan.pod(), pki());
    let _database = database.run(|| Upstream::at(at(5432), false, |_, _| async { text("row") }));
    pki.identity("payments");
    let list = pki.path("endpoints.json");
    let publish = |replicas: &[Replica]| {
        let of = |replica: &Replica| replica.pod.addresses(8080).map(|address| address.to_string());
        let addresses: Vec<String> = replicas.iter().flat_map(of).collect();
        pki.write("endpoints.json", &serde_json::to_string(&addresses).expect("JSON"));
    };
    let mut replicas: Vec<Replica> = (0..REPLICAS).map(|_| Replica::start(&lan, &pki)).collect();
    publish(&replicas);
    let front_config = format!(
        "{}[[upstream]]\nname = \"payments\"\nendpoints = \"file://{}\"\ntls = \"mutual\"\nidentity = [\"{}\"]\n",
        pki.identity("front"),
        list.display(),
        id("payments"),
    );
    let front_sidecar = sidecar(&front, &front_config);
    let (mut done, mut total) = (0, 0);
    while done < restarts() {
        // 4 connections, 75 requests a second each, for three seconds; to an address that only the rules know.
        let mut words = front.as_user(0);
        words.extend([tool("h2load").expect("checked before").display().to_string()]);
        words.extend(
            ["--h1", "-c", "4", "--rps", "75", "-n", "900", "--connect-to=10.96.0.10:8080"]
                .map(str::to_owned),
        );
        let load = Command::new(&words[0])
            .args(&words[1..])
            .arg("http://payments:8080/")
            .stdout(Stdio::piped())
            .spawn();
        let mut load = load.expect("h2load runs");
        while done < restarts() && load.try_wait().expect("wait").is_none() {
            replicas.push(Replica::start(&lan, &pki));
            let old = replicas.remove(0);
            publish(&replicas);
            old.end(&database);
            done += 1;
        }
        let output = load.wait_with_output().expect("output");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            said.contains("900 succeeded, 0 failed, 0 errored") && said.contains("900 2xx"),
            "after {done} restarts:\n{said}\n{}",
            front_sidecar.stderr()
        );
        total += 900;
    }
    let _ = writeln!(std::io::stderr(), "{total} requests of h2load over {done} restarts, none failed");
}
