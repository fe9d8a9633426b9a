//! `outrigger inject` over the corpus: valid, idempotent, and reversible.

use std::{fs, process::Output};

use serde_json::Value;

use super::{corpus, outrigger, validate, values};

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

#[track_caller]
fn done(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// The pods of all workloads in a document.
fn pods(value: &Value) -> Vec<&Value> {
    match value["kind"].as_str() {
        Some("List") => value["items"].as_array().into_iter().flatten().flat_map(pods).collect(),
        Some("Pod") => vec![value],
        Some("CronJob") => vec![&value["spec"]["jobTemplate"]["spec"]["template"]],
        _ if value["apiVersion"] == "example.dev/v1" => Vec::new(),
        _ => value["spec"].get("template").into_iter().collect(),
    }
}

fn has_sidecar(pod: &Value) -> bool {
    let lists = ["initContainers", "containers"];
    lists
        .iter()
        .flat_map(|list| pod["spec"][list].as_array().into_iter().flatten())
        .any(|one| one["name"] == "outrigger")
}

/// In `tests/it/kubernetes/corpus`, the first line says what is expected if it is not a sidecar in every workload.
#[test]
fn inject_is_idempotent_and_reversible_over_the_corpus() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut valid, mut sidecars) = (Vec::new(), 0);
    let files = corpus();
    assert!(files.len() >= 30, "only {} files", files.len());
    for file in files {
        let name = file.file_name().expect("a name").to_string_lossy().into_owned();
        let before = fs::read_to_string(&file).expect("readable");
        let first = outrigger(&["inject"], &before);
        let (after, printed) = (done(&first), text(&first.stderr));
        let expected = before.lines().next().and_then(|line| line.strip_prefix("# expect: ")).unwrap_or("");
        match expected {
            "untouched" => assert_eq!((&*after, &*printed), (&*before, ""), "{name}"),
            "left" => {
                assert_eq!(after, before, "{name}");
                assert!(printed.contains("left as it is: "), "{name}: {printed}");
            }
            _ => {
                let documents = values(&after);
                for pod in documents.iter().flat_map(pods) {
                    let out = pod["metadata"]["annotations"]["outrigger.dev/inject"] == "disabled";
                    assert_eq!(has_sidecar(pod), !out, "{name}\n{after}");
                    sidecars += usize::from(!out);
                }
                let is_reported = ["rewritten", "noted"].contains(&expected)
                    || name.starts_with("28")
                    || name.starts_with("04");
                assert_eq!(!printed.is_empty(), is_reported, "{name}: {printed}");
                let path = folder.path().join(&name);
                // Entries of a list are checked one by one.
                let each: Vec<String> = documents
                    .into_iter()
                    .flat_map(|mut value| match value["kind"].as_str() {
                        Some("List") => value["items"].as_array_mut().map(std::mem::take).unwrap_or_default(),
                        _ => vec![value],
                    })
                    .map(|value| value.to_string())
                    .collect();
                fs::write(&path, each.join("\n---\n")).expect("write");
                valid.push(path);
            }
        }
        assert_eq!(
            done(&outrigger(&["inject"], &after)),
            after,
            "{name}: injected twice is not injected once"
        );
        let back = done(&outrigger(&["inject", "--remove"], &after));
        if expected == "rewritten" {
            assert!(printed.contains("rewritten"), "{printed}");
            assert_eq!(values(&back), values(&before), "{name}");
        } else {
            assert_eq!(back, before, "{name}: not taken back to the byte");
        }
    }
    assert!(sidecars >= 25, "only {sidecars} sidecars");
    validate(&valid);
}

#[test]
fn uninject_keeps_what_others_added() {
    let before = fs::read_to_string(&corpus()[0]).expect("readable");
    let after = done(&outrigger(&["inject"], &before));
    let changed = after
        .replace("      annotations:\n", "      annotations:\n        mine: \"1\"\n")
        .replace(
            "      initContainers:\n",
            "      initContainers:\n        - name: mine\n          image: x\n",
        )
        .replace("      volumes:\n", "      volumes:\n        - {name: mine, emptyDir: {}}\n");
    assert_eq!(changed.matches("mine").count(), 3);
    let back = done(&outrigger(&["inject", "--remove"], &changed));
    assert_eq!(back.matches("mine").count(), 3, "{back}");
    assert!(!back.contains("outrigger"), "{back}");
}

/// The arguments after `run` and the variables of a pod's sidecar, with its ConfigMap at another path.
pub fn started_with(pod: &Value, config_map: &str) -> (Vec<String>, Vec<(String, String)>) {
    let lists = ["initContainers", "containers"];
    let all = lists.iter().flat_map(|list| pod["spec"][list].as_array().into_iter().flatten());
    let sidecar = all.into_iter().find(|one| one["name"] == "outrigger").expect("it has one");
    let args = sidecar["args"].as_array().expect("arguments").iter().map(|arg| arg.as_str().expect("text"));
    let placed =
        |arg: &str| if arg.contains("/etc/outrigger/") { config_map.to_owned() } else { arg.to_owned() };
    let variables = sidecar["env"].as_array().expect("variables").iter();
    let variable = |one: &Value| Some((one["name"].as_str()?.to_owned(), one["value"].as_str()?.to_owned()));
    (args.skip(1).map(placed).collect(), variables.filter_map(variable).collect())
}

/// The configuration that an injected sidecar starts with is valid.
#[test]
fn the_injected_arguments_and_configuration_are_valid() {
    for file in corpus() {
        let injected = done(&outrigger(&["inject"], &fs::read_to_string(&file).expect("readable")));
        for pod in values(&injected).iter().flat_map(pods).filter(|pod| has_sidecar(pod)) {
            // Files named by annotation must exist; here they do not.
            let (args, variables) = started_with(pod, "/dev/null");
            let output = std::process::Command::new(crate::support::binary())
                .arg("check")
                .args(args)
                .envs(variables)
                .output()
                .expect("it runs");
            let said = text(&output.stdout);
            // The certificate is the only file that comes from the cluster.
            let only_certificates = said.contains("/var/run/secrets/outrigger") || said.contains("spiffe");
            assert!(output.status.success() || only_certificates, "{}: {said}", file.display());
            assert!(
                !said.contains("warning") && !said.contains("draining takes"),
                "{}: {said}",
                file.display()
            );
        }
    }
}

#[test]
fn errors_are_reported_and_nothing_is_written() {
    let pod = |annotation: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  annotations: {{{annotation}}}\nspec:\n  containers: [{{name: a, image: b}}]\n"
        )
    };
    for (input, expected) in [
        (
            pod("outrigger.dev/mdoe: env"),
            "Pod p: outrigger.dev/mdoe: unknown key `mdoe`; did you mean `mode`?",
        ),
        (pod("outrigger.dev/app-port: 80"), "an annotation is a string: write \"80\""),
        (
            pod("outrigger.dev/identity: vault"),
            "`vault` is not `csi-spiffe`, `spire`, `secret/NAME` or `none`",
        ),
        ("a: 1\n---\nb: {{ .Values.x }}\n".to_owned(), "line 3: invalid YAML"),
        ("a: {{ .Values.x }}\n".to_owned(), "helm template"),
    ] {
        let output = outrigger(&["inject"], &(pod("") + "---\n" + &input));
        let printed = text(&output.stderr);
        assert!(!output.status.success() && output.stdout.is_empty(), "{input}");
        assert!(
            printed.contains(expected)
                || (expected.starts_with("line 3") && printed.contains("invalid YAML")),
            "{printed}"
        );
    }
    let output = outrigger(&["inject", "-f", "/nowhere.yaml"], "");
    assert!(text(&output.stderr).contains("cannot read /nowhere.yaml"));
    assert_eq!(outrigger(&["inject", "--remove", "--image", "x"], "").status.code(), Some(2));
}

#[test]
fn inject_defaults_apply_where_a_pod_has_no_annotation() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("defaults.toml");
    let defaults = "image = \"r.example/o:1\"\nmode = \"env\"\n[proxy.defaults]\ntimeout = \"4s\"\n\
         [proxy-defaults.defaults]\ntimeout = \"9s\"\nconnect_timeout = \"3s\"\nidle_timeout = \"8s\"\n";
    fs::write(&file, defaults).expect("write");
    let file = file.to_string_lossy();
    let before = fs::read_to_string(&corpus()[0]).expect("readable");
    let after = done(&outrigger(&["inject", "--defaults", &file, "--image", "r.example/o:2"], &before));
    assert!(after.contains("image: r.example/o:2") && !after.contains("NET_ADMIN"), "{after}");

    // The ConfigMap is between the two defaults: it overrides one and is overridden by the other.
    let config_map = folder.path().join("outrigger.toml");
    fs::write(&config_map, "[defaults]\ntimeout = \"7s\"\nconnect_timeout = \"2s\"\n").expect("write");
    let pod = values(&after).iter().flat_map(pods).next().expect("a pod").clone();
    let (args, variables) = started_with(&pod, &config_map.to_string_lossy());
    let output = std::process::Command::new(crate::support::binary())
        .args(["explain", "GET", "http://nobody.example/"])
        .args(args)
        .envs(variables)
        .output()
        .expect("it runs");
    let printed = text(&output.stdout);
    let row = |key: &str| printed.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
    for (key, value, from) in [
        ("timeout ", "4s", "env:OUTRIGGER_PROXY"),
        ("connect_timeout ", "2s", "outrigger.toml"),
        ("idle_timeout ", "8s", "env:OUTRIGGER_DEFAULTS"),
    ] {
        assert!(row(key).contains(value) && row(key).contains(from), "{printed}{}", text(&output.stderr));
    }
}
