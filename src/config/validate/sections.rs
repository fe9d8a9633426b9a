//! Validation of the sections, and of conditions between them.

use std::collections::HashMap;

use http::HeaderName;

use super::Check;
use crate::{
    authorization::AllowSettings,
    authorization::IdentityPattern,
    config::{
        AdminListen, AgentAddress, Config, Identity, Jwt, ListenAddr, Node, Problem, diagnostic::Problems,
    },
};

const MAX_WORKERS: u16 = 256;

/// Checks all sections but the upstreams.
pub(in super::super) fn sections(config: &Config, root: &Node, problems: &mut Problems) {
    let mut check = Check { node: root, problems };
    let name = &config.service.name;
    let fits = !name.is_empty() && name.len() <= 255 && !name.chars().any(char::is_control);
    check.require(fits, &["service", "name"], "this cannot be a service's name", "write 1 to 255 characters");
    if let Some(workers) = config.runtime.workers {
        let help = format!("write 1 to {MAX_WORKERS}, or remove this key for the container's CPU limit");
        check.require(
            (1..=MAX_WORKERS).contains(&workers),
            &["runtime", "workers"],
            "the number of workers is out of range",
            &help,
        );
    }
    let forward_to = &config.inbound.forward_to;
    let help = "write the address of the service, e.g. \"127.0.0.1:8080\"";
    check.require(forward_to.port > 0, &["inbound", "forward_to"], "port 0 cannot be connected to", help);
    let local =
        forward_to.host == "localhost" || forward_to.socket_addr().is_some_and(|a| a.ip().is_loopback());
    if local && forward_to.port == config.inbound.listen.0.port && forward_to.port > 0 {
        check.error(&["inbound", "forward_to"], "the proxy would forward to itself", help);
    }
    let mut ports = HashMap::new();
    for (at, port) in config.inbound.ports.iter().enumerate() {
        let path = ["inbound", "port", &at.to_string(), "port"];
        check.require(port.port > 0, &path, "no service is at port 0", "write the service's port");
        if ports.insert(port.port, at).is_some() {
            check.error(&path, format!("port {} is described twice", port.port), "combine the two entries");
        }
    }
    let entries = root.get("inbound").and_then(|inbound| inbound.get("allow")).and_then(Node::as_array);
    for (allow, node) in config.inbound.allow.iter().zip(entries.unwrap_or_default()) {
        Check { node, problems: check.problems }.allow(allow, config.inbound.jwt.is_some());
    }
    if let Some(jwt) = &config.inbound.jwt {
        check.jwt(jwt);
    }
    if let Some(identity) = &config.identity {
        check.identity(identity);
    }
    if let Some(otlp) = &config.telemetry.otlp {
        let otlp = otlp.expose();
        let fits = ["http://", "https://"].iter().any(|scheme| otlp.starts_with(scheme));
        let fits = fits && otlp.parse::<http::Uri>().is_ok();
        let help = "write e.g. \"http://127.0.0.1:4317\"";
        check.require(fits, &["telemetry", "otlp"], "this is not a collector's URL", help);
    }
    listeners(config, root, problems);
}

impl Check<'_> {
    fn allow(&mut self, allow: &AllowSettings, has_jwt: bool) {
        let help = "name at least one SPIFFE ID";
        self.require_items(&allow.identity, &["identity"], "no client would be allowed", help);
        for (at, id) in allow.identity.iter().enumerate() {
            if let Err(reason) = id.parse::<IdentityPattern>() {
                let help = "write e.g. \"spiffe://shop.example/ns/shop/sa/*\", or \"dns:NAME\"";
                self.error(
                    &["identity", &at.to_string()],
                    format!("this is not a SPIFFE ID: {reason}"),
                    help,
                );
            }
        }
        for (at, method) in allow.methods.iter().enumerate() {
            self.method(&["methods", &at.to_string()], method);
        }
        for (at, path) in allow.paths.iter().enumerate() {
            self.path_pattern(&["paths", &at.to_string()], path);
        }
        let help = "add [inbound.jwt], or remove `claims`";
        self.require(
            has_jwt || allow.claims.is_empty(),
            &["claims"],
            "no token is verified that could have these claims",
            help,
        );
    }

    fn jwt(&mut self, jwt: &Jwt) {
        let at = |key: &'static str| ["inbound", "jwt", key];
        self.require(!jwt.issuer.is_empty(), &at("issuer"), "the issuer is empty", "write the token's `iss`");
        let help = "name at least one; a token for another service must not pass here";
        self.require_items(&jwt.audiences, &at("audiences"), "there is no audience", help);
        let jwks = jwt.jwks.expose();
        let fits = jwks.starts_with('/') || is_url(jwks);
        self.require(
            fits,
            &at("jwks"),
            "this is neither a URL nor an absolute path",
            "write https://… or /path",
        );
        for (index, path) in jwt.except.iter().enumerate() {
            self.path_pattern(&["inbound", "jwt", "except", &index.to_string()], path);
        }
        for name in jwt.claim_headers.keys() {
            let place = ["inbound", "jwt", "claim_headers", name];
            match name.parse::<HeaderName>() {
                Err(_) => self.error(&place, "this is not a header's name", "write e.g. x-user-id"),
                Ok(name) if is_reserved(&name) => {
                    self.error(&place, "this header is reserved", "write a name like x-user-id");
                }
                Ok(_) => {}
            }
        }
    }

    fn identity(&mut self, identity: &Identity) {
        let files = identity.cert.is_some() || identity.key.is_some() || identity.ca.is_some();
        match (&identity.spiffe, files) {
            (Some(_), true) => {
                let help = "keep `spiffe`, or `cert`, `key` and `ca`";
                self.error(
                    &["identity", "spiffe"],
                    "certificate and roots come from files or the Workload API",
                    help,
                );
            }
            (Some(socket), false) => {
                let fits = socket.parse::<AgentAddress>().is_ok();
                let help = "write e.g. \"unix:///run/spire/sockets/agent.sock\"";
                self.require(fits, &["identity", "spiffe"], "this is not a Workload API address", help);
            }
            (None, _) => {
                let help = "add `cert`, `key` and `ca`, or `spiffe`";
                let complete = identity.cert.is_some() && identity.key.is_some() && identity.ca.is_some();
                self.require_present(complete, &["identity"], "the identity is not complete", help);
            }
        }
    }
}

/// Whether it is an absolute http or https URL.
pub(super) fn is_url(text: &str) -> bool {
    ["https://", "http://"].iter().any(|scheme| text.starts_with(scheme))
        && text.parse::<http::Uri>().is_ok_and(|uri| uri.host().is_some_and(|host| !host.is_empty()))
}

/// Fields that frame a message, name its sender, or contain the token.
fn is_reserved(name: &HeaderName) -> bool {
    let name = name.as_str().replace('_', "-");
    let reserved = [
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "via",
        "x-request-timeout-ms",
    ];
    reserved.contains(&name.as_str())
        || ["x-forwarded-", "x-outrigger-", "grpc-"].iter().any(|start| name.starts_with(start))
}

/// No two listeners may use the same port of the same address.
fn listeners(config: &Config, root: &Node, problems: &mut Problems) {
    let at = |path: [&str; 2]| root.get(path[0])?.get(path[1])?.origin;
    let mut all: Vec<(String, &ListenAddr, _)> = vec![
        ("inbound.listen".to_owned(), &config.inbound.listen, at(["inbound", "listen"])),
        ("outbound.listen".to_owned(), &config.outbound.listen, at(["outbound", "listen"])),
    ];
    if let AdminListen::Tcp(address) = &config.admin.listen {
        all.push(("admin.listen".to_owned(), address, at(["admin", "listen"])));
    }
    if let Some(address) = &config.admin.probe_listen {
        all.push(("admin.probe_listen".to_owned(), address, at(["admin", "probe_listen"])));
    }
    let nodes: HashMap<&str, &Node> = root
        .get("upstream")
        .and_then(Node::as_array)
        .unwrap_or_default()
        .iter()
        .filter_map(|node| Some((node.get("name")?.as_str()?, node)))
        .collect();
    for upstream in &config.upstreams {
        if let Some(address) = &upstream.listen {
            let node = nodes.get(upstream.name.as_str()).and_then(|node| node.get("listen"));
            let origin = node.and_then(|listen| listen.origin);
            all.push((format!("the listener of upstream `{}`", upstream.name), address, origin));
        }
    }
    let mut seen: HashMap<u16, Vec<(String, &ListenAddr, _)>> = HashMap::new();
    for (name, address, origin) in all {
        if address.0.port == 0 {
            continue;
        }
        let others = seen.entry(address.0.port).or_default();
        if let Some((other, other_address, other_origin)) =
            others.iter().find(|(_, other, _)| overlap(other, address))
        {
            problems.push(
                Problem::error(
                    origin.or(*other_origin),
                    format!("port {} is listened on twice", address.0.port),
                )
                .label(format!("by {other} ({other_address}) and {name} ({address})"))
                .help("give one of them another port"),
            );
        }
        others.push((name, address, origin));
    }
}

/// Whether two listen addresses with the same port conflict.
fn overlap(a: &ListenAddr, b: &ListenAddr) -> bool {
    let wild =
        |address: &ListenAddr| address.0.socket_addr().is_some_and(|address| address.ip().is_unspecified());
    let local = |address: &ListenAddr| {
        address.0.host == "localhost"
            || address.0.socket_addr().is_some_and(|address| address.ip().is_loopback())
    };
    let any_local = |a: &ListenAddr, b: &ListenAddr| a.0.host == "localhost" && local(b);
    a == b || wild(a) || wild(b) || any_local(a, b) || any_local(b, a)
}
