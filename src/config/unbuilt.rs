//! Keys of the contract whose feature is not built yet: refused, never silently accepted.
//!
//! They are read and checked like all others, so that a feature lands by taking its line from the list.

use super::{
    diagnostic::{Problem, Problems},
    node::{Node, Value},
    source::Origin,
};

/// A key and whether a value of it is refused.
type Unbuilt = (&'static str, fn(&Node) -> bool);

const UNBUILT: &[Unbuilt] = &[("upstream.endpoints", kubernetes)];

fn kubernetes(node: &Node) -> bool {
    node.as_str().is_some_and(|uri| uri.starts_with("k8s://"))
}

pub(super) fn refuse(root: &Node, problems: &mut Problems) {
    for (path, refused) in UNBUILT {
        look(root, None, &path.split('.').collect::<Vec<_>>(), path, *refused, problems);
    }
}

/// Follows the keys, through every item of lists on the way.
fn look(
    node: &Node,
    key: Option<Origin>,
    keys: &[&str],
    name: &str,
    refused: fn(&Node) -> bool,
    problems: &mut Problems,
) {
    match (keys.split_first(), &node.value) {
        (None, _) if refused(node) => {
            let what = match node.as_str() {
                Some(uri) if uri.starts_with("k8s://") => "`k8s://`".to_owned(),
                _ => format!("`{name}`"),
            };
            problems.push(
                Problem::error(key.or(node.origin), format!("{what} is not built yet"))
                    .label("this version cannot do it")
                    .help("remove it; a later version will take it"),
            );
        }
        (Some(_), Value::Array(items)) => {
            for item in items {
                look(item, item.origin, keys, name, refused, problems);
            }
        }
        (Some((first, rest)), Value::Table(table)) => {
            if let Some(entry) = table.get(*first) {
                look(&entry.node, entry.key, rest, name, refused, problems);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse::parse;

    fn refusals(text: &str) -> Vec<String> {
        let mut problems = Problems::default();
        let node = parse(text, 0, &|_| None, &mut problems);
        refuse(&node, &mut problems);
        problems.finish(Default::default()).problems.into_iter().map(|problem| problem.message).collect()
    }

    #[test]
    fn what_is_not_built_is_refused_wherever_it_stands() {
        let text = "[[upstream]]\nname = 'a'\n[[upstream]]\nendpoints = 'k8s://a/b:1'";
        assert_eq!(refusals(text), ["`k8s://` is not built yet"]);
    }

    #[test]
    fn the_documentation_tells_which_keys_are_not_built() {
        let page = include_str!("../../docs/configuration.md");
        let section =
            page.split("## Not built yet").nth(1).and_then(|rest| rest.split("\n## ").next()).unwrap();
        let mut told: Vec<&str> =
            section.split('`').skip(1).step_by(2).filter(|key| *key != "false").collect();
        let mut refused: Vec<&str> = UNBUILT.iter().map(|(key, _)| *key).collect();
        told.sort_unstable();
        refused.sort_unstable();
        assert_eq!(told, refused);
    }

    #[test]
    fn what_is_off_is_fine() {
        assert_eq!(
            refusals(
                "[inbound]\nmtls = 'off'\n[defaults]\nhedge = false\nretry = {max = 1}\n[[upstream]]\ntls = 'off'"
            ),
            [""; 0]
        );
    }
}
