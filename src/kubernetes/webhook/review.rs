//! What is answered to an AdmissionReview (admission.k8s.io/v1). No I/O.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::kubernetes::{
    inject::{self, CONFIG_KEY, Defaults, InjectError, Outcome, Owner, proxy_config},
    patch::Operation,
};

const VERSION: &str = "admission.k8s.io/v1";
/// Where pods are that a cluster cannot do without. The webhook's own namespace comes to these.
const NEVER: &[&str] = &["kube-system", "kube-public", "kube-node-lease"];
/// Lists, objects and what is in them. A pod has hundreds; each takes many times the memory of its two or three letters.
const MAX_PARTS: usize = 100_000;
/// What an API server shows of a warning.
const WARNING: usize = 256;
/// What is told of a refusal; a configuration may have an error on each line.
const MESSAGE: usize = 8 << 10;
/// The longest answer: that to a pod with 50 containers by `mode: env`, or 200 by `redirect`.
const ANSWER: usize = 64 << 10;

/// What nobody but an attacker, or a bug, would send.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    #[error("the body is no AdmissionReview: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it is a {0}, not an AdmissionReview of {VERSION}")]
    Version(String),
    #[error("the review has no request")]
    Empty,
    #[error("the body has more than {MAX_PARTS} parts: that is no pod")]
    Parts,
    #[error("the answer would be longer than {} KiB: that is no pod", ANSWER >> 10)]
    Long,
}

/// What a webhook is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// What a pod is to be changed into.
    Mutate,
    /// Whether a ConfigMap may be.
    Validate,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: String,
    kind: String,
    request: Option<Request>,
}

#[derive(Deserialize)]
struct Request {
    uid: String,
    kind: Kind,
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    operation: String,
    #[serde(default)]
    object: Value,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(default)]
    group: String,
    kind: String,
}

/// What a request comes to.
#[derive(Debug, Default)]
struct Verdict {
    refused: Option<String>,
    patch: Vec<Operation>,
    warnings: Vec<String>,
}

impl Verdict {
    fn refuse(why: impl ToString) -> Self {
        Self { refused: Some(why.to_string()), ..Self::default() }
    }

    fn warn(why: String) -> Self {
        Self { warnings: vec![why], ..Self::default() }
    }
}

/// Answers a review, in JSON. `own`: the namespace that the webhook itself is in.
///
/// # Errors
///
/// Where the body is none, or one that nobody would send.
pub fn answer(
    question: Question,
    body: &[u8],
    defaults: &Defaults,
    own: Option<&str>,
) -> Result<String, ReviewError> {
    if parts(body) > MAX_PARTS {
        return Err(ReviewError::Parts);
    }
    let review: Review = serde_json::from_slice(body)?;
    if review.kind != "AdmissionReview" || review.api_version != VERSION {
        return Err(ReviewError::Version(format!("{} of {}", review.kind, review.api_version)));
    }
    let request = review.request.ok_or(ReviewError::Empty)?;
    let verdict = match question {
        Question::Mutate => mutate(&request, defaults, own),
        Question::Validate => validate(&request),
    };
    tell(&request, &verdict);
    let mut response = json!({"uid": request.uid, "allowed": verdict.refused.is_none()});
    if let Some(message) = verdict.refused {
        response["status"] = json!({"code": 422, "reason": "Invalid", "message": shorten(&format!("outrigger: {message}"), MESSAGE)});
    }
    if !verdict.patch.is_empty() {
        response["patchType"] = "JSONPatch".into();
        response["patch"] = STANDARD.encode(serde_json::to_vec(&verdict.patch)?).into();
    }
    if !verdict.warnings.is_empty() {
        let warning = |text: &String| shorten(&format!("outrigger: {text}"), WARNING);
        response["warnings"] = verdict.warnings.iter().map(warning).collect();
    }
    let answer = json!({"apiVersion": VERSION, "kind": "AdmissionReview", "response": response}).to_string();
    if answer.len() > ANSWER { Err(ReviewError::Long) } else { Ok(answer) }
}

/// At least as many as there are values in a JSON text, but for those that stand alone in what holds them.
fn parts(json: &[u8]) -> usize {
    let (mut count, mut in_string, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}

fn shorten(text: &str, length: usize) -> String {
    text.chars().take(length).collect()
}

fn tell(request: &Request, verdict: &Verdict) {
    let Request { namespace, operation, kind: Kind { kind, .. }, .. } = request;
    let name = name(request);
    match &verdict.refused {
        Some(why) => tracing::warn!(%kind, %namespace, %name, %operation, %why, "refused"),
        None => {
            let patched = !verdict.patch.is_empty();
            tracing::info!(%kind, %namespace, %name, %operation, patched, warnings = ?verdict.warnings, "reviewed");
        }
    }
}

/// A pod that is made from a template has no name yet.
fn name(request: &Request) -> &str {
    let metadata = &request.object["metadata"];
    let generated = || metadata["generateName"].as_str().map(|prefix| prefix.trim_end_matches('-'));
    let named = Some(&*request.name).filter(|name| !name.is_empty());
    named.or_else(|| metadata["name"].as_str()).or_else(generated).unwrap_or("?")
}

fn mutate(request: &Request, defaults: &Defaults, own: Option<&str>) -> Verdict {
    let is_new_pod =
        request.kind.kind == "Pod" && request.kind.group.is_empty() && request.operation == "CREATE";
    let never = NEVER.contains(&&*request.namespace) || own == Some(&*request.namespace);
    if !is_new_pod || never || inject::is_injected(&request.object) {
        return Verdict::default();
    }
    let references = request.object["metadata"]["ownerReferences"].as_array();
    let controller = references.into_iter().flatten().find(|reference| reference["controller"] == true);
    let owner = match controller.map(|owner| (owner["kind"].as_str(), owner["name"].as_str())) {
        Some((Some(kind), Some(name))) => Owner { kind, name },
        _ => Owner { kind: "Pod", name: name(request) },
    };
    match patch(&request.object, owner, defaults) {
        Ok(verdict) => verdict,
        Err(error) => Verdict::refuse(error),
    }
}

fn patch(pod: &Value, owner: Owner<'_>, defaults: &Defaults) -> Result<Verdict, InjectError> {
    // What is left of an injection whose containers somebody has taken out.
    let (mut pod, mut patch) = (pod.clone(), Vec::new());
    for step in inject::undo(&pod)? {
        step.operation.apply(&mut pod)?;
        patch.push(step.operation);
    }
    Ok(match inject::inject(&pod, owner, defaults, &|_| None)? {
        Outcome::Leave(None) => Verdict::default(),
        Outcome::Leave(Some(reason)) => Verdict::warn(format!("no sidecar: {reason}")),
        Outcome::Patch { operations, notes } => {
            patch.extend(operations);
            Verdict { patch, warnings: notes.into_iter().map(|note| note.0).collect(), refused: None }
        }
    })
}

fn validate(request: &Request) -> Verdict {
    let written = ["CREATE", "UPDATE"].contains(&&*request.operation);
    if !written || request.kind.kind != "ConfigMap" || !request.kind.group.is_empty() {
        return Verdict::default();
    }
    let text = match request.object["data"].get(CONFIG_KEY) {
        None => return Verdict::default(),
        Some(Value::String(text)) => text,
        Some(_) => return Verdict::refuse(format!("data.{CONFIG_KEY} is no string")),
    };
    match proxy_config::check(CONFIG_KEY, text) {
        Ok(warnings) => Verdict { warnings, ..Verdict::default() },
        Err(problems) => Verdict::refuse(format!("ConfigMap {} cannot be used:\n{problems}", name(request))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn review(kind: &str, namespace: &str, operation: &str, object: &Value) -> Vec<u8> {
        json!({"apiVersion": VERSION, "kind": "AdmissionReview", "request": {
            "uid": "u-1", "kind": {"group": "", "version": "v1", "kind": kind},
            "namespace": namespace, "operation": operation, "object": object
        }})
        .to_string()
        .into_bytes()
    }

    fn ask(question: Question, body: &[u8]) -> Value {
        let answer = answer(question, body, &Defaults::default(), Some("outrigger-system")).unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["response"]["uid"], "u-1");
        answer["response"].clone()
    }

    fn pod(annotations: &Value) -> Value {
        json!({"metadata": {"annotations": annotations}, "spec": {"containers": [{"name": "a", "image": "b"}]}})
    }

    #[test]
    fn pods_are_patched_where_they_may_be() {
        let plain = pod(&json!({}));
        let patched = |namespace, operation| {
            let response = ask(Question::Mutate, &review("Pod", namespace, operation, &plain));
            assert_eq!(response["allowed"], true);
            response.get("patch").is_some()
        };
        assert!(patched("shop", "CREATE"));
        assert!(!patched("shop", "UPDATE"));
        assert!(!patched("kube-system", "CREATE"));
        assert!(!patched("outrigger-system", "CREATE"));
    }

    #[test]
    fn a_pod_whose_words_make_no_sense_is_refused() {
        let body = review("Pod", "shop", "CREATE", &pod(&json!({"outrigger.dev/mode": "x"})));
        let response = ask(Question::Mutate, &body);
        assert_eq!((&response["allowed"], &response["status"]["code"]), (&false.into(), &422.into()));
        assert!(response["status"]["message"].as_str().unwrap().contains("outrigger.dev/mode"), "{response}");
    }

    #[test]
    fn what_somebody_took_out_in_part_is_put_in_anew() {
        let mut injected = pod(&json!({}));
        let first = patch(&injected, Owner { kind: "Pod", name: "p" }, &Defaults::default()).unwrap();
        first.patch.iter().for_each(|operation| operation.apply(&mut injected).unwrap());
        let whole = injected.clone();
        assert!(ask(Question::Mutate, &review("Pod", "shop", "CREATE", &injected)).get("patch").is_none());
        injected["spec"].as_object_mut().unwrap().shift_remove("initContainers");
        let second = patch(&injected, Owner { kind: "Pod", name: "p" }, &Defaults::default()).unwrap();
        second.patch.iter().for_each(|operation| operation.apply(&mut injected).unwrap());
        assert_eq!(injected, whole);
    }

    #[test]
    fn a_broken_configuration_is_refused_with_its_line() {
        let ask = |data: Value| {
            ask(Question::Validate, &review("ConfigMap", "shop", "UPDATE", &json!({"data": data})))
        };
        let response = ask(json!({"outrigger.toml": "[inbound]\nmtsl = \"strict\"\n"}));
        let message = response["status"]["message"].as_str().unwrap();
        assert!(message.contains("outrigger.toml:2") && message.contains("mtls"), "{message}");
        for fine in [
            json!({"outrigger.toml": "[inbound]\nmtls = \"off\"\n"}),
            json!({"app.toml": "= ="}),
            Value::Null,
        ] {
            assert_eq!(ask(fine)["allowed"], true);
        }
        assert_eq!(ask(json!({"outrigger.toml": 1}))["allowed"], false);
    }

    #[test]
    fn parts_are_counted_outside_of_strings() {
        for (json, expected) in [("", 0), ("[]", 1), ("[1,2,{\"a\":[]}]", 5), (r#"{"a,[{\",":",\\",0:0}"#, 2)]
        {
            assert_eq!(parts(json.as_bytes()), expected, "{json}");
        }
        let args = |count: usize| json!({"spec": {"containers": [{"name": "a", "args": vec![""; count]}]}});
        let answer = |count: usize| {
            let body = review("Pod", "shop", "CREATE", &args(count));
            answer(Question::Mutate, &body, &Defaults::default(), None).map(|_| ())
        };
        assert!(answer(1000).is_ok());
        assert!(matches!(answer(MAX_PARTS), Err(ReviewError::Parts)));
        // A long text is one part.
        let text = "a = [1, 2]\n".repeat(MAX_PARTS);
        let body = review("ConfigMap", "shop", "CREATE", &json!({"data": {"other": text}}));
        assert!(super::answer(Question::Validate, &body, &Defaults::default(), None).is_ok());
    }

    #[test]
    fn what_is_no_review_is_no_pod() {
        for body in [
            "",
            "{}",
            "[1]",
            r#"{"apiVersion":"v1","kind":"Pod"}"#,
            r#"{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview"}"#,
            r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}"#,
        ] {
            assert!(answer(Question::Mutate, body.as_bytes(), &Defaults::default(), None).is_err(), "{body}");
        }
        let deep = format!("{{\"a\":{}", "[".repeat(100_000));
        assert!(answer(Question::Mutate, deep.as_bytes(), &Defaults::default(), None).is_err());
        for object in [
            Value::Null,
            json!([]),
            json!({"spec": []}),
            json!({"spec": {"containers": "x"}}),
            json!({"spec": {"containers": [1]}}),
            json!({"metadata": 5, "spec": {"containers": [{"name": "a"}]}}),
            json!({"spec": {"containers": [{"name": "a", "env": "x", "livenessProbe": 1, "lifecycle": []}], "initContainers": {}, "volumes": 7}}),
        ] {
            let response = ask(Question::Mutate, &review("Pod", "shop", "CREATE", &object));
            assert!(response["allowed"] == false, "{object} {response}");
        }
    }

    #[test]
    fn answers_have_a_bound_that_no_pod_comes_near() {
        let with = |count: usize, mode: &str| {
            let containers: Vec<Value> = (0..count)
                .map(|number| json!({"name": format!("container-{number}"), "image": "b"}))
                .collect();
            let annotations = json!({"outrigger.dev/mode": mode});
            let pod = json!({"metadata": {"annotations": annotations}, "spec": {"containers": containers}});
            let body = review("Pod", "shop", "CREATE", &pod);
            answer(Question::Mutate, &body, &Defaults::default(), None)
        };
        for mode in ["redirect", "env"] {
            assert!(with(40, mode).is_ok());
            assert!(matches!(with(3_000, mode), Err(ReviewError::Long)));
        }
        let broken = "= 1\n".repeat(100_000);
        let broken = review("ConfigMap", "shop", "CREATE", &json!({"data": {CONFIG_KEY: broken}}));
        assert_eq!(ask(Question::Validate, &broken)["allowed"], false);
    }
}
