//! Pods of many shapes.

use serde_json::{Value, json};

use super::*;

const DEPLOYMENT: Owner<'_> = Owner { kind: "Deployment", name: "checkout" };

fn operations(pod: &Value, owner: Owner<'_>) -> (Vec<Operation>, Vec<Note>) {
    match inject(pod, owner, &Defaults::default(), &|_| None).unwrap() {
        InjectOutcome::Patch { operations, notes } => (operations, notes),
        InjectOutcome::Skip(reason) => panic!("left as it is: {reason:?}"),
    }
}

/// The injected pod; checks that undo restores the original.
fn injected(pod: &Value) -> Value {
    let mut after = pod.clone();
    for operation in operations(pod, DEPLOYMENT).0 {
        operation.apply(&mut after).unwrap();
    }
    let mut restored = after.clone();
    for step in undo(&after).unwrap() {
        step.operation.apply(&mut restored).unwrap();
    }
    assert_eq!(restored.to_string(), pod.to_string());
    assert!(is_injected(&after) && !is_injected(pod));
    after
}

fn rejection(pod: &Value) -> String {
    inject(pod, DEPLOYMENT, &Defaults::default(), &|_| None).unwrap_err().to_string()
}

fn names<'v>(pod: &'v Value, list: &str) -> Vec<&'v str> {
    pod["spec"][list].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect()
}

fn variable<'v>(container: &'v Value, name: &str) -> &'v str {
    let list = container["env"].as_array().unwrap();
    list.iter().find(|one| one["name"] == name).unwrap_or_else(|| panic!("no {name}"))["value"]
        .as_str()
        .unwrap()
}

#[test]
fn the_sidecar_starts_after_redirection_and_before_init_containers() {
    let pod = json!({"metadata": {}, "spec": {
        "initContainers": [{"name": "migrate"}, {"name": "logs", "restartPolicy": "Always"}],
        "containers": [{"name": "app", "ports": [{"containerPort": 9000}]}]
    }});
    let after = injected(&pod);
    assert_eq!(names(&after, "initContainers"), ["outrigger-redirect", "outrigger", "migrate", "logs"]);
    let sidecar = &after["spec"]["initContainers"][1];
    assert_eq!(sidecar["restartPolicy"], "Always");
    assert_eq!(variable(sidecar, "OUTRIGGER_REDIRECTED"), "true");
    assert!(variable(sidecar, "OUTRIGGER_BASE").contains("127.0.0.1:9000"));
    assert_eq!(after["metadata"]["annotations"]["prometheus.io/port"], "4192");
}

/// Otherwise a request on a keep-alive connection would find the service gone.
#[test]
fn the_service_runs_longer_than_the_drain_delay() {
    for (grace, delay, sleep) in
        [(None, 5, 8), (Some(60), 5, 8), (Some(10), 5, 7), (Some(4), 2, 3), (Some(2), 1, 2)]
    {
        let mut pod = json!({"metadata": {}, "spec": {"containers": [{"name": "app"}]}});
        if let Some(grace) = grace {
            pod["spec"]["terminationGracePeriodSeconds"] = json!(grace);
        }
        let after = injected(&pod);
        let sidecar = &after["spec"]["initContainers"][1];
        assert!(
            variable(sidecar, "OUTRIGGER_POD").contains(&format!("drain_delay = \"{delay}s\"")),
            "{grace:?}"
        );
        assert_eq!(
            after["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"], sleep,
            "{grace:?}"
        );
        assert!(sleep > delay && sleep <= grace.unwrap_or(30), "{grace:?}");
    }
}

#[test]
fn a_prestop_sleep_that_is_too_short_is_reported() {
    let notes_for = |hook: Value| {
        let pod = json!({"metadata": {}, "spec": {"containers": [{"name": "app", "lifecycle": {"preStop": hook}}]}});
        let (operations, notes) = operations(&pod, DEPLOYMENT);
        assert!(
            !serde_json::to_string(&operations).unwrap().contains("preStop\":{\"sleep"),
            "the hook is kept"
        );
        notes.into_iter().map(|note| note.0).collect::<String>()
    };
    for short in [
        json!({"sleep": {"seconds": 5}}),
        json!({"exec": {"command": ["sleep", "5"]}}),
        json!({"exec": {"command": ["/bin/sh", "-c", "sleep 5"]}}),
    ] {
        let notes = notes_for(short.clone());
        assert!(notes.contains("`app` sleeps for 5s") && notes.contains("for 8s"), "{short}: {notes}");
    }
    for long in [json!({"sleep": {"seconds": 10}}), json!({"exec": {"command": ["/app", "drain"]}})] {
        assert_eq!(notes_for(long), "");
    }
}

/// It serves no clients, so there is nothing to wait for.
#[test]
fn a_job_gets_no_drain_delay() {
    let job = |annotations: Value| {
        let pod = json!({"metadata": {"annotations": annotations}, "spec": {
            "restartPolicy": "Never", "containers": [{"name": "app"}]
        }});
        let after = injected(&pod);
        assert_eq!(after["spec"]["containers"][0].get("lifecycle"), None);
        variable(&after["spec"]["initContainers"][1], "OUTRIGGER_POD").to_owned()
    };
    assert!(job(json!({})).contains("drain_delay = \"0s\""));
    let config = job(json!({"outrigger.dev/drain-delay": "4s"}));
    assert!(config.contains("drain_delay = \"4s\""), "{config}");
}

/// A ResourceQuota on `limits.cpu` rejects pods with a container that has no limit.
#[test]
fn every_added_container_has_the_cpu_limit() {
    let pod = json!({"metadata": {"annotations": {"outrigger.dev/cpu-limit": "100m"}}, "spec": {"containers": [{"name": "app"}]}});
    let after = injected(&pod);
    for (container, request) in [(0, "10m"), (1, "20m")] {
        let resources = &after["spec"]["initContainers"][container]["resources"];
        assert_eq!(
            (&resources["limits"]["cpu"], &resources["requests"]["cpu"]),
            (&json!("100m"), &json!(request))
        );
    }
    let low = json!({"metadata": {"annotations": {"outrigger.dev/cpu-limit": "5m", "outrigger.dev/cpu": "5m"}}, "spec": {"containers": [{"name": "app"}]}});
    assert_eq!(injected(&low)["spec"]["initContainers"][0]["resources"]["requests"]["cpu"], "5m");
    let none = injected(&json!({"metadata": {}, "spec": {"containers": [{"name": "app"}]}}));
    assert_eq!(none["spec"]["initContainers"][1]["resources"]["limits"].get("cpu"), None);
}

#[test]
fn without_native_sidecars_redirection_is_the_last_init_container() {
    let pod = json!({"metadata": {"annotations": {"outrigger.dev/native-sidecar": "false"}}, "spec": {
        "initContainers": [{"name": "migrate"}], "containers": [{"name": "app"}]
    }});
    let after = injected(&pod);
    assert_eq!(names(&after, "initContainers"), ["migrate", "outrigger-redirect"]);
    assert_eq!(names(&after, "containers"), ["outrigger", "app"]);
    let (sidecar, app) = (&after["spec"]["containers"][0], &after["spec"]["containers"][1]);
    assert_eq!(sidecar.get("restartPolicy"), None);
    assert_eq!(sidecar["lifecycle"]["postStart"]["exec"]["command"][1], "status");
    assert_eq!(app["lifecycle"]["preStop"]["exec"]["command"], json!(["sleep", "8"]));
    assert_eq!(after["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"], "app");
    let job = Owner { kind: "Job", name: "j" };
    let InjectOutcome::Skip(Some(reason)) = inject(&pod, job, &Defaults::default(), &|_| None).unwrap()
    else {
        panic!()
    };
    assert!(reason.contains("neither would the Job"), "{reason}");
}

#[test]
fn network_probes_are_redirected_and_others_kept() {
    let exec = json!({"exec": {"command": ["true"]}});
    let pod = json!({"metadata": {"annotations": {"outrigger.dev/skip-inbound-ports": "9100-9200"}}, "spec": {
        "initContainers": [{"name": "logs", "restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 24224}}}],
        "containers": [
            {"name": "app", "ports": [{"name": "web", "containerPort": 8080}],
             "livenessProbe": {"httpGet": {"path": "/h?a=b", "port": "web", "scheme": "HTTPS",
                "httpHeaders": [{"name": "X-A", "value": "1"}]}, "periodSeconds": 3, "timeoutSeconds": 7},
             "readinessProbe": {"grpc": {"port": 9090, "service": "s"}},
             "startupProbe": exec,
             "lifecycle": {"postStart": {"httpGet": {"path": "/warm", "port": 8080}}, "preStop": exec}},
            {"name": "metrics", "livenessProbe": {"httpGet": {"port": 9101}},
             "readinessProbe": {"httpGet": {"host": "elsewhere.example", "port": 80}},
             "startupProbe": {"httpGet": {"port": "nowhere"}}}
        ]
    }});
    let after = injected(&pod);
    let probes: Value =
        serde_json::from_str(variable(&after["spec"]["initContainers"][1], "OUTRIGGER_PROBES")).unwrap();
    assert_eq!(
        probes,
        json!({
            "logs/startup": {"port": 24224, "tcp": true, "timeout": 1},
            "app/readiness": {"port": 9090, "grpc": "s", "timeout": 1},
            "app/liveness": {"port": 8080, "http": "/h?a=b", "tls": true, "headers": [["X-A", "1"]], "timeout": 7},
            "app/post-start": {"port": 8080, "http": "/warm", "timeout": 30}
        })
    );
    let (app, metrics) = (&after["spec"]["containers"][0], &after["spec"]["containers"][1]);
    assert_eq!(
        app["livenessProbe"].to_string(),
        r#"{"httpGet":{"path":"/probe/app/liveness","port":4192},"periodSeconds":3,"timeoutSeconds":7}"#
    );
    assert_eq!(app["lifecycle"]["postStart"]["httpGet"]["path"], "/probe/app/post-start");
    assert_eq!((&app["startupProbe"], &app["lifecycle"]["preStop"]), (&exec, &exec));
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        assert_eq!(metrics[probe], pod["spec"]["containers"][1][probe]);
    }
    let notes = operations(&pod, DEPLOYMENT).1;
    assert!(notes[0].0.contains("startupProbe of container `metrics` names a port"), "{notes:?}");
}

#[test]
fn env_mode_needs_no_capability() {
    let pod = json!({"metadata": {"annotations": {"outrigger.dev/mode": "env"}}, "spec": {
        "initContainers": [{"name": "migrate"}],
        "containers": [{"name": "app", "livenessProbe": {"tcpSocket": {"port": 1}},
            "env": [{"name": "NO_PROXY", "value": "db.corp"}, {"name": "http_proxy", "value": "http://proxy.corp:1"}]}]
    }});
    let after = injected(&pod);
    assert_eq!(names(&after, "initContainers"), ["outrigger", "migrate"]);
    assert!(!after.to_string().contains("NET_ADMIN"));
    let app = &after["spec"]["containers"][0];
    assert_eq!(app["livenessProbe"], pod["spec"]["containers"][0]["livenessProbe"]);
    assert_eq!(variable(app, "http_proxy"), "http://proxy.corp:1");
    assert_eq!(variable(app, "HTTPS_PROXY"), "http://127.0.0.1:4140");
    assert!(variable(app, "NO_PROXY").starts_with("db.corp,localhost,"));
    assert!(variable(app, "no_proxy").starts_with("db.corp,localhost,"));
    assert_eq!(variable(&after["spec"]["initContainers"][1], "http_proxy"), "http://127.0.0.1:4140");
    assert!(!after["spec"]["initContainers"][0]["env"].to_string().contains("OUTRIGGER_REDIRECTED"));
    assert!(operations(&pod, DEPLOYMENT).1[0].0.contains("http_proxy of its own"));
}

#[test]
fn every_identity_is_mounted_where_the_configuration_expects_it() {
    for (identity, volume, path) in [
        (
            "csi-spiffe",
            json!({"csi": {"driver": "spiffe.csi.cert-manager.io", "readOnly": true}}),
            IDENTITY_DIRECTORY,
        ),
        ("spire", json!({"csi": {"driver": "csi.spiffe.io", "readOnly": true}}), "/spiffe-workload-api"),
        ("secret/tls", json!({"secret": {"secretName": "tls"}}), IDENTITY_DIRECTORY),
    ] {
        let pod = json!({"metadata": {"annotations": {"outrigger.dev/identity": identity}},
            "spec": {"containers": [{"name": "app"}], "volumes": []}});
        let after = injected(&pod);
        let mut expected = json!({"name": "outrigger-identity"});
        expected.as_object_mut().unwrap().extend(volume.as_object().unwrap().clone());
        assert_eq!(after["spec"]["volumes"][2], expected);
        let sidecar = &after["spec"]["initContainers"][1];
        assert_eq!(sidecar["volumeMounts"][2]["mountPath"], path);
        assert!(variable(sidecar, "OUTRIGGER_POD").contains(path));
    }
}

#[test]
fn the_service_name_is_its_label_or_controller() {
    let named =
        |metadata: Value, kind, name| service_name(&json!({"metadata": metadata}), Owner { kind, name });
    assert_eq!(named(json!({"labels": {"app.kubernetes.io/name": "cart"}}), "Deployment", "x"), "cart");
    assert_eq!(named(json!({"labels": {"pod-template-hash": "7d9"}}), "ReplicaSet", "a-b-7d9"), "a-b");
    assert_eq!(named(json!({}), "Job", "nightly-report-28712345"), "nightly-report");
    assert_eq!(named(json!({}), "Job", "import-2024"), "import-2024");
    assert_eq!(named(json!({}), "StatefulSet", "db"), "db");
}

#[test]
fn the_prestop_sleep_fits_the_grace_period() {
    let pod = |grace: u64| {
        json!({"metadata": {"annotations": {"outrigger.dev/drain-delay": "20s"}}, "spec": {
            "terminationGracePeriodSeconds": grace, "containers": [{"name": "app"}]
        }})
    };
    for (grace, expected) in
        [(60, json!(23)), (30, json!(18)), (5, json!(3)), (1, Value::Null), (0, Value::Null)]
    {
        let after = injected(&pod(grace));
        assert_eq!(
            after["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"], expected,
            "{grace}"
        );
        let notes = operations(&pod(grace), DEPLOYMENT).1;
        assert_eq!(notes.iter().any(|note| note.0.contains("shortened")), grace < 40, "{grace}");
    }
}

#[test]
fn pods_that_would_bypass_the_proxy_are_rejected() {
    let with =
        |spec: Value, annotations: Value| json!({"metadata": {"annotations": annotations}, "spec": spec});
    let none = || json!({});
    for (pod, expected) in [
        (with(json!({"containers": [{"name": "outrigger"}]}), none()), "a container `outrigger`"),
        (
            with(json!({"containers": [{"name": "a"}], "volumes": [{"name": "outrigger-run"}]}), none()),
            "a volume",
        ),
        (
            with(json!({"containers": [{"name": "a", "securityContext": {"runAsUser": 4140}}]}), none()),
            "`a` runs as user 4140",
        ),
        (
            with(json!({"containers": [{"name": "a"}], "securityContext": {"runAsUser": 4140}}), none()),
            "the pod runs as",
        ),
        (with(json!({"containers": []}), none()), "spec.containers is not"),
        (
            with(json!({"containers": [{"name": "a"}]}), json!({"outrigger.dev/mode": "x"})),
            "outrigger.dev/mode",
        ),
        (with(json!({"containers": [{"name": "a"}]}), json!({"outrigger.dev/injected": "x"})), ""),
    ] {
        if !expected.is_empty() {
            assert!(rejection(&pod).contains(expected), "{}", rejection(&pod));
        } else {
            assert!(undo(&pod).unwrap_err().to_string().contains("by hand"));
        }
    }
}

#[test]
fn unsupported_and_opted_out_pods_are_skipped() {
    let leave = |pod: Value| match inject(&pod, DEPLOYMENT, &Defaults::default(), &|_| None).unwrap() {
        InjectOutcome::Skip(reason) => reason,
        InjectOutcome::Patch { .. } => panic!("patched"),
    };
    assert!(
        leave(json!({"spec": {"hostNetwork": true, "containers": [{"name": "a"}]}}))
            .unwrap()
            .contains("hostNetwork")
    );
    assert!(
        leave(json!({"spec": {"os": {"name": "windows"}, "containers": []}})).unwrap().contains("Windows")
    );
    for kind in ["labels", "annotations"] {
        let pod =
            json!({"metadata": {kind: {"outrigger.dev/inject": "disabled"}}, "spec": {"containers": []}});
        assert_eq!(leave(pod), None);
    }
}
