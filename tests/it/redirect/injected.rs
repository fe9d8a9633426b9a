//! Pods of the example in `k8s/` as `inject` makes them: it writes the rules, the arguments and the configuration. The
//! test provides only what a cluster provides: files of certificates and ConfigMaps, the pod's address.

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt};

use serde_json::Value;

use super::pods::{ask, pki, service};
use crate::{
    kubernetes::{outrigger, started_with, values},
    support::{
        Launch, Proxy, eventually,
        netns::{Lan, Pod},
        pki::{Pki, id},
    },
};

/// A file of the example.
fn example(name: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("k8s/example").join(name);
    fs::read_to_string(path).expect("readable")
}

/// The pod of a workload of the example, injected, with certificates from a Secret.
fn injected(pki: &Pki, file: &str) -> Value {
    let defaults = pki.write("defaults.toml", "identity = \"secret/tls\"\n");
    let redirected = example(file).replace("outrigger.dev/mode: env", "outrigger.dev/mode: redirect");
    let output = outrigger(&["inject", "--defaults", defaults.to_str().expect("a path")], &redirected);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let workload = values(&String::from_utf8_lossy(&output.stdout))
        .into_iter()
        .find(|value| value["kind"] == "Deployment")
        .expect("a Deployment");
    workload["spec"]["template"].clone()
}

/// Runs the commands of the pod's init containers in order.
fn run(pki: &Pki, pod: &Pod, template: &Value, name: &str, config_map: &str) -> Proxy {
    let secret = pki.path(name);
    fs::create_dir(&secret).expect("a directory");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o755)).expect("chmod");
    let (certificate, key) = pki.issue(name, |_| {});
    for (file, text) in [("tls.crt", certificate), ("tls.key", key), ("ca.crt", pki.ca_pem())] {
        fs::write(secret.join(file), text).expect("write");
    }
    let config_map = pki.write(&format!("{name}.toml"), config_map);

    let rules = &template["spec"]["initContainers"][0];
    assert_eq!(rules["name"], "outrigger-redirect");
    let words = rules["args"].as_array().expect("arguments").iter().map(|word| word.as_str().expect("text"));
    pod.redirected(&words.skip(1).collect::<Vec<_>>());

    let (args, variables) = started_with(template, &config_map.display().to_string());
    let placed = |text: String| text.replace("/var/run/secrets/outrigger", secret.to_str().expect("a path"));
    let mut launch = Launch::new("").in_pod(pod).env("OUTRIGGER_POD_IP", &pod.v4.to_string());
    for arg in args {
        launch = launch.arg(arg);
    }
    for (name, value) in variables {
        launch = launch.env(&name, &placed(value));
    }
    launch.start()
}

#[test]
fn injected_pods_use_strict_mutual_tls_and_probes_still_work() {
    let Some(lan) = Lan::new() else { return };
    let (hello, client, node, pki) = (lan.pod(), lan.pod(), lan.pod(), pki());
    let template = injected(&pki, "hello.yaml");
    let application = service(&hello, 8080, "hello");
    let strict = example("outrigger.toml").replace("mtls = \"permissive\"", "mtls = \"strict\"");
    assert!(strict.contains("\"strict\""), "{strict}");
    let _there = run(&pki, &hello, &template, "hello", &strict);

    let endpoints = hello.addresses(8080).map(|address| format!("\"{address}\"")).join(", ");
    let client_config = example("caller.toml")
        .replace("\"dns://hello-pods.outrigger-example.svc.cluster.local:8080\"", &format!("[{endpoints}]"))
        .replace(
            "# identity = [\"spiffe://TRUST-DOMAIN/ns/outrigger-example/sa/hello\"]",
            &format!("identity = [\"{}\"]", id("hello")),
        );
    assert!(client_config.contains("\nidentity") && client_config.contains(&endpoints), "{client_config}");
    let _here = run(&pki, &client, &injected(&pki, "caller.yaml"), "caller", &client_config);

    // By the Service's address and name, and by those of one pod.
    let cluster_ip: SocketAddr = "10.96.0.10:80".parse().expect("an address");
    for (address, host) in [
        (cluster_ip, "hello.outrigger-example"),
        (hello.addresses(8080)[0], "hello-0.hello"),
        (hello.addresses(8080)[1], "hello-0.hello"),
    ] {
        let (status, body) = ask(&client, address, host);
        assert_eq!(status, 200, "{address}: {body}");
        assert!(body.starts_with("hello ") && body.contains(&id("caller")), "{body}");
    }

    // The kubelet has no certificate. The container responds to the probes that inject configures.
    let [address, _] = hello.addresses(8080);
    let (status, body) = ask(&node, address, "hello");
    assert_eq!(status, 403, "{body}");
    let containers = template["spec"]["containers"].as_array().expect("containers");
    let probe = &containers[0]["readinessProbe"]["httpGet"];
    let (port, path) = (probe["port"].as_u64().expect("a port"), probe["path"].as_str().expect("a path"));
    let port = u16::try_from(port).expect("a port");
    let probed = || super::pods::ask_for(&node, hello.addresses(port)[0], path, "hello").0;
    assert_eq!(probed(), 200);
    let sidecar = &template["spec"]["initContainers"][1];
    assert_eq!(sidecar["startupProbe"]["httpGet"]["path"], "/ready");
    assert_eq!(super::pods::ask_for(&node, hello.addresses(port)[0], "/ready", "hello").0, 200);
    hello.run(|| drop(application));
    eventually("the probe fails with its container", || probed() == 503);
}
