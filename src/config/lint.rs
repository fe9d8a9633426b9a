//! Lint: warnings about what is valid but probably not intended, from the configuration alone.

mod authorization;
mod route;
mod store;
mod telemetry;

use std::time::Duration;

use super::{
    AdminListen, AttemptTimeout, Config, Endpoints, ListenAddr, Node, Policy, Protocol,
    diagnostic::{Problem, Problems},
    resolve::{inherit, split_policy_keys},
    source::Origin,
};
use crate::{
    resilience::{
        hedge::HedgeAfter,
        retry::{RetryMethods, RetrySettings},
    },
    units::HumanDuration,
};

/// Kubernetes' default time between SIGTERM and SIGKILL.
const POD_GRACE: Duration = Duration::from_secs(30);
/// A failure rate that acts only above this many requests per second gets a warning: usual traffic is far below.
const BUSY: f64 = 100.0;

/// Lower ports traditionally need a privilege, so containers rarely listen on them.
const FIRST_UNPRIVILEGED: u16 = 1024;

pub(super) fn lint(config: &Config, root: &Node, problems: &mut Problems) {
    let mut lints = Lints { root, problems };
    lints.drain(config);
    lints.reachable(config);
    lints.service_ports(config);
    lints.endpoints(config);
    lints.authorization(config);
    lints.telemetry(config);
    lints.store(config);
    lints.policy(&config.defaults, root.get("defaults"), root.get("defaults"));
    lints.policy(&config.inbound.policy, root.get("inbound"), root.get("inbound"));
    let defaults = root.get("defaults").map(|node| split_policy_keys(node).0).unwrap_or_default();
    for (index, upstream) in config.upstreams.iter().enumerate() {
        let Some(node) = root.get("upstream").and_then(|list| list.item(index)) else { continue };
        let table = inherit(&defaults, split_policy_keys(node).0);
        let effective = Node { origin: node.origin, value: super::Value::Table(table.clone()) };
        // Inherited values were checked above already; they have the same place, and one place is reported once.
        lints.policy(&upstream.policy, Some(&effective), Some(node));
        for (at, route) in upstream.routes.iter().enumerate() {
            let Some(node) = node.get("route").and_then(|list| list.item(at)) else { continue };
            let effective = inherit(&table, split_policy_keys(node).0);
            let effective = Node { origin: node.origin, value: super::Value::Table(effective) };
            lints.policy(&route.policy, Some(&effective), Some(node));
            lints.shared_state(node);
            let earlier = upstream.routes[..at].iter().any(|earlier| earlier.matches == route.matches);
            if earlier {
                let help = "an earlier route has the same `match`; combine them";
                lints.warn(node.origin, "this route is never taken", help);
            }
            let connection = upstream.protocol == Protocol::Tcp;
            if connection {
                lints.warn(
                    node.origin,
                    "this route is never taken",
                    "protocol = \"tcp\" forwards bytes, not requests",
                );
            }
        }
    }
}

struct Lints<'a> {
    root: &'a Node,
    problems: &'a mut Problems,
}

impl Lints<'_> {
    /// Warns only about what the files set, not about built-in defaults.
    fn warn(&mut self, origin: Option<Origin>, message: impl Into<String>, help: impl Into<String>) {
        if origin.is_some() {
            self.problems.push(Problem::warning(origin, message).help(help));
        }
    }

    fn drain(&mut self, config: &Config) {
        let runtime = &config.runtime;
        let whole = runtime.drain_delay.saturating_add(*runtime.drain_timeout);
        if whole > POD_GRACE {
            let node = self.root.get("runtime");
            let key = |key| node.and_then(|node| node.get(key)).and_then(|value| value.origin);
            self.warn(
                key("drain_delay").or(key("drain_timeout")),
                format!("draining takes up to {}, and a pod is killed after 30s", HumanDuration(whole)),
                "shorten drain_delay or drain_timeout, or raise terminationGracePeriodSeconds above their sum",
            );
        }
    }

    /// A client that can reach the outbound or the admin port can send requests in the service's name.
    fn reachable(&mut self, config: &Config) {
        let place = |section: &str, key: &str| self.root.get(section)?.get(key)?.origin;
        let mut found = Vec::new();
        let help = "write \"localhost:PORT\", unless a firewall keeps other hosts away";
        if !is_loopback(&config.outbound.listen) {
            found.push((
                place("outbound", "listen"),
                "other hosts can send requests in this service's name",
                help,
            ));
        }
        if let AdminListen::Tcp(address) = &config.admin.listen
            && !is_loopback(address)
        {
            let help = "keep it on localhost; `probe_listen` is for kubelet and Prometheus";
            found.push((place("admin", "listen"), "other hosts can read the admin pages", help));
        }
        for (index, upstream) in config.upstreams.iter().enumerate() {
            if upstream.listen.as_ref().is_some_and(|address| !is_loopback(address)) {
                let node = self.root.get("upstream").and_then(|list| list.item(index));
                let origin = node.and_then(|node| node.get("listen")).and_then(|listen| listen.origin);
                found.push((origin, "other hosts can send requests in this service's name", help));
            }
        }
        for (origin, message, help) in found {
            self.warn(origin, message, help);
        }
    }

    /// Pods rarely listen on such a port. Probably the Service's own port is meant, which EndpointSlices do not
    /// contain.
    fn service_ports(&mut self, config: &Config) {
        for (index, upstream) in config.upstreams.iter().enumerate() {
            let Endpoints::Kubernetes { port, .. } = &upstream.endpoints else { continue };
            if port.parse::<u16>().is_ok_and(|number| number < FIRST_UNPRIVILEGED) {
                let node = self.root.get("upstream").and_then(|list| list.item(index));
                self.warn(
                    node.and_then(|node| node.get("endpoints")).and_then(|endpoints| endpoints.origin),
                    format!("port {port} is compared with the ports of the pods; a Service's own port number is known only if it has a single port"),
                    "write the port's name, as in \"k8s://NAMESPACE/SERVICE:http\"",
                );
            }
        }
    }

    /// A duplicate endpoint counts as two for balancing, ejection and health checks.
    fn endpoints(&mut self, config: &Config) {
        for (index, upstream) in config.upstreams.iter().enumerate() {
            let Endpoints::Fixed(list) = &upstream.endpoints else { continue };
            let node = self.root.get("upstream").and_then(|list| list.item(index)?.get("endpoints"));
            for (at, address) in list.iter().enumerate() {
                if list[..at].contains(address) {
                    let origin = node.and_then(|node| node.item(at)?.origin);
                    let message = format!("endpoint {address} is listed twice");
                    self.warn(origin, message, "leave one out; weights are for dns+srv:// and file://");
                }
            }
        }
    }

    /// `effective` has the places of the effective values, `own` is the table itself.
    fn policy(&mut self, policy: &Policy, effective: Option<&Node>, own: Option<&Node>) {
        let at = |path: &[&str]| {
            let mut node = effective?;
            for key in path {
                match node.get(key) {
                    Some(next) => node = next,
                    None => break,
                }
            }
            // A table that sets none of it gets no warning.
            (Some(node.origin) != effective.map(|node| node.origin)).then_some(node.origin).flatten()
        };
        if let Some(retry) = policy.retry.0.as_ref().filter(|retry| retry.max > 0) {
            self.retry_methods(retry, at(&["retry", "methods"]));
            self.attempts_fit(policy, retry, [at(&["attempt_timeout"]), at(&["timeout"])]);
        }
        if let (AttemptTimeout::Fixed(attempt), Some(timeout)) =
            (policy.attempt_timeout, policy.timeout.limit())
            && *attempt > timeout
        {
            let origin = at(&["attempt_timeout"]).or(at(&["timeout"]));
            let message = format!("attempt_timeout {attempt} is longer than timeout {}", policy.timeout);
            self.warn(origin, message, "it never acts; shorten it, or leave \"auto\"");
        }
        if let Some(timeout) = policy.timeout.limit() {
            let connect = at(&["connect_timeout"]);
            if *policy.connect_timeout > timeout && connect.is_some() {
                let message = format!(
                    "connect_timeout {} is longer than timeout {}",
                    policy.connect_timeout, policy.timeout
                );
                self.warn(connect, message, "it never acts: shorten it, or raise timeout");
            }
            if let Some(HedgeAfter::Fixed(after)) = policy.hedge.0.as_ref().map(|hedge| hedge.after)
                && *after > timeout
            {
                let message = format!("hedge.after {after} is longer than timeout {}", policy.timeout);
                self.warn(
                    at(&["hedge", "after"]),
                    message,
                    "no hedge is ever sent: shorten it, or raise timeout",
                );
            }
        }
        if let Some(breaker) = &policy.breaker.0 {
            let off = breaker.consecutive_failures == 0 && *breaker.failure_rate <= 0.0;
            if off {
                self.warn(
                    at(&["breaker"]),
                    "this breaker never opens",
                    "write `breaker = false`, or set a rate",
                );
            }
            let needed = f64::from(breaker.min_requests) / breaker.window.as_secs_f64();
            if *breaker.failure_rate > 0.0 && needed > BUSY {
                let message = format!("failure_rate needs {needed:.0} requests a second to act at all");
                self.warn(at(&["breaker", "min_requests"]), message, "lower min_requests, or widen window");
            }
        }
        if let Some(fault) = policy.fault.0.as_ref() {
            let delays = !fault.delay.is_zero() && *fault.delay_ratio > 0.0;
            let aborts = fault.abort.is_some() && *fault.abort_ratio > 0.0;
            if !delays && !aborts {
                let help = "give delay and delay_ratio, or abort and abort_ratio";
                self.warn(at(&["fault"]), "this fault never happens", help);
            }
        }
        let is_inherited = own.is_none_or(|own| own.get("hedge").is_none());
        let no_retry = policy.retry.0.as_ref().is_none_or(|retry| retry.max == 0);
        if policy.hedge.0.is_some() && no_retry && !is_inherited {
            let help = "a hedge is an early retry: retry.max must be at least 1";
            self.warn(at(&["hedge"]), "this hedge never happens", help);
        }
    }

    fn retry_methods(&mut self, retry: &RetrySettings, origin: Option<Origin>) {
        let help = "make sure that the service tolerates the same request twice, e.g. by an Idempotency-Key";
        match &retry.methods {
            RetryMethods::Idempotent => {}
            RetryMethods::All => self.warn(origin, "requests that change something may be sent twice", help),
            RetryMethods::Listed(methods) => {
                let risky =
                    methods.iter().find(|m| m.parse().is_ok_and(|m: http::Method| !m.is_idempotent()));
                if let Some(method) = risky {
                    self.warn(origin, format!("{method} may be sent twice"), help);
                }
            }
        }
    }

    /// A fixed attempt timeout with which not all attempts fit into `timeout`.
    fn attempts_fit(&mut self, policy: &Policy, retry: &RetrySettings, places: [Option<Origin>; 2]) {
        let (AttemptTimeout::Fixed(attempt), Some(timeout)) =
            (policy.attempt_timeout, policy.timeout.limit())
        else {
            return;
        };
        if attempt.is_zero() || *attempt > timeout {
            return;
        }
        let attempts = retry.max + 1;
        let waits: Duration = (0..retry.max)
            .map(|n| retry.backoff.base.saturating_mul(1 << n.min(16)).min(*retry.backoff.max))
            .fold(Duration::ZERO, Duration::saturating_add);
        let needed = attempt.saturating_mul(attempts).saturating_add(waits);
        if needed > timeout {
            self.warn(
                places[0].or(places[1]),
                format!(
                    "{attempts} attempts of {attempt} and the waits between them take up to {}, timeout is {}",
                    HumanDuration(needed),
                    policy.timeout
                ),
                "the last attempts are cut short: raise timeout, shorten attempt_timeout, or leave \"auto\"",
            );
        }
    }
}

fn is_loopback_host(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

fn is_loopback(address: &ListenAddr) -> bool {
    address.0.host == "localhost" || address.0.socket_addr().is_some_and(|address| address.ip().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Sources, parse::parse, resolve::resolve};

    /// Resolves and lints without rejecting errors.
    fn warnings(text: &str) -> Vec<String> {
        let mut problems = Problems::default();
        let tree = parse(text, 0, &|_| None, &mut problems);
        let config = resolve(&tree, "s".to_owned(), &mut problems);
        lint(&config, &tree, &mut problems);
        let sources = Sources(vec![crate::config::Source { path: "x".into(), text: text.to_owned() }]);
        problems.finish(sources).lines()
    }

    #[test]
    fn warns_once() {
        for (text, message) in [
            ("[runtime]\ndrain_delay = '10s'", "x:2:15: warning: draining takes up to 35s"),
            (
                "[store]\nkey_file='k'\nmax_bytes='1MiB'\n[[queue]]\nname='q'",
                "x:3:11: warning: the queues may hold 256MiB together, and the store 1MiB",
            ),
            (
                "[store]\nkey_file='k'\n[[queue]]\nname='q'\nexpires='10s'\n[[upstream]]\nname='a'\nbreaker={open_for={base='1s',max='1m'}}\n[[upstream.route]]\nqueue={name='q'}",
                "x:5:9: warning: deliveries expire after 10s, and the breaker of a may stay open for 1m",
            ),
            ("[outbound]\nlisten = '0.0.0.0:4140'", "x:2:10: warning: other hosts can send requests"),
            ("[admin]\nlisten = '[::]:4191'", "other hosts can read the admin pages"),
            (
                "[[upstream]]\nname='a'\nendpoints='k8s://n/a:80'",
                "x:3:11: warning: port 80 is compared with the ports of the pods",
            ),
            ("[[upstream]]\nname='a'\nlisten='0.0.0.0:1'", "x:3:8: warning: other hosts can send requests"),
            (
                "[defaults]\nretry = { methods = 'all' }\n[[upstream]]\nname='a'\n[[upstream.route]]",
                "x:2:21: warning: requests that change",
            ),
            ("[defaults]\nretry = { methods = ['GET', 'POST'] }", "POST may be sent twice"),
            (
                "[defaults]\nattempt_timeout = '6s'\n[[upstream]]\nname='a'",
                "x:2:19: warning: 3 attempts of 6s",
            ),
            (
                "[defaults]\nconnect_timeout = '16s'",
                "x:2:19: warning: connect_timeout 16s is longer than timeout 15s",
            ),
            (
                "[[upstream]]\nname='a'\ntimeout='2s'\nconnect_timeout='3s'",
                "x:4:17: warning: connect_timeout 3s",
            ),
            (
                "[defaults]\nhedge = { after = '16s' }",
                "x:2:19: warning: hedge.after 16s is longer than timeout 15s",
            ),
            (
                "[[upstream]]\nname='a'\nendpoints=['10.0.0.1:80', '10.0.0.1:80']",
                "x:3:27: warning: endpoint 10.0.0.1:80 is listed twice",
            ),
            ("[defaults]\nattempt_timeout = '16s'", "attempt_timeout 16s is longer than timeout 15s"),
            (
                "[[upstream]]\nname='a'\ntimeout='2s'\nattempt_timeout='1s'",
                "x:4:17: warning: 3 attempts of 1s",
            ),
            (
                "[defaults]\nbreaker = { consecutive_failures = 0, failure_rate = 0 }",
                "this breaker never opens",
            ),
            ("[defaults]\nbreaker = { min_requests = 2000 }", "failure_rate needs 200 requests a second"),
            ("[defaults]\nfault = { delay = '1s' }", "this fault never happens"),
            ("[defaults]\nretry = false\nhedge = { after = 'p95' }", "this hedge never happens"),
            (
                "[[upstream]]\nname='a'\nroute = [{}, {timeout='1s'}]",
                "x:3:14: warning: this route is never taken",
            ),
            (
                "[[upstream]]\nname='a'\nroute = [{breaker = {trial_requests = 7}}]",
                "x:3:39: warning: `breaker.trial_requests` has no effect in a route",
            ),
            (
                "[[upstream]]\nname='a'\nroute = [{limits={max_requests=3, max_pending=1, pending_timeout='1s'}}]",
                "`limits.max_pending`, `limits.max_requests` has no effect in a route",
            ),
            (
                "[[upstream]]\nname='a'\nroute = [{retry={max=1, budget={ratio=0.5}}}]",
                "`retry.budget` has no effect",
            ),
            ("[[upstream]]\nname='a'\nroute = [{outlier=false}]", "`outlier` has no effect in a route"),
            ("[[upstream]]\nname='a'\nprotocol='tcp'\nroute = [{}]", "this route is never taken"),
            (
                "[[inbound.allow]]\nidentity = ['spiffe://a/b']",
                "x:1:1: warning: this allow list matches no client",
            ),
            (
                "[inbound]\nmtls='permissive'\nallow=[{identity=['spiffe://a/*']},{identity=['spiffe://a/b'],methods=['GET']}]",
                "x:3:36: warning: entry 2 allows only what entry 1 already allows",
            ),
            (
                "[inbound.jwt]\nissuer='i'\naudiences=['a']\njwks='http://id.example/k'",
                "x:4:6: warning: the keys that verify tokens come over plain HTTP",
            ),
            (
                "[[upstream]]\nname='a'\nendpoints=['127.0.0.1:1']\noauth2={token_url='http://i/t',client_id='c',client_secret_file='/s'}",
                "x:4:19: warning: the client's secret goes over plain HTTP",
            ),
            (
                "[[upstream]]\nname='a'\noauth2={token_url='https://i/t',client_id='c',client_secret_file='/s'}",
                "warning: the upstream's token goes over plain HTTP",
            ),
            (
                "[telemetry]\naccess_log='off'\naccess_log_file='/l'",
                "x:3:17: warning: this file is never written",
            ),
            ("[telemetry]\nprotocol='grpc'", "x:2:10: warning: nothing is exported"),
            (
                "[telemetry]\notlp='http://c:4318'\nprotocol='grpc'",
                "x:2:6: warning: protocol is \"grpc\", and 4318",
            ),
            ("[telemetry]\notlp='http://c:4317'\nprotocol='http'", "4317 is the port for gRPC"),
            ("[telemetry]\notlp='http://c:4317/v1/traces'", "x:2:6: warning: gRPC ignores the path"),
        ] {
            let found = warnings(text);
            assert_eq!(found.len(), 1, "{found:#?} for\n{text}");
            assert!(found[0].contains(message), "{message:?} not in {found:#?}");
        }
    }

    #[test]
    fn does_not_warn_of_defaults_and_sound_settings() {
        for text in [
            "",
            "[defaults]\nattempt_timeout = '4s'",
            "[inbound]\nlisten = '0.0.0.0:4143'",
            "[defaults]\nretry = false",
            "[[upstream]]\nname='a'\nroute = [{breaker=false, limits=false, retry={max=1}}]",
            "[telemetry]\naccess_log = 'off'",
            "[telemetry]\notlp = 'http://c:4318/v1/traces'",
            "[telemetry]\notlp = 'https://c/v1/traces'\nprotocol = 'http'",
        ] {
            assert_eq!(warnings(text), [""; 0], "{text}");
        }
    }
}
