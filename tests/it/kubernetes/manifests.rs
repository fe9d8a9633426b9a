//! `k8s/` is what `kubectl apply -k k8s` applies, and agrees with the code.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use outrigger::kubernetes::inject::{CONFIG_KEY, Defaults, InjectOutcome, Owner, inject, proxy_config};
use serde_json::{Value, json};

use super::{outrigger, validate, values};
use crate::support::has_tool;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("k8s")
}

fn build(folder: &Path) -> String {
    let output = Command::new("kubectl").arg("kustomize").arg(folder).output().expect("kubectl runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The manifests, and the same with each source of an identity.
fn variants() -> Vec<(&'static str, String)> {
    let mut variants = vec![("none", build(&folder()))];
    for identity in ["csi-spiffe", "spire"] {
        let copy = tempfile::tempdir().expect("a folder");
        let copied = Command::new("cp").arg("-r").arg(folder()).arg(copy.path()).status().expect("cp runs");
        assert!(copied.success());
        let file = copy.path().join("k8s/kustomization.yaml");
        // As the comments of the file say.
        let text = fs::read_to_string(&file).expect("readable").replace("# components:", "components:");
        fs::write(
            &file,
            text.replace(&format!("#   - identity/{identity}"), &format!("  - identity/{identity}")),
        )
        .expect("write");
        variants.push((identity, build(&copy.path().join("k8s"))));
    }
    variants
}

fn of_kind<'v>(objects: &'v [Value], kind: &str) -> Vec<&'v Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

#[test]
fn the_manifests_and_their_injected_pods_are_valid() {
    if !has_tool(&["kubectl"]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let mut files = Vec::new();
    for (identity, manifests) in variants() {
        let injected = outrigger(&["inject"], &manifests);
        assert!(injected.status.success(), "{}", String::from_utf8_lossy(&injected.stderr));
        let injected = String::from_utf8(injected.stdout).expect("UTF-8");
        for (what, text) in [("plain", &manifests), ("injected", &injected)] {
            let file = folder.path().join(format!("{identity}-{what}.yaml"));
            fs::write(&file, text).expect("write");
            files.push(file);
        }
        let deployments = values(&injected);
        for name in ["hello", "caller"] {
            let of = |object: &&&Value| object["metadata"]["name"] == name;
            let object = *of_kind(&deployments, "Deployment").iter().find(of).expect("the example");
            let said =
                object["spec"]["template"]["metadata"]["annotations"]["outrigger.dev/identity"].as_str();
            assert_eq!(said.unwrap_or("none"), identity, "{name}");
        }
    }
    validate(&files);
}

#[test]
fn the_manifests_agree_with_the_code() {
    if !has_tool(&["kubectl"]) {
        return;
    }
    let objects = values(&build(&folder()));
    let deployments = of_kind(&objects, "Deployment");
    let named = |name: &str| *deployments.iter().find(|one| one["metadata"]["name"] == name).expect(name);

    // The webhook's arguments are valid, and the files that they name are mounted.
    let webhook = &named("outrigger-webhook")["spec"]["template"]["spec"];
    let container = &webhook["containers"][0];
    let args: Vec<&str> = container["args"].as_array().expect("arguments").iter().map(text).collect();
    let started = outrigger(&args, "");
    let said = String::from_utf8_lossy(&started.stderr);
    assert_eq!(started.status.code(), Some(1), "{said}");
    assert!(said.contains("/certs/tls.crt"), "it misses its certificate and nothing else: {said}");
    assert_eq!(container["image"], concat!("outrigger:", env!("CARGO_PKG_VERSION")));
    assert_eq!(container["ports"][0]["containerPort"], 8443);

    // The API server finds it, with the paths that are served.
    let service =
        of_kind(&objects, "Service").into_iter().find(|one| one["metadata"]["name"] == "outrigger-webhook");
    assert_eq!(
        service.expect("its Service")["spec"]["ports"][0]["targetPort"],
        container["ports"][0]["name"]
    );
    let configurations = ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"];
    let hooks: Vec<&Value> = configurations
        .iter()
        .flat_map(|kind| of_kind(&objects, kind))
        .flat_map(|one| one["webhooks"].as_array().expect("webhooks"))
        .collect();
    let paths: BTreeSet<&str> =
        hooks.iter().map(|hook| text(&hook["clientConfig"]["service"]["path"])).collect();
    assert_eq!(paths, BTreeSet::from(["/mutate", "/validate"]));
    for hook in &hooks {
        assert_eq!(hook["clientConfig"]["service"]["name"], "outrigger-webhook");
        let selector = hook["namespaceSelector"].to_string();
        // Failing pod creation while the webhook is down is opt-in.
        let opted_in = selector.contains("outrigger.dev/inject")
            && !selector.contains(r#""NotIn","values":["enabled"]"#);
        assert_eq!(hook["failurePolicy"] == "Fail", opted_in, "{hook}");
        if hook["clientConfig"]["service"]["path"] == "/mutate" {
            assert!(selector.contains("kube-system") && selector.contains("outrigger-system"), "{selector}");
        }
    }

    // No role has more rights than discovery uses (`kubernetes_discovery` has its requests), in no more places than
    // are named.
    let roles = of_kind(&objects, "ClusterRole");
    let rules = json!([{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}]);
    assert_eq!(roles.iter().map(|role| &role["rules"]).collect::<Vec<_>>(), [&rules]);
    assert!(of_kind(&objects, "ClusterRoleBinding").is_empty() && of_kind(&objects, "Role").is_empty());
    assert_eq!(webhook["automountServiceAccountToken"], false, "it asks the API server for nothing");

    // Configurations and defaults are valid.
    let (mut configurations, mut defaults) = (0, None);
    for map in of_kind(&objects, "ConfigMap") {
        for (key, value) in map["data"].as_object().expect("data") {
            match &**key {
                CONFIG_KEY => {
                    assert_eq!(proxy_config::check(key, text(value)), Ok(Vec::new()));
                    configurations += 1;
                }
                "defaults.toml" => defaults = Some(Defaults::parse(text(value)).expect("defaults")),
                other => panic!("{other} is nothing that anybody reads"),
            }
        }
    }
    assert_eq!(configurations, 2);
    let defaults = defaults.expect("defaults");

    // What pods get: the webhook's own image, and privileges where the namespace allows them and nowhere else.
    for (name, privileged) in [("hello", true), ("caller", false)] {
        let owner = Owner { kind: "Deployment", name };
        let template = &named(name)["spec"]["template"];
        let outcome = inject(template, owner, &defaults, &|_| None).expect("it can be injected");
        let InjectOutcome::Patch { operations, notes } = outcome else { panic!("{name} gets nothing") };
        assert_eq!(notes, []);
        let patch = serde_json::to_string(&operations).expect("JSON");
        assert_eq!(patch.contains("NET_ADMIN"), privileged, "{name}");
        assert!(patch.contains(&format!("\"image\":{}", container["image"])), "{patch}");
        let namespace = of_kind(&objects, "Namespace")
            .into_iter()
            .find(|one| one["metadata"]["name"] == named(name)["metadata"]["namespace"])
            .expect("its namespace");
        let labels = &namespace["metadata"]["labels"];
        assert_eq!(labels["outrigger.dev/inject"], "enabled");
        let enforced = if privileged { "privileged" } else { "restricted" };
        assert_eq!(labels["pod-security.kubernetes.io/enforce"], enforced);
    }

    // Every container except the one that sets rules conforms to `restricted` and has resource requests.
    let all = values(&String::from_utf8(outrigger(&["inject"], &build(&folder())).stdout).expect("UTF-8"));
    for deployment in of_kind(&all, "Deployment") {
        let spec = &deployment["spec"]["template"]["spec"];
        for container in ["initContainers", "containers"]
            .iter()
            .flat_map(|list| spec[list].as_array().into_iter().flatten())
        {
            let (context, pod) = (&container["securityContext"], &spec["securityContext"]);
            assert!(container["resources"]["requests"]["memory"].is_string(), "{container}");
            assert_eq!(context["allowPrivilegeEscalation"], false, "{container}");
            assert_eq!(context["capabilities"]["drop"][0], "ALL", "{container}");
            assert_eq!(context["readOnlyRootFilesystem"], true, "{container}");
            if container["name"] != "outrigger-redirect" {
                assert_eq!(context["capabilities"].get("add"), None, "{container}");
                assert!(context["runAsNonRoot"] == true || pod["runAsNonRoot"] == true, "{container}");
                assert!(context["runAsUser"].is_u64() || pod["runAsUser"].is_u64(), "{container}");
            }
        }
    }
}

/// The order of an apply: the webhook before any pod of the example, and before the webhook everything that it needs.
#[test]
fn the_first_apply_injects_the_example() {
    if !has_tool(&["kubectl"]) {
        return;
    }
    let objects = values(&build(&folder()));
    let place = |kind: &str| objects.iter().position(|object| object["kind"] == kind).expect(kind);
    let last = |kind: &str| objects.iter().rposition(|object| object["kind"] == kind).expect(kind);
    assert!(place("MutatingWebhookConfiguration") < place("Deployment"));
    for before in ["Namespace", "ServiceAccount", "ConfigMap", "Service", "Certificate"] {
        assert!(last(before) < place("MutatingWebhookConfiguration"), "{before}");
    }
    assert_eq!(place("ValidatingWebhookConfiguration"), objects.len() - 1);
}

/// Opted-in pods can be created while the webhook is rolled or its node is drained: one replica always responds, and a replica
/// that ends has the time to let its connections go.
#[test]
fn the_webhook_is_available_while_it_is_rolled() {
    if !has_tool(&["kubectl"]) {
        return;
    }
    for part in ["", "webhook"] {
        let objects = values(&build(&folder().join(part)));
        let webhook = |kind: &str| {
            let named = |object: &&Value| object["metadata"]["name"] == "outrigger-webhook";
            of_kind(&objects, kind).into_iter().find(named).expect(kind)["spec"].clone()
        };
        let deployment = webhook("Deployment");
        assert!(
            deployment["replicas"].as_u64().is_some_and(|replicas| replicas >= 2),
            "{part}: {deployment}"
        );
        assert_ne!(deployment["strategy"]["type"], "Recreate", "{part}");
        assert_eq!(deployment["strategy"]["rollingUpdate"]["maxUnavailable"], 0, "{part}");
        assert_eq!(webhook("PodDisruptionBudget")["minAvailable"], 1, "{part}");
        let pod = &deployment["template"]["spec"];
        // Ready only when it responds: a roll does not end a replica before that.
        assert_eq!(pod["containers"][0]["readinessProbe"]["httpGet"]["path"], "/healthz", "{part}");
        // After SIGTERM it responds for 5 s; the default is 30 s.
        let grace = pod.get("terminationGracePeriodSeconds").map_or(Some(30), Value::as_u64);
        assert!(grace.is_some_and(|seconds| seconds >= 10), "{part}: {pod}");
    }
}

#[test]
fn every_image_has_a_version_in_every_folder() {
    if !has_tool(&["kubectl"]) {
        return;
    }
    for part in ["", "webhook", "jaeger", "example"] {
        for object in of_kind(&values(&build(&folder().join(part))), "Deployment") {
            for container in object["spec"]["template"]["spec"]["containers"].as_array().expect("containers")
            {
                let tag = text(&container["image"]).rsplit_once(':').map(|(_, tag)| tag);
                assert!(tag.is_some_and(|tag| tag != "latest" && !tag.contains('/')), "{part}: {container}");
            }
        }
    }
    let files =
        ["webhook/deployment.yaml", "example/hello.yaml", "example/caller.yaml", "jaeger/jaeger.yaml"];
    for file in files {
        let content = fs::read_to_string(folder().join(file)).expect("readable");
        for image in content.lines().filter_map(|line| line.trim().strip_prefix("image: ")) {
            assert!(image.contains(':'), "{file}: {image}");
        }
    }
}

/// agnhost's /healthz responds with 412 without its UDP server.
#[test]
fn the_examples_readiness_probe_uses_a_path_that_its_image_serves() {
    let content = fs::read_to_string(folder().join("example/hello.yaml")).expect("readable");
    assert!(content.contains("--udp-port=-1") && !content.contains("path: /healthz"), "{content}");
}

/// As its first lines say: the certificate by `outrigger certs`, everything else by kustomize.
#[test]
fn the_webhook_can_be_installed_without_cert_manager() {
    if !has_tool(&["kubectl", "curl"]) {
        return;
    }
    let copy = tempfile::tempdir().expect("a folder");
    let copied = Command::new("cp").arg("-r").arg(folder()).arg(copy.path()).status().expect("cp runs");
    assert!(copied.success());
    let (own, name) = (copy.path().join("k8s/own-certificate"), "outrigger-webhook.outrigger-system.svc");
    let tls = own.join("tls");
    let _ = fs::remove_dir_all(&tls);
    let made = outrigger(
        &["certs", "--out", &tls.display().to_string(), "--trust-domain", "outrigger-system", name],
        "",
    );
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let manifests = build(&own);
    let objects = values(&manifests);
    assert!(!manifests.contains("cert-manager.io"), "{manifests}");
    let read = |file: &str| fs::read(tls.join(file)).expect("readable");
    let base64 = |bytes: &[u8]| base64::Engine::encode(&base64::engine::general_purpose::STANDARD, bytes);
    // kustomize wraps it into lines, which parsers ignore.
    let joined = |value: &Value| text(value).replace('\n', "");
    let secret = of_kind(&objects, "Secret")[0];
    assert_eq!(
        (&secret["metadata"]["name"], &secret["type"]),
        (&json!("outrigger-webhook-tls"), &json!("kubernetes.io/tls"))
    );
    assert_eq!(joined(&secret["data"]["tls.crt"]), base64(&read(&format!("{name}.crt"))));
    assert_eq!(joined(&secret["data"]["tls.key"]), base64(&read(&format!("{name}.key"))));
    let mut hooks = 0;
    for kind in ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"] {
        for hook in
            of_kind(&objects, kind).iter().flat_map(|one| one["webhooks"].as_array().expect("webhooks"))
        {
            assert_eq!(joined(&hook["clientConfig"]["caBundle"]), base64(&read("ca.crt")));
            assert_eq!(hook["clientConfig"]["service"]["name"], "outrigger-webhook");
            hooks += 1;
        }
    }
    assert_eq!(hooks, 3);
    let file = copy.path().join("built.yaml");
    fs::write(&file, &manifests).expect("write");
    validate(&[file]);

    // An API server that trusts this CA reaches it under that name.
    let path = |file: String| tls.join(file).display().to_string();
    let (certificate, key) = (path(format!("{name}.crt")), path(format!("{name}.key")));
    let arguments = ["webhook", "--listen", "127.0.0.1:0", "--tls-cert", &certificate, "--tls-key", &key];
    let webhook =
        crate::support::Daemon::start(&crate::support::binary().display().to_string(), &arguments, &[]);
    let log = webhook.wait_for_output("webhook listening");
    let address = log.split("listen=").nth(1).expect("it says where");
    let port: String =
        address.split(':').nth(1).expect("a port").chars().take_while(char::is_ascii_digit).collect();
    let response = Command::new(crate::support::tool("curl").expect("curl"))
        .args([
            "-s",
            "--cacert",
            &path("ca.crt".to_owned()),
            "--resolve",
            &format!("{name}:{port}:127.0.0.1"),
        ])
        .arg(format!("https://{name}:{port}/healthz"))
        .output()
        .expect("curl runs");
    assert_eq!(String::from_utf8_lossy(&response.stdout), "ok\n", "{response:?}");
}

/// The Compose example has the same parts.
#[test]
fn the_compose_example_is_consistent() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/compose");
    let file = fs::read_to_string(folder.join("compose.yaml")).expect("readable");
    let services = &values(&file)[0]["services"];
    let manifests = ["jaeger/jaeger.yaml", "example/hello.yaml", "example/caller.yaml"];
    let manifests: String = manifests
        .iter()
        .map(|name| fs::read_to_string(self::folder().join(name)).expect("readable"))
        .collect();
    for (name, service) in services.as_object().expect("services") {
        let image = text(&service["image"]);
        if image == concat!("outrigger:", env!("CARGO_PKG_VERSION")) {
            let config = service["command"][2].as_str().and_then(|path| path.strip_prefix("/etc/outrigger/"));
            let config = fs::read_to_string(folder.join(config.expect("a file"))).expect("its configuration");
            assert_eq!(proxy_config::check(name, &config), Ok(Vec::new()));
            let beside = text(&service["network_mode"]).strip_prefix("service:").expect("a service");
            assert!(services.get(beside).is_some() && name.starts_with(beside), "{name}");
            assert_eq!(service["environment"]["OTEL_SERVICE_NAME"], *beside);
        } else {
            assert!(manifests.contains(image), "{image} is not what k8s/ has");
        }
    }
}
