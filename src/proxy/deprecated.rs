//! Requests of a route with `deprecation`: counted by client, and rejected once the version has ended.

use std::time::SystemTime;

use super::{error::ProxyError, progress::Progress, target::RouteTarget};
use crate::cause::Cause;

/// Counts the request. Fails after the sunset, where the route answers 410 from then on.
pub fn admit(target: &RouteTarget, progress: &Progress) -> Result<(), ProxyError> {
    let cluster = &target.route_owner.cluster;
    let Some(index) = target.route else { return Ok(()) };
    let (Some(route), Some(edits)) = (cluster.settings.routes.get(index), cluster.header_edits.get(index))
    else {
        return Ok(());
    };
    let Some(deprecation) = &edits.deprecation else { return Ok(()) };
    let policy_state = &target.route_owner.upstream.shared.policy_state;
    let client = progress.with_record(|record| record.client()).unwrap_or_default();
    policy_state.deprecated.count(&route.label(), &client);
    let Some(sunset) = deprecation.gone_since(SystemTime::now()) else { return Ok(()) };
    policy_state.counters.rejected.increment(Cause::Sunset.word());
    let page = route.deprecation.as_ref().and_then(|settings| settings.link.as_ref());
    let instead = page.map_or_else(String::new, |link| format!("; see {link}"));
    let detail = format!("{}: `{}` was served until {sunset}{instead}", cluster.settings.name, route.matches);
    Err(ProxyError { sunset: Some(sunset), ..ProxyError::new(Cause::Sunset, detail) })
}
