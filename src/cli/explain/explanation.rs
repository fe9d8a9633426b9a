//! The explanation of a request, as text and as JSON.

use std::fmt;

use http::Method;
use serde_json::json;

use super::{cache, inbound, request::ExplainedRequest};
use crate::{
    config::{
        FilePosition, HostMatch, LoadedConfig, Policy, Protocol, Route, Scope, Setting, UnknownHostPolicy,
        did_you_mean,
    },
    model::Router,
    proxy::queue::why_not_queued,
    redact,
    resilience::{
        queue::keys::QueueWhen,
        retry::RetryMethods,
        split::{RouteTo, Split, StickyKey},
    },
    telemetry::export::Collector,
    url_path::normalise,
};

/// The explanation: upstream, route, notes and effective settings.
#[derive(Debug, Default)]
pub struct Explanation {
    request: String,
    /// Upstream, route and so on: name, value, source location.
    facts: Vec<(&'static str, String, Option<FilePosition>)>,
    notes: Vec<String>,
    values: Vec<Line>,
}

#[derive(Debug)]
struct Line {
    key: String,
    value: String,
    place: Option<FilePosition>,
    /// Why it does not apply to this request.
    inactive: Option<String>,
}

/// Which part of the policy applies.
#[derive(Clone, Copy, PartialEq)]
enum PolicyScope {
    Everything,
    /// Connect, limit and idle policy only: a byte stream.
    BytesOnly,
}

pub fn explain(loaded: &LoadedConfig, target: &ExplainedRequest) -> Explanation {
    let mut verdict = judge(loaded, target);
    let shown = |text: &mut String| {
        let whole = redact::redact_userinfo(text).into_owned();
        *text = redact::redact_secrets(&loaded.config.env_secrets, whole);
    };
    verdict.facts.iter_mut().for_each(|(_, value, _)| shown(value));
    verdict.notes.iter_mut().for_each(shown);
    verdict.values.iter_mut().for_each(|line| shown(&mut line.value));
    verdict
}

fn judge(loaded: &LoadedConfig, target: &ExplainedRequest) -> Explanation {
    let mut verdict =
        Explanation { request: format!("{} {}", target.method, target.url), ..Explanation::default() };
    let (scope, reach) = if target.inbound {
        verdict.fact("service", loaded.config.inbound.forward_to.to_string(), None);
        inbound::authorization(&mut verdict, loaded, target);
        let router = Router::new(&loaded.config);
        let found = router
            .inbound()
            .and_then(|routes| routes.find(&target.method, target.path.path(), &target.headers));
        if let Some(route) = found.and_then(|index| loaded.config.inbound.routes.get(index)) {
            verdict.fact("route", route.matches.to_string(), None);
            verdict.queue(loaded, target, route, None);
        }
        (Some(Scope::Inbound), PolicyScope::Everything)
    } else {
        verdict.outbound(loaded, target)
    };
    verdict.traces(loaded, target);
    let Some(scope) = scope else { return verdict };
    if let Some(at) = serving(loaded, scope) {
        for setting in loaded.upstream_settings(at) {
            if !["name", "hosts"].contains(&setting.key.as_str()) {
                verdict.value(loaded, setting, None);
            }
        }
    }
    if let Some(policy) = loaded.policy(scope) {
        if reach == PolicyScope::Everything
            && target.method != Method::CONNECT
            && let Some(text) = cache::describe(policy, target)
        {
            verdict.fact("cache", text, None);
        }
        for setting in loaded.policy_settings(scope) {
            let inactive = inactive(&setting, policy, target, reach);
            verdict.value(loaded, setting, inactive);
        }
        verdict.notes.extend(retry_note(policy, target, reach));
    }
    verdict
}

impl Explanation {
    pub(super) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    pub(super) fn fact(&mut self, name: &'static str, value: String, place: Option<FilePosition>) {
        self.facts.push((name, value, place));
    }

    fn value(&mut self, loaded: &LoadedConfig, setting: Setting, inactive: Option<String>) {
        let place = setting.origin.and_then(|origin| loaded.sources.position(origin));
        self.values.push(Line { key: setting.key, value: setting.value, place, inactive });
    }

    /// Adds where the request's spans go.
    fn traces(&mut self, loaded: &LoadedConfig, target: &ExplainedRequest) {
        let telemetry = &loaded.config.telemetry;
        let Some(to) = Collector::from_config(telemetry).filter(|_| !target.opaque) else { return };
        let place = loaded.tree.get("telemetry").and_then(|node| node.get("otlp")?.origin);
        let errors = if telemetry.sample_errors { ", and all that fail" } else { "" };
        let which =
            format!("{} of traces that start here, others as their client decided{errors}", telemetry.sample);
        self.fact(
            "traces",
            format!("to {to}: {which}"),
            place.and_then(|origin| loaded.sources.position(origin)),
        );
    }

    /// The scope whose policy applies; `None` where the request is refused.
    fn outbound(&mut self, loaded: &LoadedConfig, target: &ExplainedRequest) -> (Option<Scope>, PolicyScope) {
        let router = Router::new(&loaded.config);
        let place = |scope| loaded.scope_origin(scope).and_then(|origin| loaded.sources.position(origin));
        let bytes = PolicyScope::BytesOnly;
        if target.opaque {
            let port =
                target.port.filter(|port| *port != 443).map_or(String::new(), |port| format!(":{port}"));
            let path = target.path.path();
            let what =
                if target.method == Method::CONNECT { "CONNECT" } else { "https goes through CONNECT" };
            self.notes
                .push(format!("{what}: bytes only, call http://{}{port}{path} to get policies", target.host));
        } else if target.method == Method::CONNECT {
            self.notes.push(
                "the protocol inside the tunnel is detected: plain HTTP gets the full policy, other bytes only \
                 connect, limit and idle policy"
                    .to_owned(),
            );
        }
        let Some(at) = router.upstream(&target.host, target.port) else {
            return (
                self.unnamed(loaded, target, place(Scope::Defaults)),
                if target.opaque { bytes } else { PolicyScope::Everything },
            );
        };
        let upstream = &loaded.config.upstreams[at];
        self.fact("upstream", upstream.name.clone(), place(Scope::Upstream(at)));
        let tcp = upstream.protocol == Protocol::Tcp;
        if tcp {
            self.notes.push("protocol = tcp: bytes only".to_owned());
        }
        if tcp || target.opaque {
            return (Some(Scope::Upstream(at)), bytes);
        }
        let found = router.routes(at).and_then(|routes| {
            Some((routes, routes.find(&target.method, target.path.path(), &target.headers)?))
        });
        let Some((routes, index)) = found.filter(|_| target.method != Method::CONNECT) else {
            self.fact("route", "none matches: the upstream's own policy".to_owned(), None);
            return (Some(Scope::Upstream(at)), PolicyScope::Everything);
        };
        let Some(route) = upstream.routes.get(index) else {
            self.fact("route", "the deliveries of its queues".to_owned(), None);
            return (Some(Scope::Upstream(at)), PolicyScope::Everything);
        };
        let scope = Scope::Route(at, index);
        self.fact("route", route.matches.to_string(), place(scope));
        if let Some(to) = &route.to {
            self.fact("to", describe_destination(to, &route.sticky), place(scope));
        }
        if let Some(mirror) = &route.mirror {
            let copied = mirror.methods.iter().any(|method| method == target.method.as_str());
            let text = match copied {
                true => format!("{} % of the requests to {}", *mirror.ratio * 100.0, mirror.upstream),
                false => format!("not copied: `methods` is {}", mirror.methods.join(", ")),
            };
            self.fact("mirror", text, place(scope));
        }
        let path = normalise(target.path.path());
        if path != target.path.path() {
            self.fact("matched as", path.into_owned(), None);
        }
        if let Some(path) = routes.rewrite(index, &target.path) {
            self.fact("path", path.to_string(), place(scope));
        }
        for (name, edits) in [("request", &route.request_headers), ("response", &route.response_headers)] {
            for (header, value) in edits.set.iter() {
                self.notes.push(format!("{name} header {header} is set to {value}"));
            }
            for header in &edits.remove {
                self.notes.push(format!("{name} header {header} is removed"));
            }
        }
        self.queue(loaded, target, route, place(scope));
        (Some(scope), PolicyScope::Everything)
    }

    /// Whether the request is queued.
    fn queue(
        &mut self,
        loaded: &LoadedConfig,
        target: &ExplainedRequest,
        route: &Route,
        place: Option<FilePosition>,
    ) {
        let Some(queue) = &route.queue else { return };
        let text = match why_not_queued(queue, &target.method, &target.headers) {
            Some(why) => format!("not queued: {why}"),
            None if queue.when == QueueWhen::Unavailable => {
                format!("queued: {} (202), if the service is unavailable", queue.name)
            }
            None => format!("queued: {} (202)", queue.name),
        };
        let is_known = loaded.config.queues.iter().any(|known| known.name == queue.name);
        self.fact("queue", text, place.filter(|_| is_known));
    }

    /// A host that no upstream names.
    fn unnamed(
        &mut self,
        loaded: &LoadedConfig,
        target: &ExplainedRequest,
        place: Option<FilePosition>,
    ) -> Option<Scope> {
        let outbound = &loaded.config.outbound;
        let hosts = loaded.config.upstreams.iter().flat_map(|upstream| &upstream.hosts);
        let named = hosts.filter_map(|pattern| match &pattern.host {
            HostMatch::Exact(host) => Some(host.as_str()),
            _ => None,
        });
        if let Some(near) = did_you_mean(&target.host, named) {
            self.notes.push(format!("did you mean `{near}`?"));
        }
        let address: Option<std::net::IpAddr> =
            target.host.trim_start_matches('[').trim_end_matches(']').parse().ok();
        let denied =
            address.and_then(|ip| outbound.deny_networks.iter().find(|network| network.contains(ip)));
        if outbound.unknown == UnknownHostPolicy::Deny {
            self.fact(
                "upstream",
                "none names this host: refused, unknown = deny (unknown_upstream)".to_owned(),
                None,
            );
            return None;
        }
        if let Some(network) = denied {
            self.fact(
                "upstream",
                format!("none; refused: {network} is in deny_networks (denied_network)"),
                None,
            );
            return None;
        }
        self.fact(
            "upstream",
            "none names this host: forwarded with the policy of [defaults]".to_owned(),
            place,
        );
        Some(Scope::Defaults)
    }

    pub fn to_json(&self) -> serde_json::Value {
        let place = |place: &Option<FilePosition>| match place {
            Some(place) => json!({ "file": place.file, "line": place.line }),
            None => serde_json::Value::Null,
        };
        let facts: serde_json::Map<String, serde_json::Value> = self
            .facts
            .iter()
            .map(|(name, value, at)| (name.replace(' ', "_"), json!({ "value": value, "set_by": place(at) })))
            .collect();
        let values: Vec<_> = self
            .values
            .iter()
            .map(|line| {
                json!({ "key": line.key, "value": line.value, "set_by": place(&line.place), "inactive": line.inactive })
            })
            .collect();
        json!({ "request": self.request, "facts": facts, "notes": self.notes, "values": values })
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.request)?;
        let width = |texts: &mut dyn Iterator<Item = &str>, most: usize| {
            texts.map(|text| text.chars().count()).filter(|width| *width <= most).max().unwrap_or(0)
        };
        let keys =
            self.values.iter().map(|line| line.key.as_str()).chain(self.facts.iter().map(|fact| fact.0));
        let keys = width(&mut { keys }, 40);
        // One long value should not push all source locations off the screen.
        let values = width(&mut self.values.iter().map(|line| line.value.as_str()), 24);
        for (name, value, place) in &self.facts {
            let place = place.as_ref().map_or(String::new(), ToString::to_string);
            writeln!(f, "{}", format!("{name:keys$}  {value:values$}  {place}").trim_end())?;
        }
        for note in &self.notes {
            writeln!(f, "{:keys$}  {note}", "note")?;
        }
        if !self.values.is_empty() {
            writeln!(f)?;
        }
        for line in &self.values {
            let place = line.place.as_ref().map_or("default".to_owned(), ToString::to_string);
            write!(f, "{:keys$}  {:values$}  {place}", line.key, line.value)?;
            match &line.inactive {
                Some(why) => writeln!(f, "  (inactive: {why})")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

/// `to` of a route, e.g. `90 % shop, 10 % orders-v2, by header:x-user`.
fn describe_destination(to: &RouteTo, sticky: &StickyKey) -> String {
    let targets = match to {
        RouteTo::One(name) => return name.clone(),
        RouteTo::Split(targets) => targets,
    };
    let shares: Vec<String> = Split::new(targets)
        .report()
        .iter()
        .map(|share| format!("{} % {}", (share.share * 1000.0).round() / 10.0, share.upstream))
        .collect();
    let by = if *sticky == StickyKey::None { String::new() } else { format!(", by {sticky}") };
    format!("{}{by}", shares.join(", "))
}

/// The upstream that serves most requests of a route.
fn usual_upstream(to: &RouteTo) -> Option<&str> {
    match to {
        RouteTo::One(name) => Some(name),
        RouteTo::Split(targets) => {
            // The first of those with the greatest weight.
            targets.iter().rev().max_by_key(|target| target.weight).map(|target| target.upstream.as_str())
        }
    }
}

/// The upstream whose endpoints serve the request: that of a route's `to`, else its own.
fn serving(loaded: &LoadedConfig, scope: Scope) -> Option<usize> {
    let upstreams = &loaded.config.upstreams;
    match scope {
        Scope::Inbound | Scope::Defaults => None,
        Scope::Upstream(at) => Some(at),
        Scope::Route(at, route) => match &upstreams.get(at)?.routes.get(route)?.to {
            Some(to) => {
                let name = usual_upstream(to)?;
                upstreams.iter().position(|upstream| upstream.name == name)
            }
            None => Some(at),
        },
    }
}

/// Why a value does not apply to this request, if it does not.
fn inactive(
    setting: &Setting,
    policy: &Policy,
    target: &ExplainedRequest,
    reach: PolicyScope,
) -> Option<String> {
    let key = setting.key.as_str();
    let because = |why: &str| Some(why.to_owned());
    if setting.value == "false" {
        return None;
    }
    let for_bytes = ["connect_timeout", "tunnel_idle_timeout", "max_duration", "limits.max_connections"];
    if reach == PolicyScope::BytesOnly {
        return if for_bytes.contains(&key) { None } else { because("bytes only") };
    }
    let retries = policy.retry.0.as_ref().filter(|retry| retry.max > 0);
    match key {
        "timeout" if target.is_grpc() && !policy.route_sets_timeout => {
            because("gRPC requests have their grpc-timeout, unless a route sets one")
        }
        "attempt_timeout" if target.is_grpc() && !policy.route_sets_attempt_timeout => {
            because("gRPC requests have their grpc-timeout, unless a route sets one")
        }
        "retry.max" => None,
        _ if key.starts_with("retry.") && retries.is_none() => because("max = 0"),
        "retry.on" => grpc_inactive(policy),
        "retry.body_limit" if !may_retry(policy, target) => because("the method is not retried"),
        _ if key.starts_with("hedge.") && !target.is_idempotent() => because("not idempotent"),
        _ if key.starts_with("hedge.") && retries.is_none() => because("max = 0 allows no second copy"),
        _ => None,
    }
}

/// gRPC requests are POST: their status codes apply only where POST may be retried.
fn grpc_inactive(policy: &Policy) -> Option<String> {
    let retry = policy.retry.0.as_ref()?;
    let methods = match &retry.methods {
        RetryMethods::All => return None,
        RetryMethods::Idempotent => "idempotent".to_owned(),
        RetryMethods::Listed(methods) if methods.iter().any(|method| method == "POST") => return None,
        RetryMethods::Listed(methods) => methods.join(", "),
    };
    let codes = retry.on.iter().map(ToString::to_string).filter(|name| name.starts_with("grpc-"));
    let codes: Vec<String> = codes.collect();
    (!codes.is_empty()).then(|| format!("{}: methods = {methods}", codes.join(", ")))
}

fn may_retry(policy: &Policy, target: &ExplainedRequest) -> bool {
    match policy.retry.0.as_ref().map(|retry| &retry.methods) {
        Some(RetryMethods::All) => true,
        Some(RetryMethods::Idempotent) => target.is_idempotent(),
        Some(RetryMethods::Listed(methods)) => methods.iter().any(|method| method == target.method.as_str()),
        None => false,
    }
}

fn retry_note(policy: &Policy, target: &ExplainedRequest, reach: PolicyScope) -> Option<String> {
    let retries = policy.retry.0.as_ref().is_some_and(|retry| retry.max > 0);
    (retries
        && reach == PolicyScope::Everything
        && target.method != Method::CONNECT
        && !may_retry(policy, target))
    .then(|| {
        format!(
            "{} is not retried once it may have reached the service; an attempt that certainly did not is",
            target.method
        )
    })
}

#[cfg(test)]
mod tests;
