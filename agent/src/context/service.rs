//! The service of a process, and the sources of its name, namespace and version.
//!
//! The order of sources, the first one counts for each of name, namespace and version: the pod's annotation
//! `gannet.dev/service-name` (name alone); the context that the process publishes; `OTEL_SERVICE_NAME` (name alone);
//! `OTEL_RESOURCE_ATTRIBUTES`; the facts of the pod, see `pods::model`; the executable (name alone). This module has the
//! sources that belong to the process. They come before facts of the pod, as in OpenTelemetry's conventions for Kubernetes, so that profiles have the
//! name that the process gives its traces. The annotation comes first, because it is made for Gannet.

use super::{KEYS, environment::Environment, published::Published};
use crate::model::{Service, ServiceSource as Source, printable};

const NAME: &str = KEYS[0];
const NAMESPACE: &str = KEYS[1];
const VERSION: &str = KEYS[2];

/// SDKs give this name, or one that begins so, to a service without a name.
const UNKNOWN: &str = "unknown_service";
/// Bytes of a name or version. Longer ones are cut.
const MAX_BYTES: usize = 256;

/// Chooses among the sources of a process.
pub(super) fn choose(context: Option<&Published>, environment: &Environment) -> Service {
    let fact = |key: &'static str| {
        let published = context.and_then(|context| context.resource.get(key));
        let variable = (key == NAME).then_some(&environment.service_name);
        [
            (published, Source::Context),
            (variable, Source::ServiceName),
            (environment.attributes.get(key), Source::Attributes),
        ]
        .into_iter()
        .filter_map(|(text, source)| Some((text?, source)))
        .find(|(text, _)| !(text.trim().is_empty() || key == NAME && text.starts_with(UNKNOWN)))
        .map(|(text, source)| (shown(text), source))
    };
    Service { name: fact(NAME), namespace: fact(NAMESPACE), version: fact(VERSION) }
}

/// Returns a text as a label has it: without control characters, and not too long.
fn shown(text: &str) -> String {
    let mut text = printable(text.trim());
    gannet_base::cut(&mut text, MAX_BYTES);
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn resource(pairs: &[(&'static str, &str)]) -> BTreeMap<&'static str, String> {
        pairs.iter().map(|(key, value)| (*key, (*value).to_owned())).collect()
    }

    #[test]
    fn the_first_source_of_each_fact_counts() {
        let mut context = Published::default();
        context.resource = resource(&[(NAME, "published"), (VERSION, "1")]);
        let mut environment = Environment {
            service_name: "variable".into(),
            attributes: resource(&[(NAME, "attribute"), (NAMESPACE, "shop"), (VERSION, "2")]),
        };
        let all = choose(Some(&context), &environment);
        assert_eq!(
            all.text(),
            "service.name published from its process context, service.namespace shop from OTEL_RESOURCE_ATTRIBUTES, \
             service.version 1 from its process context"
        );
        assert_eq!(choose(None, &environment).name(), Some("variable"));
        // A name that the SDK made up is none.
        context.resource.insert(NAME, "unknown_service:python".into());
        assert_eq!(choose(Some(&context), &environment).name(), Some("variable"));
        environment.service_name = "  ".into();
        assert_eq!(choose(None, &environment).name(), Some("attribute"));
        let labels: Vec<_> = all.labels().collect();
        let expected =
            [("service_name", "published"), ("service_namespace", "shop"), ("service_version", "1")];
        assert_eq!(labels, expected);
        assert_eq!(choose(None, &Environment::default()).text(), "");
    }

    #[test]
    fn names_are_bounded_and_steer_no_terminal() {
        let name_of = |name: &str| {
            let environment = Environment { service_name: name.into(), ..Environment::default() };
            choose(None, &environment).name().map(str::to_owned)
        };
        assert_eq!(name_of(" a\x1b[2J ").as_deref(), Some("a\u{fffd}[2J"));
        let long = name_of(&"é".repeat(400)).unwrap();
        assert!(long.ends_with("é…") && long.len() <= MAX_BYTES && long.len() > MAX_BYTES - 4, "{long}");
    }
}
