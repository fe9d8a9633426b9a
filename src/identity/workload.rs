//! Certificates from the SPIFFE Workload API: an agent on a socket delivers new ones before the old ones expire.

pub mod api;

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use self::api::{ApiError, X509SvidResponse};
use super::{
    TrustDomain,
    material::{EncodedContent, EncodedFile, EncodedIdentity},
    store::IdentityStore,
};
use crate::{
    config::{AgentAddress, InvalidAgentAddress},
    rng::Rng,
};

/// The wait between attempts to connect to the agent. It doubles from the first to the second.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const MAX_BACKOFF: Duration = Duration::from_secs(15);
/// The limit for connecting, and then for the first response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("the agent at {0} does not respond")]
    Unresponsive(String),
    #[error("the agent at {0} closed the stream")]
    Closed(String),
    #[error("the agent at {socket}: {source}")]
    Api { socket: String, source: ApiError },
    #[error("{0}: {1}")]
    Socket(String, InvalidAgentAddress),
    #[error("the agent at {0} delivered no identity: is this workload registered?")]
    NoIdentity(String),
    #[error("the agent at {0} delivered certificates that cannot be parsed")]
    Malformed(String),
}

/// Keeps `store` current from the agent while this future is polled. Reconnects with back-off.
pub async fn watch_agent(store: Arc<IdentityStore>, socket: String) {
    let mut rng = Rng::new();
    let mut backoff = FIRST_BACKOFF;
    loop {
        let mut received = false;
        let error = receive(&store, &socket, &mut received).await;
        store.agent_unavailable(error.to_string());
        backoff = if received { FIRST_BACKOFF } else { (backoff * 2).min(MAX_BACKOFF) };
        sleep(rng.jitter(backoff, 0.2)).await;
    }
}

/// Applies the responses of one stream until it ends.
async fn receive(store: &IdentityStore, socket: &str, received: &mut bool) -> AgentError {
    let api = |source| AgentError::Api { socket: socket.to_owned(), source };
    let address: AgentAddress = match socket.parse() {
        Ok(address) => address,
        Err(error) => return AgentError::Socket(socket.to_owned(), error),
    };
    let mut stream = match timeout(RESPONSE_TIMEOUT, api::subscribe(&address)).await {
        Ok(Ok(stream)) => Box::pin(stream),
        Ok(Err(error)) => return api(error),
        Err(_) => return AgentError::Unresponsive(socket.to_owned()),
    };
    loop {
        let next = stream.message();
        // After the first response an agent may be silent for hours.
        let next = if *received { Ok(next.await) } else { timeout(RESPONSE_TIMEOUT, next).await };
        match next {
            Ok(Ok(Some(response))) => match parse_response(socket, &response) {
                Ok(pem) => {
                    *received = true;
                    store.deliver(pem);
                }
                Err(error) => return error,
            },
            Ok(Err(error)) => return api(error.into()),
            Ok(Ok(None)) => return AgentError::Closed(socket.to_owned()),
            Err(_) => return AgentError::Unresponsive(socket.to_owned()),
        }
    }
}

/// Parses the default SVID, the roots of its own and of federated trust domains, and revocation lists.
fn parse_response(socket: &str, response: &X509SvidResponse) -> Result<EncodedIdentity, AgentError> {
    let svid = response.svids.first().ok_or_else(|| AgentError::NoIdentity(socket.to_owned()))?;
    let malformed = || AgentError::Malformed(socket.to_owned());
    let text = |part: &str, der| EncodedFile {
        path: format!("{socket} ({part})").into(),
        content: EncodedContent::Der(der),
    };
    let own = trust_domain(&svid.spiffe_id).ok_or_else(malformed)?;
    let mut ca = vec![(Some(own), text("roots", split(&svid.bundle).ok_or_else(malformed)?))];
    for (id, bundle) in &response.federated_bundles {
        let (domain, roots) = (trust_domain(id).ok_or_else(malformed)?, split(bundle).ok_or_else(malformed)?);
        // A federated domain without roots so far must not block the others.
        if !roots.is_empty() {
            ca.push((Some(domain), text("roots", roots)));
        }
    }
    ca.sort_by(|(a, _), (b, _)| a.cmp(b));
    let lists: Vec<_> = response.crl.iter().map(|list| list.to_vec()).collect();
    Ok(EncodedIdentity {
        cert: text("certificate", split(&svid.x509_svid).ok_or_else(malformed)?),
        key: text("key", vec![svid.x509_svid_key.to_vec()]),
        ca,
        crl: if lists.is_empty() { Vec::new() } else { vec![text("revocation lists", lists)] },
    })
}

/// The DOMAIN of `spiffe://DOMAIN/PATH` or `spiffe://DOMAIN`.
fn trust_domain(id: &str) -> Option<TrustDomain> {
    id.strip_prefix("spiffe://")?.split('/').next()?.parse().ok()
}

/// Splits concatenated DER certificates.
fn split(mut der: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut certificates = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).ok()?;
        certificates.push(der.get(..der.len() - rest.len())?.to_vec());
        der = rest;
    }
    Some(certificates)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::identity::workload::api::X509Svid;

    fn certificate() -> Vec<u8> {
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertificateParams::default().self_signed(&key).unwrap().der().to_vec()
    }

    fn response(bundle: Vec<u8>) -> X509SvidResponse {
        let svid = X509Svid {
            spiffe_id: "spiffe://shop.example/a".to_owned(),
            x509_svid: Bytes::from([certificate(), certificate()].concat()),
            x509_svid_key: Bytes::from_static(b"key"),
            bundle: bundle.into(),
        };
        X509SvidResponse { svids: vec![svid], ..X509SvidResponse::default() }
    }

    fn count(text: &EncodedFile) -> usize {
        match &text.content {
            EncodedContent::Der(list) => list.len(),
            EncodedContent::Pem(_) => 0,
        }
    }

    #[test]
    fn a_response_is_parsed() {
        let mut response = response(certificate());
        response.crl = vec![Bytes::from_static(b"list")];
        let foreign = [("spiffe://b.example", certificate()), ("spiffe://a.example", Vec::new())];
        response.federated_bundles = foreign.map(|(id, roots)| (id.to_owned(), roots.into())).into();
        let pem = parse_response("s", &response).unwrap();
        assert_eq!((count(&pem.cert), count(&pem.key), count(&pem.crl[0])), (2, 1, 1));
        let domains: Vec<_> = pem.ca.iter().map(|(domain, _)| domain.as_ref().unwrap().as_str()).collect();
        assert_eq!(domains, ["b.example", "shop.example"], "no domain without roots");
    }

    #[test]
    fn malformed_responses_are_rejected() {
        assert!(matches!(parse_response("s", &X509SvidResponse::default()), Err(AgentError::NoIdentity(_))));
        let mut tail = certificate();
        tail.push(0);
        assert!(matches!(parse_response("s", &response(tail)), Err(AgentError::Malformed(_))));
        let mut foreign_scheme = response(certificate());
        foreign_scheme.svids[0].spiffe_id = "https://shop.example".to_owned();
        assert!(matches!(parse_response("s", &foreign_scheme), Err(AgentError::Malformed(_))));
    }
}
