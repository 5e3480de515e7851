//! The service that a process gives for itself.

use gannet_proto::labels;

/// The source of a fact about a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum ServiceSource {
    /// The context that the process publishes.
    Context,
    /// The variable `OTEL_SERVICE_NAME`.
    ServiceName,
    /// The variable `OTEL_RESOURCE_ATTRIBUTES`.
    Attributes,
}

impl ServiceSource {
    fn text(self) -> &'static str {
        match self {
            Self::Context => "its process context",
            Self::ServiceName => "OTEL_SERVICE_NAME",
            Self::Attributes => "OTEL_RESOURCE_ATTRIBUTES",
        }
    }
}

/// A text and its source; `None` if the process does not give it.
pub(crate) type ServiceFact = Option<(String, ServiceSource)>;

/// The service that a process gives for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service {
    /// The name of the service.
    pub(crate) name: ServiceFact,
    /// The group of services that it is in.
    pub(crate) namespace: ServiceFact,
    /// The version that it runs.
    pub(crate) version: ServiceFact,
}

/// A label of series with a fact that the process gave.
pub(crate) type ServiceLabel<'a> = (&'static str, &'a str);

impl Service {
    /// Returns the name that the process gives.
    pub(crate) fn name(&self) -> Option<&str> {
        self.name.as_ref().map(|(name, _)| name.as_str())
    }

    /// Returns the labels of series that the process gives.
    pub(crate) fn labels(&self) -> impl Iterator<Item = ServiceLabel<'_>> {
        let facts = [
            (labels::SERVICE_NAME, &self.name),
            (labels::SERVICE_NAMESPACE, &self.namespace),
            (labels::SERVICE_VERSION, &self.version),
        ];
        facts.into_iter().filter_map(|(label, fact)| Some((label, fact.as_ref()?.0.as_str())))
    }

    /// Describes the facts and their sources; human-readable. Empty if the process gives none.
    pub(crate) fn text(&self) -> String {
        let facts = [
            ("service.name", &self.name),
            ("service.namespace", &self.namespace),
            ("service.version", &self.version),
        ];
        let given = facts.into_iter().filter_map(|(key, fact)| {
            let (value, source) = fact.as_ref()?;
            Some(format!("{key} {value} from {}", source.text()))
        });
        given.collect::<Vec<_>>().join(", ")
    }
}
