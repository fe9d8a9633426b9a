//! `mode: env`: the proxy variables, in every container, with no privilege at all.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Value, json};

use super::{InjectError, Note, editor::Editor, proxy_config::OUTBOUND};
use crate::runtime::service_env;

/// Sets the variables in all containers of the pod. What a container has set by itself stays.
pub fn extend(editor: &mut Editor<'_>, notes: &mut Vec<Note>) -> Result<(), InjectError> {
    let outbound = SocketAddr::from((Ipv4Addr::LOCALHOST, OUTBOUND));
    for list in ["initContainers", "containers"] {
        let containers = editor.pod()["spec"][list].as_array().cloned().unwrap_or_default();
        for container in containers {
            let Some(name) = container["name"].as_str() else { continue };
            let own: Vec<&Value> = container["env"].as_array().into_iter().flatten().collect();
            let find = |wanted: &str| own.iter().find(|variable| variable["name"] == wanted);
            let excluded = ["no_proxy", "NO_PROXY"].iter().find_map(|name| find(name)?["value"].as_str());
            let (mut added, at) = (Vec::new(), format!("/spec/{list}/{name}/env"));
            for (variable, value) in service_env::build(&[outbound], excluded, None) {
                match find(variable) {
                    None => added.push(json!({"name": variable, "value": value})),
                    Some(found) if variable.eq_ignore_ascii_case("no_proxy") && found.get("value").is_some() => {
                        editor.set(&format!("{at}/{variable}/value"), value.into())?;
                    }
                    Some(found) if found["value"] == *value => {}
                    Some(_) => notes.push(Note::new(format!(
                        "container `{name}` has a {variable} of its own, which stays: calls that heed it do not go through the sidecar"
                    ))),
                }
            }
            editor.put_items(&at, usize::MAX, added)?;
        }
    }
    Ok(())
}
