//! The description of the configuration file: its JSON Schema, and an example of every key.

use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value as Json, json};

use super::{
    Admin, Identity, Outbound, Policy, Runtime, Service, Telemetry,
    queues::InboundRouteKeys,
    resolve::{InboundKeys, UpstreamKeys, route::RouteKeys},
};
use crate::{queue::store::settings::StoreSettings, resilience::queue::keys::QueueSettings};

/// A commented example of every key with its default.
pub const EXAMPLE: &str = include_str!("../../config/outrigger.toml");

/// The JSON Schema of the file as written.
///
/// Policy keys are valid in four places. Only `[defaults]` shows their defaults: elsewhere they are inherited, or have
/// other defaults.
pub fn json_schema() -> Json {
    let mut generator = SchemaSettings::draft07().into_generator();
    let policy = properties::<Policy>(&mut generator);
    let inherited = without_defaults(&policy);
    let mut route = table(&properties::<RouteKeys>(&mut generator), &[&inherited], &[]);
    describe(&mut route, "Requests with a policy of their own; the most specific match wins.");
    let routes = as_map(json!({ "route": {
        "type": "array", "items": route, "description": "Requests with a policy of their own; the most specific match wins.",
    } }));
    let mut upstream = table(&properties::<UpstreamKeys>(&mut generator), &[&inherited, &routes], &["name"]);
    describe(&mut upstream, "A destination of outbound requests.");
    let mut inbound_route = table(&properties::<InboundRouteKeys>(&mut generator), &[], &[]);
    describe(&mut inbound_route, "Requests to this service that are treated in their own way.");
    let inbound_routes = as_map(json!({ "route": {
        "type": "array", "items": inbound_route, "description": "Requests to this service that are treated in their own way; the most specific match wins.",
    } }));
    let mut inbound = table(&properties::<InboundKeys>(&mut generator), &[&inherited, &inbound_routes], &[]);
    let mut queue = table(&properties::<QueueSettings>(&mut generator), &[], &["name"]);
    describe(&mut queue, "Requests that are kept and delivered later.");
    describe(
        &mut inbound,
        "Requests to this service. Inherits no policy: timeouts 0, no retry, no limits unless set.",
    );
    let sections = json!({
        "service": section::<Service>(&mut generator, "The service."),
        "runtime": section::<Runtime>(&mut generator, "The process."),
        "inbound": inbound,
        "outbound": section::<Outbound>(&mut generator, "Requests of this service."),
        "identity": section::<Identity>(&mut generator, "This service's certificate: files, or the SPIFFE Workload API."),
        "admin": section::<Admin>(&mut generator, "The admin page and API, probes and metrics."),
        "telemetry": section::<Telemetry>(&mut generator, "Traces and the access log."),
        "store": section::<StoreSettings>(&mut generator, "Where the deliveries of queues are kept; absent: nowhere, and there can be no queue."),
        "queue": { "type": "array", "items": queue, "description": "The queues." },
        "defaults": section::<Policy>(&mut generator, "The policy of every upstream; upstreams and routes override it key by key."),
        "upstream": { "type": "array", "items": upstream, "description": "The destinations of outbound requests." },
    });
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Outrigger",
        "type": "object",
        "properties": sections,
        "additionalProperties": false,
        "definitions": generator.take_definitions(true),
    })
}

fn section<T: JsonSchema>(generator: &mut SchemaGenerator, description: &str) -> Json {
    let mut schema = table(&properties::<T>(generator), &[], &[]);
    describe(&mut schema, description);
    schema
}

fn properties<T: JsonSchema>(generator: &mut SchemaGenerator) -> Map<String, Json> {
    let mut schema = T::json_schema(generator).to_value();
    match schema.get_mut("properties").map(Json::take) {
        Some(Json::Object(properties)) => properties,
        _ => Map::new(),
    }
}

fn table(own: &Map<String, Json>, more: &[&Map<String, Json>], required: &[&str]) -> Json {
    let all: Map<String, Json> = own
        .iter()
        .chain(more.iter().copied().flatten())
        .map(|(key, schema)| (key.clone(), schema.clone()))
        .collect();
    let mut schema = json!({ "type": "object", "properties": all, "additionalProperties": false });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

fn without_defaults(properties: &Map<String, Json>) -> Map<String, Json> {
    let strip = |(key, schema): (&String, &Json)| {
        let mut schema = schema.clone();
        if let Json::Object(schema) = &mut schema {
            schema.remove("default");
        }
        (key.clone(), schema)
    };
    properties.iter().map(strip).collect()
}

fn describe(schema: &mut Json, description: &str) {
    schema["description"] = json!(description);
}

fn as_map(json: Json) -> Map<String, Json> {
    match json {
        Json::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests;
