//! `mode: env`: proxy variables in every container; needs no privilege.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Value, json};

use super::{InjectError, Note, editor::PodEditor, proxy_config::OUTBOUND};
use crate::runtime::service_env;

/// Sets the variables in all containers of the pod. Variables that a container already sets are kept.
pub fn extend(editor: &mut PodEditor<'_>, notes: &mut Vec<Note>) -> Result<(), InjectError> {
    let outbound = SocketAddr::from((Ipv4Addr::LOCALHOST, OUTBOUND));
    for list in ["initContainers", "containers"] {
        let containers = editor.pod()["spec"][list].as_array().cloned().unwrap_or_default();
        for container in containers {
            let Some(name) = container["name"].as_str() else { continue };
            let own: Vec<&Value> = container["env"].as_array().into_iter().flatten().collect();
            let find = |wanted: &str| own.iter().find(|variable| variable["name"] == wanted);
            let no_proxy = ["no_proxy", "NO_PROXY"].iter().find_map(|name| find(name)?["value"].as_str());
            let (mut added, at) = (Vec::new(), format!("/spec/{list}/{name}/env"));
            for (variable, value) in service_env::build(&[outbound], no_proxy, None) {
                match find(variable) {
                    None => added.push(json!({"name": variable, "value": value})),
                    Some(existing) if variable.eq_ignore_ascii_case("no_proxy") && existing.get("value").is_some() => {
                        editor.set(&format!("{at}/{variable}/value"), value.into())?;
                    }
                    Some(existing) if existing["value"] == *value => {}
                    Some(_) => notes.push(Note::new(format!(
                        "container `{name}` has a {variable} of its own, which is kept: requests that use it bypass the sidecar"
                    ))),
                }
            }
            editor.put_items(&at, usize::MAX, added)?;
        }
    }
    Ok(())
}
