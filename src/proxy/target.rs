//! Finds the destination of a request: its upstream and route.

use std::{net::SocketAddr, rc::Rc};

use http::{HeaderMap, HeaderValue, Method, Request, Version, header::HOST, uri::Authority};

use super::{connection::Connection, error::ProxyError, headers::cookie, redirection, worker::Worker};
use crate::{
    authorization::Peer,
    cause::Cause,
    config::{HostPort, MinTls, Mtls, UnknownHostPolicy},
    model::{RouteDestination, RouteSplit, Side, View, WorkerCluster, queue_route::QueueRoute},
    resilience::split::StickyKey,
    rng::Rng,
    telemetry::metrics::EntryPoint,
    upstream::balance::hash_key,
};

/// The default port of `http://`.
const HTTP_PORT: u16 = 80;

/// The upstream of a request, the route within it, and how the client chose it.
#[derive(Clone, Debug)]
pub struct RouteTarget {
    /// The upstream that the request is sent to.
    pub serving: Rc<WorkerCluster>,
    /// The upstream whose routes were matched: the same, unless a route leads to another upstream.
    pub route_owner: Rc<WorkerCluster>,
    /// The index in the routes of `route_owner`.
    pub route: Option<usize>,
    /// The index of `route_owner` in the configuration, for its routes; `None` for the service itself and unknown hosts.
    pub route_owner_index: Option<usize>,
    /// The endpoint that the client dialled, where it dialled an address and the request names no upstream.
    pub pinned_endpoint: Option<SocketAddr>,
    /// Whether the client chose the address by a name in the request: then `deny_networks` and the proxy's own ports
    /// are checked.
    pub chosen_by_client: bool,
}

impl RouteTarget {
    /// What `queue` of the route means for the request; `None` for most.
    pub fn queue_route(&self) -> Option<&QueueRoute> {
        self.route_owner.cluster.queue_routes.get(self.route?)?.as_ref()
    }
}

/// The entry point of a request.
pub fn entry_point<B>(connection: &Connection, request: &Request<B>) -> EntryPoint {
    // Every HTTP/2 request has an `:authority`; an HTTP/1 target has one only in a request to a proxy.
    let named = request.uri().authority().is_some() && request.version() != Version::HTTP_2;
    match &connection.side {
        Side::Inbound => EntryPoint::Inbound,
        Side::Upstream(_) => EntryPoint::Listen,
        Side::Outbound if connection.original_destination.is_some() => EntryPoint::Redirect,
        Side::Outbound if named || connection.tunnel_destination.is_some() => EntryPoint::Proxy,
        Side::Outbound => EntryPoint::Host,
    }
}

/// The destination of bytes that are not HTTP. The outbound port has none, unless the connection was redirected.
pub fn byte_stream_destination(connection: &Connection) -> Option<Rc<WorkerCluster>> {
    let view = connection.worker.view();
    match &connection.side {
        Side::Inbound => Some(service(connection, &view)),
        Side::Outbound => connection
            .original_destination
            .and_then(|original| redirection::byte_stream_destination(connection, &view, original)),
        Side::Upstream(name) => view.by_name(name).map(|index| Rc::clone(&view.clusters[index])),
    }
}

/// The service: at `forward_to`, or at the original destination of a redirected connection.
fn service(connection: &Connection, view: &View) -> Rc<WorkerCluster> {
    match connection.original_destination {
        Some(address) => connection.worker.service_at(address, view),
        None => Rc::clone(&view.inbound),
    }
}

/// Whether a client of this connection must, may or may not use mutual TLS.
pub fn mtls_mode(connection: &Connection) -> Mtls {
    if connection.side != Side::Inbound {
        return Mtls::Off;
    }
    let view = connection.worker.view();
    let inbound = &view.snapshot.config.inbound;
    let port_number =
        connection.original_destination.map_or(inbound.forward_to.port, |original| original.port());
    let port = inbound.ports.iter().find(|port| port.port == port_number);
    let mtls = port.and_then(|port| port.mtls).unwrap_or(inbound.mtls);
    // Without a certificate the proxy cannot terminate TLS: it belongs to the service.
    if mtls == Mtls::Permissive && view.snapshot.config.identity.is_none() { Mtls::Off } else { mtls }
}

/// Whether the current configuration requires a client certificate that this connection lacks. It may have been made
/// when none was required.
pub fn lacks_identity(connection: &Connection) -> bool {
    connection.peer_identity.is_none() && mtls_mode(connection) == Mtls::Strict
}

/// Whether the current configuration requires a newer version of TLS than this connection uses.
pub fn has_outdated_tls(connection: &Connection) -> bool {
    let min = || connection.worker.view().snapshot.config.identity.as_ref().map(|identity| identity.min_tls);
    connection.tls12 && min() == Some(MinTls::V13)
}

/// An upstream by its name in the configuration, for a fallback.
pub fn by_name(view: &View, name: &str) -> Option<RouteTarget> {
    let index = view.by_name(name)?;
    let local = Rc::clone(&view.clusters[index]);
    Some(RouteTarget {
        route_owner: Rc::clone(&local),
        serving: local,
        route: None,
        route_owner_index: Some(index),
        pinned_endpoint: None,
        chosen_by_client: false,
    })
}

/// Finds the upstream and the route of a request.
pub fn find<B>(
    connection: &Connection,
    view: &View,
    request: &Request<B>,
) -> Result<RouteTarget, ProxyError> {
    match &connection.side {
        Side::Inbound => Ok(to_service(view, service(connection, view), request)),
        Side::Upstream(name) => {
            let index = view.by_name(name).ok_or_else(|| {
                ProxyError::new(
                    Cause::UnknownUpstream,
                    format!("the configuration no longer has an upstream `{name}`"),
                )
            })?;
            Ok(routed(Client::of(connection), view, index, request))
        }
        Side::Outbound if let Some(original) = connection.original_destination => {
            by_destination(connection, view, original, request)
        }
        Side::Outbound => {
            let host = match &connection.tunnel_destination {
                Some(host) => host.clone(),
                None => requested_host(request)?,
            };
            by_host(connection, view, &host, request)
        }
    }
}

/// The upstream of a host, else the host itself as an unknown host.
pub fn by_host<B>(
    connection: &Connection,
    view: &View,
    host: &HostPort,
    request: &Request<B>,
) -> Result<RouteTarget, ProxyError> {
    if let Some(index) = view.snapshot.router.upstream(&host.host, Some(host.port)) {
        return Ok(RouteTarget {
            chosen_by_client: true,
            ..routed(Client::of(connection), view, index, request)
        });
    }
    let config = &view.snapshot.config;
    if config.outbound.unknown == UnknownHostPolicy::Deny {
        return Err(ProxyError::new(
            Cause::UnknownUpstream,
            format!("no upstream has the host `{host}`, and `outbound.unknown` is \"deny\""),
        ));
    }
    let local = connection.worker.unknown_host(host, config);
    Ok(RouteTarget { chosen_by_client: true, ..without_routes(local) })
}

/// The upstream of a redirected request's host, else of its original destination, else that address itself.
fn by_destination<B>(
    connection: &Connection,
    view: &View,
    original: SocketAddr,
    request: &Request<B>,
) -> Result<RouteTarget, ProxyError> {
    let host = requested_host_or_port(request, original.port()).ok();
    if let Some(host) = &host
        && let Some(index) = view.snapshot.router.upstream(&host.host, Some(host.port))
    {
        return Ok(RouteTarget {
            chosen_by_client: true,
            ..routed(Client::of(connection), view, index, request)
        });
    }
    if let Some(index) = redirection::by_address(view, original) {
        let target = routed(Client::of(connection), view, index, request);
        // A route may lead to another upstream, which does not have this address.
        let pinned = Rc::ptr_eq(&target.serving, &target.route_owner).then_some(original);
        return Ok(RouteTarget { pinned_endpoint: pinned, ..target });
    }
    let config = &view.snapshot.config;
    if config.outbound.unknown == UnknownHostPolicy::Deny {
        let host = host.map_or_else(String::new, |host| format!("the host `{host}` or "));
        return Err(ProxyError::new(
            Cause::UnknownUpstream,
            format!("no upstream has {host}the address {original}, and `outbound.unknown` is \"deny\""),
        ));
    }
    Ok(without_routes(connection.worker.unknown_address(original, config)))
}

/// The service, and the route of `[inbound]`.
pub fn to_service<B>(view: &View, service: Rc<WorkerCluster>, request: &Request<B>) -> RouteTarget {
    let route = view
        .snapshot
        .router
        .inbound()
        .and_then(|routes| routes.find(request.method(), request.uri().path(), request.headers()));
    RouteTarget { route, ..without_routes(service) }
}

/// A target without routes, for what is not an upstream of the configuration.
fn without_routes(local: Rc<WorkerCluster>) -> RouteTarget {
    let matched = Rc::clone(&local);
    RouteTarget {
        serving: local,
        route_owner: matched,
        route: None,
        route_owner_index: None,
        pinned_endpoint: None,
        chosen_by_client: false,
    }
}

/// Who sends a request: what a split by client needs.
#[derive(Clone, Copy)]
pub struct Client<'a> {
    pub worker: &'a Worker,
    pub identity: Option<&'a Peer>,
    pub address: &'a HeaderValue,
}

impl<'a> Client<'a> {
    fn of(connection: &'a Connection) -> Self {
        let identity = connection.peer_identity.as_deref();
        Self { worker: &connection.worker, identity, address: &connection.peer }
    }
}

/// An upstream of the configuration, and the request's route in it.
pub fn routed<B>(client: Client<'_>, view: &View, index: usize, request: &Request<B>) -> RouteTarget {
    let matched = Rc::clone(&view.clusters[index]);
    let route = view
        .snapshot
        .router
        .routes(index)
        .and_then(|routes| routes.find(request.method(), request.uri().path(), request.headers()));
    let to = match route.and_then(|route| matched.cluster.destinations.get(route)) {
        None | Some(RouteDestination::Own) => None,
        Some(RouteDestination::Other(to)) => Some(*to),
        Some(RouteDestination::Split(split)) => choose(client, split, request.headers()),
    };
    let local = to.and_then(|to| view.clusters.get(to)).unwrap_or(&matched);
    RouteTarget {
        serving: Rc::clone(local),
        route_owner: matched,
        route,
        route_owner_index: Some(index),
        pinned_endpoint: None,
        chosen_by_client: false,
    }
}

/// The upstream that serves a request of a split route. A client without the sticky key is assigned anew each time.
fn choose(client: Client<'_>, route: &RouteSplit, headers: &HeaderMap) -> Option<usize> {
    let sticky = match &route.sticky {
        StickyKey::None => None,
        StickyKey::Peer => Some(match client.identity {
            Some(peer) => hash_key(peer.to_string().as_bytes()),
            None => hash_key(client.address.as_bytes()),
        }),
        StickyKey::Header(name) => headers.get(name).map(|value| hash_key(value.as_bytes())),
        StickyKey::Cookie(name) => cookie(headers, name).map(|value| hash_key(value.as_bytes())),
    };
    let key = sticky.unwrap_or_else(|| client.worker.with_rng(Rng::next_u64));
    route.split.choose(key).and_then(|at| route.upstreams.get(at).copied().flatten())
}

/// The host and port of a request: in its target (absolute-form, `:authority`, CONNECT), else in `Host`.
fn requested_host<B>(request: &Request<B>) -> Result<HostPort, ProxyError> {
    requested_host_or_port(request, HTTP_PORT)
}

fn requested_host_or_port<B>(request: &Request<B>, default: u16) -> Result<HostPort, ProxyError> {
    let uri = request.uri();
    if uri.scheme_str() == Some("https") && request.version() != Version::HTTP_2 {
        return Err(ProxyError::malformed(
            "https:// in a plaintext request to the proxy: use CONNECT to encrypt the request yourself, or http://",
        ));
    }
    if let Some(authority) = uri.authority() {
        return host_port_or(authority, request.method(), default);
    }
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let authority = host.parse::<Authority>().map_err(|_| {
        ProxyError::malformed("the request names no host: neither its target nor a Host field does")
    })?;
    host_port_or(&authority, request.method(), default)
}

/// Splits an authority. CONNECT must name a port.
pub fn host_port(authority: &Authority, method: &Method) -> Result<HostPort, ProxyError> {
    host_port_or(authority, method, HTTP_PORT)
}

fn host_port_or(authority: &Authority, method: &Method, default: u16) -> Result<HostPort, ProxyError> {
    let port = match authority.port() {
        Some(_) => authority
            .port_u16()
            .ok_or_else(|| ProxyError::malformed(format!("`{authority}` has no valid port")))?,
        None if method == Method::CONNECT => {
            return Err(ProxyError::malformed(format!(
                "CONNECT {authority}: the port is missing (RFC 9110 §9.3.6)"
            )));
        }
        None => default,
    };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').trim_end_matches('.');
    if host.is_empty() {
        return Err(ProxyError::malformed("the request names no host"));
    }
    Ok(HostPort { host: host.to_ascii_lowercase(), port })
}
