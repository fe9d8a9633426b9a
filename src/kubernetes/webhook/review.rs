//! The response to an AdmissionReview (admission.k8s.io/v1). No I/O.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::kubernetes::{
    inject::{self, CONFIG_KEY, Defaults, InjectError, InjectOutcome, Owner, proxy_config},
    patch::Operation,
};

const VERSION: &str = "admission.k8s.io/v1";
/// Namespaces with essential pods, which are never injected; nor is the webhook's own namespace.
const EXCLUDED_NAMESPACES: &[&str] = &["kube-system", "kube-public", "kube-node-lease"];
/// Most JSON values in a body. A pod has hundreds; each needs many times the memory of its two or three bytes of text.
const MAX_VALUES: usize = 100_000;
/// The longest warning, in characters; API servers truncate longer ones.
const MAX_WARNING: usize = 256;
/// The longest message of a rejection, in characters; a configuration may have an error on each line.
const MAX_MESSAGE: usize = 8 << 10;
/// The longest response, in bytes: enough for a pod with 50 containers with `mode: env`, or 200 with `redirect`.
const MAX_RESPONSE: usize = 64 << 10;

/// Why a body is not a valid review; API servers do not send such.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    #[error("the body is not an AdmissionReview: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it is a {0}, not an AdmissionReview of {VERSION}")]
    Version(String),
    #[error("the review has no request")]
    NoRequest,
    #[error("the body has more than {MAX_VALUES} values: that is not a pod")]
    TooManyValues,
    #[error("the response would be longer than {} KiB: that is not a pod", MAX_RESPONSE >> 10)]
    ResponseTooLong,
}

/// The kind of webhook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReviewKind {
    /// Inject a pod.
    Mutate,
    /// Validate a ConfigMap.
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

/// The decision on a request.
#[derive(Debug, Default)]
struct Decision {
    rejection: Option<String>,
    patch: Vec<Operation>,
    warnings: Vec<String>,
}

impl Decision {
    fn reject(reason: impl ToString) -> Self {
        Self { rejection: Some(reason.to_string()), ..Self::default() }
    }

    fn warn(reason: String) -> Self {
        Self { warnings: vec![reason], ..Self::default() }
    }
}

/// Responds to a review, in JSON. `own`: the webhook's own namespace.
///
/// # Errors
///
/// If the body is not a valid review, or it or the response is too large.
pub fn review_response(
    question: ReviewKind,
    body: &[u8],
    defaults: &Defaults,
    own: Option<&str>,
) -> Result<String, ReviewError> {
    if count_values(body) > MAX_VALUES {
        return Err(ReviewError::TooManyValues);
    }
    let review: Review = serde_json::from_slice(body)?;
    if review.kind != "AdmissionReview" || review.api_version != VERSION {
        return Err(ReviewError::Version(format!("{} of {}", review.kind, review.api_version)));
    }
    let request = review.request.ok_or(ReviewError::NoRequest)?;
    let decision = match question {
        ReviewKind::Mutate => mutate(&request, defaults, own),
        ReviewKind::Validate => validate(&request),
    };
    log_decision(&request, &decision);
    let mut response = json!({"uid": request.uid, "allowed": decision.rejection.is_none()});
    if let Some(message) = decision.rejection {
        response["status"] = json!({"code": 422, "reason": "Invalid", "message": shorten(&format!("outrigger: {message}"), MAX_MESSAGE)});
    }
    if !decision.patch.is_empty() {
        response["patchType"] = "JSONPatch".into();
        response["patch"] = STANDARD.encode(serde_json::to_vec(&decision.patch)?).into();
    }
    if !decision.warnings.is_empty() {
        let warning = |text: &String| shorten(&format!("outrigger: {text}"), MAX_WARNING);
        response["warnings"] = decision.warnings.iter().map(warning).collect();
    }
    let answer = json!({"apiVersion": VERSION, "kind": "AdmissionReview", "response": response}).to_string();
    if answer.len() > MAX_RESPONSE { Err(ReviewError::ResponseTooLong) } else { Ok(answer) }
}

/// Estimates the number of values in a JSON text: commas, `[` and `{` outside of strings.
fn count_values(json: &[u8]) -> usize {
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

fn log_decision(request: &Request, decision: &Decision) {
    let Request { namespace, operation, kind: Kind { kind, .. }, .. } = request;
    let name = name(request);
    match &decision.rejection {
        Some(reason) => tracing::warn!(%kind, %namespace, %name, %operation, %reason, "rejected"),
        None => {
            let patched = !decision.patch.is_empty();
            tracing::info!(%kind, %namespace, %name, %operation, patched, warnings = ?decision.warnings, "reviewed");
        }
    }
}

/// The name for logs. A pod created from a template has no name yet.
fn name(request: &Request) -> &str {
    let metadata = &request.object["metadata"];
    let generated = || metadata["generateName"].as_str().map(|prefix| prefix.trim_end_matches('-'));
    let named = Some(&*request.name).filter(|name| !name.is_empty());
    named.or_else(|| metadata["name"].as_str()).or_else(generated).unwrap_or("?")
}

fn mutate(request: &Request, defaults: &Defaults, own: Option<&str>) -> Decision {
    let is_new_pod =
        request.kind.kind == "Pod" && request.kind.group.is_empty() && request.operation == "CREATE";
    let excluded = EXCLUDED_NAMESPACES.contains(&&*request.namespace) || own == Some(&*request.namespace);
    if !is_new_pod || excluded || inject::is_injected(&request.object) {
        return Decision::default();
    }
    let references = request.object["metadata"]["ownerReferences"].as_array();
    let controller = references.into_iter().flatten().find(|reference| reference["controller"] == true);
    let owner = match controller.map(|owner| (owner["kind"].as_str(), owner["name"].as_str())) {
        Some((Some(kind), Some(name))) => Owner { kind, name },
        _ => Owner { kind: "Pod", name: name(request) },
    };
    match patch(&request.object, owner, defaults) {
        Ok(decision) => decision,
        Err(error) => Decision::reject(error),
    }
}

fn patch(pod: &Value, owner: Owner<'_>, defaults: &Defaults) -> Result<Decision, InjectError> {
    // Undo first: the containers of an earlier injection may have been removed by hand.
    let (mut pod, mut patch) = (pod.clone(), Vec::new());
    for step in inject::undo(&pod)? {
        step.operation.apply(&mut pod)?;
        patch.push(step.operation);
    }
    Ok(match inject::inject(&pod, owner, defaults, &|_| None)? {
        InjectOutcome::Skip(None) => Decision::default(),
        InjectOutcome::Skip(Some(reason)) => Decision::warn(format!("no sidecar: {reason}")),
        InjectOutcome::Patch { operations, notes } => {
            patch.extend(operations);
            Decision { patch, warnings: notes.into_iter().map(|note| note.0).collect(), rejection: None }
        }
    })
}

fn validate(request: &Request) -> Decision {
    let is_write = ["CREATE", "UPDATE"].contains(&&*request.operation);
    if !is_write || request.kind.kind != "ConfigMap" || !request.kind.group.is_empty() {
        return Decision::default();
    }
    let text = match request.object["data"].get(CONFIG_KEY) {
        None => return Decision::default(),
        Some(Value::String(text)) => text,
        Some(_) => return Decision::reject(format!("data.{CONFIG_KEY} is not a string")),
    };
    match proxy_config::check(CONFIG_KEY, text) {
        Ok(warnings) => Decision { warnings, ..Decision::default() },
        Err(problems) => Decision::reject(format!("ConfigMap {} is invalid:\n{problems}", name(request))),
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

    fn ask(question: ReviewKind, body: &[u8]) -> Value {
        let answer = review_response(question, body, &Defaults::default(), Some("outrigger-system")).unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["response"]["uid"], "u-1");
        answer["response"].clone()
    }

    fn pod(annotations: &Value) -> Value {
        json!({"metadata": {"annotations": annotations}, "spec": {"containers": [{"name": "a", "image": "b"}]}})
    }

    #[test]
    fn pods_are_injected_except_in_excluded_namespaces() {
        let plain = pod(&json!({}));
        let patched = |namespace, operation| {
            let response = ask(ReviewKind::Mutate, &review("Pod", namespace, operation, &plain));
            assert_eq!(response["allowed"], true);
            response.get("patch").is_some()
        };
        assert!(patched("shop", "CREATE"));
        assert!(!patched("shop", "UPDATE"));
        assert!(!patched("kube-system", "CREATE"));
        assert!(!patched("outrigger-system", "CREATE"));
    }

    #[test]
    fn a_pod_with_an_invalid_annotation_is_rejected() {
        let body = review("Pod", "shop", "CREATE", &pod(&json!({"outrigger.dev/mode": "x"})));
        let response = ask(ReviewKind::Mutate, &body);
        assert_eq!((&response["allowed"], &response["status"]["code"]), (&false.into(), &422.into()));
        assert!(response["status"]["message"].as_str().unwrap().contains("outrigger.dev/mode"), "{response}");
    }

    #[test]
    fn a_partly_removed_injection_is_repeated() {
        let mut injected = pod(&json!({}));
        let first = patch(&injected, Owner { kind: "Pod", name: "p" }, &Defaults::default()).unwrap();
        first.patch.iter().for_each(|operation| operation.apply(&mut injected).unwrap());
        let whole = injected.clone();
        assert!(ask(ReviewKind::Mutate, &review("Pod", "shop", "CREATE", &injected)).get("patch").is_none());
        injected["spec"].as_object_mut().unwrap().shift_remove("initContainers");
        let second = patch(&injected, Owner { kind: "Pod", name: "p" }, &Defaults::default()).unwrap();
        second.patch.iter().for_each(|operation| operation.apply(&mut injected).unwrap());
        assert_eq!(injected, whole);
    }

    #[test]
    fn an_invalid_configuration_is_rejected_with_its_line() {
        let ask = |data: Value| {
            ask(ReviewKind::Validate, &review("ConfigMap", "shop", "UPDATE", &json!({"data": data})))
        };
        let response = ask(json!({"outrigger.toml": "[inbound]\nmtsl = \"strict\"\n"}));
        let message = response["status"]["message"].as_str().unwrap();
        assert!(message.contains("outrigger.toml:2") && message.contains("mtls"), "{message}");
        for valid in [
            json!({"outrigger.toml": "[inbound]\nmtls = \"off\"\n"}),
            json!({"app.toml": "= ="}),
            Value::Null,
        ] {
            assert_eq!(ask(valid)["allowed"], true);
        }
        assert_eq!(ask(json!({"outrigger.toml": 1}))["allowed"], false);
    }

    #[test]
    fn values_are_counted_outside_of_strings() {
        for (json, expected) in [("", 0), ("[]", 1), ("[1,2,{\"a\":[]}]", 5), (r#"{"a,[{\",":",\\",0:0}"#, 2)]
        {
            assert_eq!(count_values(json.as_bytes()), expected, "{json}");
        }
        let args = |count: usize| json!({"spec": {"containers": [{"name": "a", "args": vec![""; count]}]}});
        let answer = |count: usize| {
            let body = review("Pod", "shop", "CREATE", &args(count));
            review_response(ReviewKind::Mutate, &body, &Defaults::default(), None).map(|_| ())
        };
        assert!(answer(1000).is_ok());
        assert!(matches!(answer(MAX_VALUES), Err(ReviewError::TooManyValues)));
        // A long string is one value.
        let text = "a = [1, 2]\n".repeat(MAX_VALUES);
        let body = review("ConfigMap", "shop", "CREATE", &json!({"data": {"other": text}}));
        assert!(super::review_response(ReviewKind::Validate, &body, &Defaults::default(), None).is_ok());
    }

    #[test]
    fn invalid_reviews_and_pods_are_rejected() {
        for body in [
            "",
            "{}",
            "[1]",
            r#"{"apiVersion":"v1","kind":"Pod"}"#,
            r#"{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview"}"#,
            r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}"#,
        ] {
            assert!(
                review_response(ReviewKind::Mutate, body.as_bytes(), &Defaults::default(), None).is_err(),
                "{body}"
            );
        }
        let deep = format!("{{\"a\":{}", "[".repeat(100_000));
        assert!(review_response(ReviewKind::Mutate, deep.as_bytes(), &Defaults::default(), None).is_err());
        for object in [
            Value::Null,
            json!([]),
            json!({"spec": []}),
            json!({"spec": {"containers": "x"}}),
            json!({"spec": {"containers": [1]}}),
            json!({"metadata": 5, "spec": {"containers": [{"name": "a"}]}}),
            json!({"spec": {"containers": [{"name": "a", "env": "x", "livenessProbe": 1, "lifecycle": []}], "initContainers": {}, "volumes": 7}}),
        ] {
            let response = ask(ReviewKind::Mutate, &review("Pod", "shop", "CREATE", &object));
            assert!(response["allowed"] == false, "{object} {response}");
        }
    }

    #[test]
    fn responses_are_limited_far_above_real_pods() {
        let with = |count: usize, mode: &str| {
            let containers: Vec<Value> = (0..count)
                .map(|number| json!({"name": format!("container-{number}"), "image": "b"}))
                .collect();
            let annotations = json!({"outrigger.dev/mode": mode});
            let pod = json!({"metadata": {"annotations": annotations}, "spec": {"containers": containers}});
            let body = review("Pod", "shop", "CREATE", &pod);
            review_response(ReviewKind::Mutate, &body, &Defaults::default(), None)
        };
        for mode in ["redirect", "env"] {
            assert!(with(40, mode).is_ok());
            assert!(matches!(with(3_000, mode), Err(ReviewError::ResponseTooLong)));
        }
        let broken = "= 1\n".repeat(100_000);
        let broken = review("ConfigMap", "shop", "CREATE", &json!({"data": {CONFIG_KEY: broken}}));
        assert_eq!(ask(ReviewKind::Validate, &broken)["allowed"], false);
    }
}
